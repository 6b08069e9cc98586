"""One rank's share of each weight, and the way a checkpoint's tensors reach it."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Protocol, runtime_checkable

import torch
from text_generation_kernels.int4_linear import GroupedWeight
from torch import nn


class CheckpointTensor(Protocol):
    """A tensor in a checkpoint, of which only the part asked for is read."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def copy_to(self, destination: torch.Tensor, rows: slice, columns: slice | None = None) -> None:
        """Bring rows `rows`, of those the columns `columns`, there; they may arrive when all else has been loaded."""


@runtime_checkable
class QuantisedTensor(CheckpointTensor, Protocol):
    """A tensor whose checkpoint may hold it in 4 or 8 bits."""

    def read_groups(self, rows: slice, columns: slice | None = None) -> GroupedWeight | None:
        """The part as it is stored; None where it is stored otherwise, or the columns cut a group."""


class WeightForm(Enum):
    """What a matrix is kept as once it is loaded."""

    PLAIN = "as it is read; on any device"
    PACKED = "in the order of oneDNN's products; on a CPU"
    QUANTISED = "packed, and beside it the 4 or 8 bits of a file that has those, for products of few rows; on a CPU"


@dataclass(frozen=True)
class WeightTarget:
    """Where one checkpoint tensor goes."""

    parameter: nn.Parameter
    shape: tuple[int, ...]  # of the whole tensor, before it is split
    load: Callable[[CheckpointTensor], None]


@dataclass(frozen=True)
class Partition:
    """Which rank of how many this is, and what its tensors are made of."""

    rank: int
    world_size: int
    dtype: torch.dtype
    device: torch.device
    form: WeightForm = WeightForm.PLAIN

    def share(self, size: int) -> int:
        """How much of a dimension each rank holds."""
        assert size % self.world_size == 0, "ModelConfig.check_divisible has refused this"
        return size // self.world_size

    def rows(self, size: int) -> slice:
        """This rank's range of a dimension."""
        share = self.share(size)
        return slice(self.rank * share, (self.rank + 1) * share)

    def parameter(self, *shape: int) -> nn.Parameter:
        """An unfilled parameter."""
        return nn.Parameter(torch.empty(shape, dtype=self.dtype, device=self.device), requires_grad=False)

    def whole(self, parameter: nn.Parameter) -> WeightTarget:
        """The target of a parameter that every rank holds in full."""

        def load(tensor: CheckpointTensor) -> None:
            tensor.copy_to(parameter, slice(0, tensor.shape[0]))

        return WeightTarget(parameter, tuple(parameter.shape), load)
