"""The gated MLP: gate and up in one product, silu, then down."""

import torch
from text_generation_kernels.skinny_matmul import ScaledRows
from torch import nn

from text_generation_shard.layers.linear import ColumnParallelLinear, RowParallelLinear
from text_generation_shard.layers.norm import RMSNorm
from text_generation_shard.layers.partition import Partition, WeightTarget
from text_generation_shard.model_config import ModelConfig


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig, partition: Partition) -> None:
        super().__init__()
        hidden, intermediate = config.hidden_size, config.intermediate_size
        self.gate_up = ColumnParallelLinear(hidden, (intermediate, intermediate), config.has_mlp_bias, partition)
        self.down = RowParallelLinear(intermediate, hidden, config.has_mlp_bias, partition)

    def forward(
        self, x: torch.Tensor | ScaledRows, residual: torch.Tensor, next_norm: RMSNorm
    ) -> tuple[torch.Tensor | ScaledRows, torch.Tensor]:
        """The MLP's output with the residual added, normed, and the sum itself."""
        return self.down.add_norm(self.gate_up.product.gated_linear(x, self.gate_up.bias), residual, next_norm)

    def targets(self, name: str) -> dict[str, WeightTarget]:
        """Targets of the checkpoint's matrices under `name`."""
        packed = self.gate_up.targets([f"{name}.gate_proj", f"{name}.up_proj"])
        return packed | self.down.targets(f"{name}.down_proj")
