"""Products of a few rows with a large weight, as in decoding: the time is that of reading the weight once.

Rows are padded to a power of two; each program takes a tile of the output.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from text_generation_kernels import reference_fused
from text_generation_kernels.dispatch import INTERPRETS, runs_kernel
from text_generation_kernels.gpu import gpu_of
from text_generation_kernels.launch_settings import launch_settings

MAX_ROWS = 64  # from more rows on cuBLAS is the faster one
LEAST_ROWS = 16  # of one tensor-core instruction
SMALL_WIDTH = 4096  # up to here an output needs small tiles to keep every multiprocessor reading


def is_skinny(x: torch.Tensor) -> bool:
    """Whether products with these rows come here rather than to cuBLAS, which is the faster one from more rows on."""
    return gpu_of(x.device) is not None and x.shape[0] <= MAX_ROWS and x.dtype != torch.float32


def skinny_linear(
    x: torch.Tensor,  # [M, K], M at most MAX_ROWS
    weight: torch.Tensor,  # [N, K]
    bias: torch.Tensor | None = None,  # [N]
) -> torch.Tensor:
    """x times the transposed weight, plus the bias."""  # [M, N]
    if not runs_kernel(x):
        return F.linear(x, weight, bias)
    assert bias is None or bias.shape == (weight.shape[0],)
    return _launch("skinny_matmul", x, weight, bias, weight.shape[0])


def skinny_gated_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """silu of the product with the weight's first half of rows, times the product with its second half."""
    if not runs_kernel(x):
        return reference_fused.gated_linear(x, weight)
    assert weight.shape[0] % 2 == 0
    return _launch("skinny_matmul_gated", x, weight, None, weight.shape[0] // 2)


def settings_shape(padded_rows: int, width: int) -> str:
    """The word in the launch table for a product of so many rows with an output so wide."""
    return f"{'small' if width <= SMALL_WIDTH else 'large'}{padded_rows}"


def _launch(
    operation: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, width: int
) -> torch.Tensor:
    num_rows, depth = x.shape
    assert num_rows <= MAX_ROWS
    assert weight.shape[1] == depth
    assert weight.is_contiguous()
    assert x.stride(1) == 1
    padded_rows = max(LEAST_ROWS, triton.next_power_of_2(num_rows))
    settings = launch_settings(operation, x.device, settings_shape(padded_rows, width))
    output = torch.empty(num_rows, width, dtype=x.dtype, device=x.device)
    if num_rows:
        skinny_matmul_kernel[(triton.cdiv(width, settings["BLOCK_N"]),)](
            x, weight, bias, output, num_rows, x.stride(0), WIDTH=width, DEPTH=depth, ROWS=padded_rows,
            IS_GATED=operation == "skinny_matmul_gated", WIDEN=INTERPRETS, **settings,
        )  # fmt: skip
    return output


@triton.jit(do_not_specialize=["num_rows"])
def skinny_matmul_kernel(
    x, weight, bias, output, num_rows, x_stride,
    WIDTH: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr, IS_GATED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    WIDEN: tl.constexpr,  # products in float32: Triton's interpreter multiplies the bit patterns of bfloat16
):  # fmt: skip
    rows, columns = tl.arange(0, ROWS), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_column = columns < WIDTH
    depths = tl.arange(0, BLOCK_K)
    inputs = x + rows[:, None] * x_stride + depths[None, :]
    weights = weight + columns.to(tl.int64)[:, None] * DEPTH + depths[None, :]
    first = tl.zeros((ROWS, BLOCK_N), tl.float32)
    second = tl.zeros((ROWS, BLOCK_N), tl.float32)
    for offset in range(0, DEPTH, BLOCK_K):
        row_mask, mask = (rows < num_rows)[:, None], is_column[:, None]
        if DEPTH % BLOCK_K != 0:
            row_mask = row_mask & (depths < DEPTH - offset)[None, :]
            mask = mask & (depths < DEPTH - offset)[None, :]
        values = tl.load(inputs + offset, row_mask, other=0.0)
        block = tl.load(weights + offset, mask, other=0.0)
        first = _product(values, block, first, WIDEN)
        if IS_GATED:
            other = tl.load(weights + WIDTH * DEPTH + offset, mask, other=0.0)
            second = _product(values, other, second, WIDEN)
    places = rows[:, None] * WIDTH + columns[None, :]
    mask = (rows < num_rows)[:, None] & is_column[None, :]
    dtype = output.dtype.element_ty
    if bias is not None:
        first += tl.load(bias + columns, is_column, other=0.0).to(tl.float32)[None, :]
    # Rounded wherever separate operations would round.
    result = first.to(dtype)
    if IS_GATED:
        gate = result.to(tl.float32)
        active = (gate * tl.sigmoid(gate)).to(dtype).to(tl.float32)
        result = (active * second.to(dtype).to(tl.float32)).to(dtype)
    tl.store(output + places, result, mask)


@triton.jit
def _product(values, block, total, WIDEN: tl.constexpr):
    if WIDEN:
        values, block = values.to(tl.float32), block.to(tl.float32)
    return tl.dot(values, tl.trans(block), total, input_precision="ieee")
