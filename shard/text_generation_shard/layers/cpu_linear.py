"""A linear layer on a CPU: its weight in each form that a product takes, in a form that TorchScript takes."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from text_generation_kernels.int4_linear import Int4Weight, int4_linear
from text_generation_kernels.packed_linear import packed_linear


class CpuLinear(NamedTuple):
    """What a product takes of a weight, [N, K]; the forms that it does not have are None."""

    packed: torch.Tensor | None  # as oneDNN keeps it
    int4: Int4Weight | None
    max_int4_rows: int  # the most rows that it multiplies
    plain: torch.Tensor
    bias: torch.Tensor | None  # [N]


def cpu_linear(x: torch.Tensor, linear: CpuLinear) -> torch.Tensor:
    """x times the transposed weight, plus the bias."""  # [M, K] -> [M, N]
    packed, int4, bias = linear.packed, linear.int4, linear.bias
    if int4 is not None and x.shape[0] <= linear.max_int4_rows:
        product = int4_linear(x, int4)
        return product if bias is None else product.add_(bias)
    if packed is not None:
        return packed_linear(x, packed, bias)
    return F.linear(x, linear.plain, bias)
