"""Linear layers split over the ranks by output (column parallel) or by input (row parallel)."""

from collections.abc import Sequence
from functools import partial

import torch
from text_generation_kernels.skinny_matmul import ScaledRows
from torch import nn

from text_generation_shard import distributed
from text_generation_shard.layers.cpu_linear import CpuLinear
from text_generation_shard.layers.norm import RMSNorm
from text_generation_shard.layers.partition import CheckpointTensor, Partition, WeightTarget
from text_generation_shard.layers.product_weight import ProductWeight


class ColumnParallelLinear(nn.Module):
    """Several checkpoint matrices packed into one product; of each, this rank holds its share of the rows."""

    def __init__(self, input_size: int, output_sizes: Sequence[int], has_bias: bool, partition: Partition) -> None:
        super().__init__()
        self.partition = partition
        self.input_size = input_size
        self.output_sizes = tuple(output_sizes)
        self.shares = [partition.share(size) for size in output_sizes]
        self.weight = partition.parameter(sum(self.shares), input_size)
        self.product = ProductWeight(self.weight, partition.form)
        self.bias = partition.parameter(sum(self.shares)) if has_bias else None

    def forward(self, x: torch.Tensor | ScaledRows) -> torch.Tensor:
        """This rank's outputs of all packed matrices, one after another."""  # [T, input] -> [T, sum(shares)]
        return self.product.linear(x, self.bias)

    def on_cpu(self) -> CpuLinear:
        """What a CpuDecoder takes of it, once the weights are loaded."""
        return self.product.on_cpu(self.bias)

    def targets(self, names: Sequence[str]) -> dict[str, WeightTarget]:
        """Targets of the packed checkpoint matrices, named without `.weight`, in packing order."""
        assert len(names) == len(self.output_sizes)
        targets = {}
        for part, name in enumerate(names):
            start, size = sum(self.shares[:part]), self.output_sizes[part]
            own, rows = slice(start, start + self.shares[part]), self.partition.rows(size)
            load = partial(self.product.load, own=own, rows=rows)
            targets[f"{name}.weight"] = WeightTarget(self.weight, (size, self.input_size), load)
            if self.bias is not None:
                targets[f"{name}.bias"] = WeightTarget(self.bias, (size,), partial(_load, self.bias[own], rows))
        return targets


class RowParallelLinear(nn.Module):
    """A matrix of which this rank holds its share of the columns; the ranks' partial products are summed."""

    def __init__(self, input_size: int, output_size: int, has_bias: bool, partition: Partition) -> None:
        super().__init__()
        self.partition = partition
        self.input_size = input_size
        self.output_size = output_size
        self.weight = partition.parameter(output_size, partition.share(input_size))
        self.product = ProductWeight(self.weight, partition.form)
        self.bias = partition.parameter(output_size) if has_bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The whole output, on every rank."""  # [T, input / world_size] -> [T, output]
        if self.partition.world_size == 1:
            return self.product.linear(x, self.bias)
        output = distributed.all_reduce(self.product.linear(x))
        return output if self.bias is None else output + self.bias

    def on_cpu(self) -> CpuLinear:
        """What a CpuDecoder takes of it, once the weights are loaded: products to be summed, one with the bias."""
        return self.product.on_cpu(self.bias if self.partition.rank == 0 else None)

    def add_norm(
        self, x: torch.Tensor, residual: torch.Tensor, norm: RMSNorm
    ) -> tuple[torch.Tensor | ScaledRows, torch.Tensor]:
        """The norm of output plus residual, and their sum.

        Few rows of bfloat16 leave the norm's division to the next product; float16 could not hold what is divided.
        """
        if self.partition.world_size == 1 and x.dtype == torch.bfloat16 and self.product.is_skinny(x):
            return self.product.linear_add_norm(x, self.bias, residual, norm.weight, norm.eps)
        return norm.add(self(x), residual)

    def targets(self, name: str) -> dict[str, WeightTarget]:
        """Targets of the checkpoint matrix `name` (without `.weight`)."""
        whole, columns = slice(0, self.output_size), self.partition.rows(self.input_size)
        load = partial(self.product.load, own=whole, rows=whole, columns=columns)
        targets = {f"{name}.weight": WeightTarget(self.weight, (self.output_size, self.input_size), load)}
        if self.bias is not None:
            targets[f"{name}.bias"] = self.partition.whole(self.bias)
        return targets


def _load(destination: torch.Tensor, rows: slice, tensor: CheckpointTensor) -> None:
    tensor.copy_to(destination, rows)
