"""Products of a few rows with 4-bit and 8-bit weights on a CPU, by torch's own kernel for 4 bits.

It takes bfloat16 activations; with others it is 25 times slower. Activations of another type are rounded on the way
in, and the products widened on the way out. An 8-bit code is 16 times its upper half plus its lower one: two weights
of 4 bits, multiplied with the same activations.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

GROUP_SIZE = 32
# torch wants the outputs in tiles of 16.
_OUTPUT_TILE = 16


@dataclass(frozen=True)
class GroupedWeight:
    """A weight as quantised files keep it: in each group of a row, code * scale + minimum."""

    codes: torch.Tensor  # [N, K] uint8 of 0 to 15, or int8
    scales: torch.Tensor  # [N, K / GROUP_SIZE] float32
    minimums: torch.Tensor | None  # [N, K / GROUP_SIZE] float32; None: 0

    def __post_init__(self) -> None:
        num_rows, num_columns = self.codes.shape
        assert num_columns % GROUP_SIZE == 0
        assert self.scales.shape == (num_rows, num_columns // GROUP_SIZE)
        assert self.minimums is None or self.minimums.shape == self.scales.shape

    def values(self) -> torch.Tensor:
        """The numbers the weight stands for."""  # [N, K] float32
        groups = self.codes.view(*self.scales.shape, GROUP_SIZE).float().mul_(self.scales.unsqueeze(2))
        if self.minimums is not None:
            groups.add_(self.minimums.unsqueeze(2))
        return groups.flatten(1)


class Int4Weight(NamedTuple):
    """4-bit codes in the order of torch's kernel; groups keep their scales and minimums, rounded to bfloat16."""

    codes: torch.Tensor  # [N, K / 2] uint8; K is doubled if has_halves
    group_size: int  # GROUP_SIZE, which TorchScript does not find by itself
    scales_and_zeros: torch.Tensor  # [K / group_size, N, 2] bfloat16; a weight is (code - 8) * scale + zero
    has_halves: bool  # the first K / 2 columns are upper halves of 8-bit codes, the others their lower halves


def pack_int4(parts: Sequence[GroupedWeight]) -> Int4Weight | None:
    """The parts, one below the other, as one weight; None where torch has no fast product with it.

    All parts have 4-bit codes, or all have 8-bit ones.
    """
    num_rows = sum(len(part.codes) for part in parts)
    is_fast = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    if not is_fast or num_rows % _OUTPUT_TILE or len({part.codes.dtype for part in parts}) > 1:
        return None
    has_halves = parts[0].codes.dtype == torch.int8
    if has_halves:
        parts = [_in_halves(part) for part in parts]
    codes = torch.cat([part.codes for part in parts]).int()
    scales = torch.cat([part.scales for part in parts])
    minimums = torch.cat([part.scales * 0 if part.minimums is None else part.minimums for part in parts])
    # torch's codes are signed: what is added to them is the value of code 8.
    zeros = minimums + 8 * scales
    return Int4Weight(
        torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1),
        GROUP_SIZE,
        torch.stack((scales.T, zeros.T), dim=2).bfloat16().contiguous(),
        has_halves,
    )


def _in_halves(weight: GroupedWeight) -> GroupedWeight:
    """8-bit codes as 4-bit ones: a matrix of the upper halves, and the lower halves' beside it."""
    assert weight.minimums is None
    upper, lower = (weight.codes >> 4) + 8, weight.codes & 0x0F
    return GroupedWeight(
        torch.cat((upper, lower), dim=1).to(torch.uint8),
        torch.cat((weight.scales * 16, weight.scales), dim=1),
        torch.cat((weight.scales * -128, torch.zeros_like(weight.scales)), dim=1),
    )


def int4_linear(x: torch.Tensor, weight: Int4Weight) -> torch.Tensor:
    """x times the transposed weight."""  # [M, K] -> [M, N]
    rounded = x.to(torch.bfloat16)
    if weight.has_halves:
        rounded = torch.cat((rounded, rounded), dim=1)
    product: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
        rounded, weight.codes, weight.group_size, weight.scales_and_zeros
    )
    return product.to(x.dtype)
