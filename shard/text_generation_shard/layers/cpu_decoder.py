"""The decoder's layers on a CPU, in one loop that names every operation.

One row's operations take a few microseconds each, and as much goes into Python between them and into finding what they
need by way of modules. So that is found once, after the weights are loaded, and TorchScript runs the loop.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from text_generation_kernels.cpu_attention import StepSequences, StepTokens, cpu_attention
from text_generation_kernels.cpu_attention_plan import CpuAttentionPlan
from text_generation_kernels.reference import silu_and_mul
from text_generation_kernels.torch_script import outside_script, scripted
from torch import nn

from text_generation_shard import distributed
from text_generation_shard.kv_cache import KvCaches
from text_generation_shard.layers.cpu_linear import CpuLinear, cpu_linear


class CpuLayer(NamedTuple):
    """What a forward pass needs of a layer."""

    attention_norm: torch.Tensor  # [hidden]
    qkv: CpuLinear
    query_norm: torch.Tensor | None  # [head_dim]
    key_norm: torch.Tensor | None  # [head_dim]
    scale: float
    output: CpuLinear
    mlp_norm: torch.Tensor  # [hidden]
    gate_up: CpuLinear
    down: CpuLinear


class CpuDecoder:
    """All layers and the norm behind them."""

    def __init__(
        self,
        layers: Sequence[CpuLayer],
        norm: torch.Tensor,  # [hidden]
        eps: float,
        cos_sin_cache: torch.Tensor,  # [max_positions, rotary_dim] float32
        sliding_windows: Sequence[int | None],  # of each layer
    ) -> None:
        self._sliding_windows = list(dict.fromkeys(sliding_windows))
        self._cos_sin_cache = cos_sin_cache
        windows = [self._sliding_windows.index(window) for window in sliding_windows]
        self._num_layers = len(layers)
        self._layers = scripted(_CpuLayers(list(layers), norm, eps, windows))

    def run(
        self,
        embeddings: torch.Tensor,  # [T, hidden]
        rows: torch.Tensor | None,  # [R] int64
        kv_caches: KvCaches,
        plan: CpuAttentionPlan,
    ) -> torch.Tensor:
        """Normed hidden states of all tokens, or of those that `rows` names."""
        assert len(kv_caches) == self._num_layers
        sequences = [plan.sequences(window) for window in self._sliding_windows]
        caches = [cache for (cache,) in kv_caches]
        return self._layers(embeddings, rows, caches, plan.tokens(self._cos_sin_cache), sequences)


class _CpuLayers(nn.Module):
    layers: list[CpuLayer]
    norms: list[torch.Tensor]
    windows: list[int]

    def __init__(self, layers: list[CpuLayer], norm: torch.Tensor, eps: float, windows: list[int]) -> None:
        super().__init__()
        norms = [weight for layer in layers for weight in (layer.attention_norm, layer.mlp_norm)]
        self.norms = [weight.float() * len(weight) ** 0.5 for weight in (*norms, norm)]
        self.layers = layers
        self.windows = windows
        self.dtype = norm.dtype
        self.eps = eps
        self.is_split = distributed.world_size() > 1

    def forward(
        self,
        embeddings: torch.Tensor,  # [T, hidden]
        rows: torch.Tensor | None,  # [R] int64
        caches: list[torch.Tensor],
        tokens: StepTokens,
        sequences: list[StepSequences],  # of each sliding window that layers have
    ) -> torch.Tensor:
        """Normed hidden states of all tokens, or of those that `rows` names.

        Of the others the last layer computes keys and values, which later tokens attend to, and nothing behind them.
        The residual is float32: rounded in each layer, it would lose more than all else does. Behind its columns
        stands one more, by which a row's length is never 0: the root of their number times eps.
        """
        num_tokens, width = embeddings.shape
        extended = torch.empty((num_tokens, width + 1), dtype=torch.float32)
        extended[:, width] = (width * self.eps) ** 0.5
        residual = extended[:, :width]
        residual.copy_(embeddings)
        normed = self._norm(extended, residual, self.norms[0])
        for index, layer in enumerate(self.layers):
            heads = cpu_attention(
                cpu_linear(normed, layer.qkv), caches[index], tokens, sequences[self.windows[index]], layer.scale,
                layer.query_norm, layer.key_norm, self.eps,
            )  # fmt: skip
            if rows is not None and index == len(self.layers) - 1:
                heads, extended = heads.index_select(0, rows), extended.index_select(0, rows)
                residual = extended[:, :width]
            residual.add_(self._sum(cpu_linear(heads, layer.output)))
            normed = self._norm(extended, residual, self.norms[2 * index + 1])
            residual.add_(self._sum(cpu_linear(silu_and_mul(cpu_linear(normed, layer.gate_up)), layer.down)))
            normed = self._norm(extended, residual, self.norms[2 * index + 2])
        return normed

    def _norm(self, extended: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        length = torch.linalg.vector_norm(extended, dim=1, keepdim=True)
        return torch.mul(residual, weight).div_(length).to(self.dtype)

    def _sum(self, partial: torch.Tensor) -> torch.Tensor:
        """Of the ranks' products."""
        return self._sum_over_ranks(partial) if self.is_split else partial

    @outside_script
    def _sum_over_ranks(self, partial: torch.Tensor) -> torch.Tensor:
        return distributed.all_reduce(partial)
