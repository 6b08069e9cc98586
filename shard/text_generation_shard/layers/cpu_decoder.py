"""The decoder's layers on a CPU, in one loop that names every operation.

One row's operations take a few microseconds each, and as much goes into finding what they need by way of modules. So
that is found once, after the weights are loaded.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from text_generation_kernels.cpu_attention import CpuAttentionPlan, cpu_attention
from text_generation_kernels.reference import silu_and_mul
from text_generation_kernels.rms_norm import rms_norm_on_cpu

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


@dataclass(frozen=True, slots=True)
class CpuDecoder:
    """All layers and the norm behind them."""

    layers: Sequence[CpuLayer]
    norm: torch.Tensor  # [hidden]
    eps: float
    cos_sin_cache: torch.Tensor  # [max_positions, rotary_dim] float32

    def run(
        self,
        embeddings: torch.Tensor,  # [T, hidden]
        rows: torch.Tensor | None,  # [R] int64
        kv_caches: KvCaches,
        plan: CpuAttentionPlan,
    ) -> torch.Tensor:
        """Normed hidden states of all tokens, or of those that `rows` names.

        Of the others the last layer computes keys and values, which later tokens attend to, and nothing behind them.
        The residual is float32: rounded in each layer, it would lose more than all else does.
        """
        residual, eps = embeddings.float(), self.eps
        normed = rms_norm_on_cpu(residual, self.layers[0].attention_norm, eps)
        next_norms = [*(layer.attention_norm for layer in self.layers[1:]), self.norm]
        for layer, (key_cache, value_cache), next_norm in zip(self.layers, kv_caches, next_norms, strict=True):
            attention = layer.attention
            heads = cpu_attention(
                attention.qkv(normed), key_cache, value_cache, plan, self.cos_sin_cache, attention.scale,
                attention.sliding_window, attention.query_norm, attention.key_norm, eps,
            )  # fmt: skip
            if rows is not None and layer is self.layers[-1]:
                heads, residual = heads.index_select(0, rows), residual.index_select(0, rows)
            residual = residual.add_(attention.output(heads))
            normed = rms_norm_on_cpu(residual, layer.mlp_norm, eps)
            residual = residual.add_(layer.down(silu_and_mul(layer.gate_up(normed))))
            normed = rms_norm_on_cpu(residual, next_norm, eps)
        return normed
