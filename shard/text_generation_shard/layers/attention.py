"""Self-attention over paged KV memory: projections, rotary embedding, the cache, the output product."""

import torch
from text_generation_kernels.paged_attention import paged_attention
from text_generation_kernels.rotary_kv_write import rotary_kv_write
from text_generation_kernels.skinny_matmul import ScaledRows
from torch import nn

from text_generation_shard.forward_context import KernelAttentionPlan, get_forward_context
from text_generation_shard.layers.linear import ColumnParallelLinear, RowParallelLinear
from text_generation_shard.layers.norm import RMSNorm
from text_generation_shard.layers.partition import Partition, WeightTarget
from text_generation_shard.layers.rotary import RotaryEmbedding
from text_generation_shard.model_config import ModelConfig


class Attention(nn.Module):
    """This rank's heads of one layer."""

    def __init__(self, config: ModelConfig, layer: int, rotary: RotaryEmbedding, partition: Partition) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.num_heads = partition.share(config.num_heads)
        self.num_kv_heads = partition.share(config.num_kv_heads)
        self.scale = config.head_dim**-0.5
        self.sliding_window = config.sliding_windows[layer]
        query_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.qkv = ColumnParallelLinear(
            config.hidden_size, (query_size, kv_size, kv_size), config.has_qkv_bias, partition
        )
        self.output = RowParallelLinear(query_size, config.hidden_size, config.has_output_bias, partition)
        self.norm_eps = config.rms_norm_eps
        self.query_norm = RMSNorm(config.head_dim, config.rms_norm_eps, partition) if config.has_qk_norm else None
        self.key_norm = RMSNorm(config.head_dim, config.rms_norm_eps, partition) if config.has_qk_norm else None
        self.rotary = rotary

    def forward(
        self, x: torch.Tensor | ScaledRows, positions: torch.Tensor, residual: torch.Tensor, next_norm: RMSNorm
    ) -> tuple[torch.Tensor | ScaledRows, torch.Tensor]:
        """Write this step's keys and values, attend to all of the sequence's; add the residual and norm the sum."""
        context = get_forward_context()
        key_cache, value_cache = context.kv_caches[self.layer]
        plan = context.plan
        assert isinstance(plan, KernelAttentionPlan), "a CPU's steps go through CpuDecoder"
        query_norm, key_norm = self.head_norms()
        query = rotary_kv_write(
            self.qkv(x), positions, self.rotary.cos_sin_cache, key_cache, value_cache, plan.slot_mapping,
            query_norm, key_norm, self.norm_eps,
        )  # fmt: skip
        heads = paged_attention(
            query, key_cache, value_cache, plan.block_tables, plan.workspaces[self.sliding_window], self.scale,
            self.sliding_window,
        )  # fmt: skip
        return self.output.add_norm(heads.flatten(1), residual, next_norm)

    def head_norms(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Weights of the queries' and of the keys' norm, in models that have them."""  # [head_dim]
        if self.query_norm is None or self.key_norm is None:
            return None, None
        return self.query_norm.weight, self.key_norm.weight

    def targets(self, name: str) -> dict[str, WeightTarget]:
        """Targets of the checkpoint's tensors under `name`."""
        targets = self.qkv.targets([f"{name}.q_proj", f"{name}.k_proj", f"{name}.v_proj"])
        targets |= self.output.targets(f"{name}.o_proj")
        if self.query_norm is not None and self.key_norm is not None:
            targets |= self.query_norm.targets(f"{name}.q_norm") | self.key_norm.targets(f"{name}.k_norm")
        return targets
