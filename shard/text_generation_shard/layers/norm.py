"""Root-mean-square norm, alone or with the residual added first."""

import torch
from text_generation_kernels.rms_norm import add_rms_norm, rms_norm
from torch import nn

from text_generation_shard.layers.partition import Partition, WeightTarget


class RMSNorm(nn.Module):
    """Norm over the last dimension; every rank holds the whole weight."""

    def __init__(self, size: int, eps: float, partition: Partition) -> None:
        super().__init__()
        self.eps = eps
        self.partition = partition
        self.weight = partition.parameter(size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The normed input."""
        return rms_norm(x, self.weight, self.eps)

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The normed sum, and the sum."""
        return add_rms_norm(x, residual, self.weight, self.eps)

    def targets(self, name: str) -> dict[str, WeightTarget]:
        """Target of the checkpoint vector `name` (without `.weight`)."""
        return {f"{name}.weight": self.partition.whole(self.weight)}
