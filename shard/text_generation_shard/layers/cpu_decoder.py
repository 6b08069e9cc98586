"""The decoder's layers on a CPU, in one loop that names every operation.

One row's operations take a few microseconds each, and as much goes into finding what they need by way of modules. So
that is found once, after the weights are loaded.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from text_generation_kernels.cpu_attention import CpuAttentionPlan, cpu_attention
from text_generation_kernels.reference import silu_and_mul

from text_generation_shard.kv_cache import KvCaches

Product = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class CpuAttention:
    """What a forward pass needs of a layer's attention."""

    qkv: Product
    output: Product
    scale: float
    sliding_window: int | None
    query_norm: torch.Tensor | None  # [head_dim]
    key_norm: torch.Tensor | None  # [head_dim]


@dataclass(frozen=True, slots=True)
class CpuLayer:
    """What a forward pass needs of a layer."""

    attention_norm: torch.Tensor  # [hidden]
    attention: CpuAttention
    mlp_norm: torch.Tensor  # [hidden]
    gate_up: Product
    down: Product


class CpuDecoder:
    """All layers and the norm behind them."""

    def __init__(
        self,
        layers: Sequence[CpuLayer],
        norm: torch.Tensor,  # [hidden]
        eps: float,
        cos_sin_cache: torch.Tensor,  # [max_positions, rotary_dim] float32
    ) -> None:
        norms = [
            weight.float() * len(weight) ** 0.5 for layer in layers for weight in (layer.attention_norm, layer.mlp_norm)
        ]
        self._first_norm, *rest = [*norms, norm.float() * len(norm) ** 0.5]
        # With each layer the norms behind its attention and behind its MLP.
        self._layers = list(zip(layers, rest[::2], rest[1::2], strict=True))
        self._dtype = norm.dtype
        self._eps = eps
        self._cos_sin_cache = cos_sin_cache

    def run(
        self,
        embeddings: torch.Tensor,  # [T, hidden]
        rows: torch.Tensor | None,  # [R] int64
        kv_caches: KvCaches,
        plan: CpuAttentionPlan,
    ) -> torch.Tensor:
        """Normed hidden states of all tokens, or of those that `rows` names.

        Of the others the last layer computes keys and values, which later tokens attend to, and nothing behind them.
        The residual is float32: rounded in each layer, it would lose more than all else does. Behind its columns
        stands one more, by which a row's length is never 0: the root of their number times eps.
        """
        num_tokens, width = embeddings.shape
        extended = torch.empty((num_tokens, width + 1))
        extended[:, width] = (width * self._eps) ** 0.5
        residual = extended[:, :width]
        residual.copy_(embeddings)

        def norm(weight: torch.Tensor) -> torch.Tensor:
            length = torch.linalg.vector_norm(extended, dim=1, keepdim=True)
            return torch.mul(residual, weight).div_(length).to(self._dtype)

        normed = norm(self._first_norm)
        for (layer, mlp_norm, next_norm), (cache,) in zip(self._layers, kv_caches, strict=True):
            attention = layer.attention
            heads = cpu_attention(
                attention.qkv(normed), cache, plan, self._cos_sin_cache, attention.scale,
                attention.sliding_window, attention.query_norm, attention.key_norm, self._eps,
            )  # fmt: skip
            if rows is not None and layer is self._layers[-1][0]:
                heads, extended = heads.index_select(0, rows), extended.index_select(0, rows)
                residual = extended[:, :width]
            residual.add_(attention.output(heads))
            normed = norm(mlp_norm)
            residual.add_(layer.down(silu_and_mul(layer.gate_up(normed))))
            normed = norm(next_norm)
        return normed
