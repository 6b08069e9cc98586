"""Products of a few rows with a large weight, as in decoding: the time is that of reading the weight once.

Rows are padded to a power of two. A norm between two of them needs no kernel: the first product adds the residual,
scales each column by the norm's weight and leaves sums of squares; the second divides by each row's root mean square.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from text_generation_kernels import reference_fused
from text_generation_kernels.dispatch import INTERPRETS, runs_kernel
from text_generation_kernels.launch_settings import Settings, launch_settings

MAX_ROWS = 64  # from more rows on cuBLAS is the faster one
LEAST_ROWS = 16  # of one tensor-core instruction
SMALL_WIDTH = 4096  # up to here an output needs small tiles to keep every multiprocessor reading
# Sums of squares read at once.
_SUMS_BLOCK = 32


class ScaledRows(NamedTuple):
    """Rows of a root-mean-square norm that are still to be divided by their root mean square."""

    rows: torch.Tensor  # [M, K]: times the norm's weight
    square_sums: torch.Tensor  # [M, parts] float32: of parts of each row, before the norm's weight
    eps: float


def is_skinny(x: torch.Tensor) -> bool:
    """Whether products with these rows come here rather than to cuBLAS, which is the faster one from more rows on."""
    return runs_kernel(x) and x.shape[0] <= MAX_ROWS and x.dtype != torch.float32


def skinny_linear(
    x: torch.Tensor | ScaledRows,  # [M, K], M at most MAX_ROWS
    weight: torch.Tensor,  # [N, K]
    bias: torch.Tensor | None = None,  # [N]
) -> torch.Tensor:
    """x times the transposed weight, plus the bias."""  # [M, N]
    rows = x.rows if isinstance(x, ScaledRows) else x
    if not runs_kernel(rows):
        return reference_fused.linear(rows, weight, bias, _factor(x))
    output = rows.new_empty(rows.shape[0], weight.shape[0])
    _launch("skinny_matmul", x, weight, output, bias=bias)
    return output


def skinny_gated_linear(x: torch.Tensor | ScaledRows, weight: torch.Tensor) -> torch.Tensor:
    """silu of the product with the weight's first half of rows, times the product with its second half."""
    rows = x.rows if isinstance(x, ScaledRows) else x
    if not runs_kernel(rows):
        return reference_fused.gated_linear(rows, weight, _factor(x))
    assert weight.shape[0] % 2 == 0
    output = rows.new_empty(rows.shape[0], weight.shape[0] // 2)
    _launch("skinny_matmul_gated", x, weight, output)
    return output


def skinny_linear_add_norm(
    x: torch.Tensor,  # [M, K]
    weight: torch.Tensor,  # [N, K]
    bias: torch.Tensor | None,  # [N]
    residual: torch.Tensor,  # [M, N]
    norm_weight: torch.Tensor,  # [N]
    eps: float,
) -> tuple[ScaledRows, torch.Tensor]:
    """The product plus bias, rounded, plus the residual: the norm of that sum but for its division, and the sum."""
    if not runs_kernel(x):
        scaled, square_sums, total = reference_fused.linear_add_norm(x, weight, bias, residual, norm_weight)
        return ScaledRows(scaled, square_sums, eps), total
    num_rows, width = residual.shape
    assert (num_rows, width) == (x.shape[0], weight.shape[0])
    assert residual.stride(1) == 1
    assert norm_weight.shape == (width,)
    total, scaled = torch.empty_like(residual, memory_format=torch.contiguous_format), x.new_empty(num_rows, width)
    settings = _settings("skinny_matmul", x, width)
    num_parts = triton.cdiv(width, settings["BLOCK_N"])
    square_sums = torch.empty(num_rows, num_parts, dtype=torch.float32, device=x.device)
    _launch(
        "skinny_matmul", x, weight, total, bias=bias, residual=residual, norm_weight=norm_weight, scaled=scaled,
        square_sums=square_sums,
    )  # fmt: skip
    return ScaledRows(scaled, square_sums, eps), total


def settings_shape(padded_rows: int, width: int) -> str:
    """The word in the launch table for a product of so many rows with an output so wide."""
    return f"{'small' if width <= SMALL_WIDTH else 'large'}{padded_rows}"


def _factor(x: torch.Tensor | ScaledRows) -> torch.Tensor | None:
    """What rows of a norm are still to be multiplied with."""  # [M, 1]
    if isinstance(x, torch.Tensor):
        return None
    return torch.rsqrt(x.square_sums.sum(1, keepdim=True) / x.rows.shape[1] + x.eps)


def _padded(num_rows: int) -> int:
    return max(LEAST_ROWS, int(triton.next_power_of_2(num_rows)))


def _settings(operation: str, x: torch.Tensor, width: int) -> Settings:
    return launch_settings(operation, x.device, settings_shape(_padded(x.shape[0]), width))


def _launch(
    operation: str,
    x: torch.Tensor | ScaledRows,
    weight: torch.Tensor,
    output: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    scaled: torch.Tensor | None = None,
    square_sums: torch.Tensor | None = None,
) -> None:
    rows, row_sums, eps = x if isinstance(x, ScaledRows) else (x, None, 0.0)
    num_rows, depth = rows.shape
    width = output.shape[1]
    assert num_rows <= MAX_ROWS
    assert weight.shape[1] == depth
    assert weight.is_contiguous()
    assert rows.stride(1) == 1
    assert bias is None or bias.shape == (weight.shape[0],)
    if num_rows == 0:
        return
    settings = _settings(operation, rows, width)
    skinny_matmul_kernel[(triton.cdiv(width, settings["BLOCK_N"]),)](
        rows, row_sums, weight, bias, residual, norm_weight, output, scaled, square_sums, num_rows, rows.stride(0),
        0 if residual is None else residual.stride(0), eps,
        NUM_SUMS=0 if row_sums is None else row_sums.shape[1], SUMS_BLOCK=_SUMS_BLOCK, WIDTH=width, DEPTH=depth,
        ROWS=_padded(num_rows), IS_GATED=operation == "skinny_matmul_gated", WIDEN=INTERPRETS, **settings,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows"])
def skinny_matmul_kernel(
    x, row_sums, weight, bias, residual, norm_weight, output, scaled, square_sums, num_rows, x_stride, residual_stride,
    eps, NUM_SUMS: tl.constexpr, SUMS_BLOCK: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr,
    ROWS: tl.constexpr, IS_GATED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    WIDEN: tl.constexpr,  # products in float32: Triton's interpreter multiplies the bit patterns of bfloat16
):  # fmt: skip
    tile = tl.program_id(0)
    rows, columns = tl.arange(0, ROWS), tile * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row, is_column = rows < num_rows, columns < WIDTH
    depths = tl.arange(0, BLOCK_K)
    inputs = x + rows[:, None] * x_stride + depths[None, :]
    weights = weight + columns.to(tl.int64)[:, None] * DEPTH + depths[None, :]
    first = tl.zeros((ROWS, BLOCK_N), tl.float32)
    second = tl.zeros((ROWS, BLOCK_N), tl.float32)
    for step in range(0, (DEPTH + BLOCK_K - 1) // BLOCK_K):
        offset = step * BLOCK_K  # a loop over offsets themselves takes more registers
        row_mask, mask = is_row[:, None], is_column[:, None]
        if DEPTH % BLOCK_K != 0:
            row_mask = row_mask & (depths < DEPTH - offset)[None, :]
            mask = mask & (depths < DEPTH - offset)[None, :]
        values = tl.load(inputs + offset, row_mask, other=0.0)
        block = tl.load(weights + offset, mask, other=0.0)
        first = _product(values, block, first, WIDEN)
        if IS_GATED:
            other = tl.load(weights + WIDTH * DEPTH + offset, mask, other=0.0)
            second = _product(values, other, second, WIDEN)
    if row_sums is not None:
        scale = tl.rsqrt(_sums_of_rows(row_sums, rows, is_row, NUM_SUMS, SUMS_BLOCK) / DEPTH + eps)[:, None]
        first *= scale
        second *= scale
    dtype = output.dtype.element_ty
    if bias is not None:
        first += tl.load(bias + columns, is_column, other=0.0).to(tl.float32)[None, :]
    # Rounded wherever separate operations would round.
    result = first.to(dtype)
    mask = is_row[:, None] & is_column[None, :]
    if IS_GATED:
        gate = result.to(tl.float32)
        active = (gate * tl.sigmoid(gate)).to(dtype).to(tl.float32)
        result = (active * second.to(dtype).to(tl.float32)).to(dtype)
    if residual is not None:
        added = tl.load(residual + rows[:, None] * residual_stride + columns[None, :], mask, other=0.0)
        result = (result.to(tl.float32) + added.to(tl.float32)).to(dtype)
    places = rows[:, None] * WIDTH + columns[None, :]
    tl.store(output + places, result, mask)
    if norm_weight is not None:
        wide = result.to(tl.float32)
        scales = tl.load(norm_weight + columns, is_column, other=0.0).to(tl.float32)
        tl.store(scaled + places, (wide * scales[None, :]).to(dtype), mask)
        tl.store(square_sums + rows * tl.num_programs(0) + tile, tl.sum(wide * wide, axis=1), is_row)


@triton.jit
def _product(values, block, total, WIDEN: tl.constexpr):
    if WIDEN:
        values, block = values.to(tl.float32), block.to(tl.float32)
    return tl.dot(values, tl.trans(block), total, input_precision="ieee")


@triton.jit
def _sums_of_rows(row_sums, rows, is_row, NUM_SUMS: tl.constexpr, BLOCK: tl.constexpr):
    """Each row's sum, always added in the same order."""
    parts = tl.arange(0, BLOCK)
    total = tl.zeros(rows.shape, tl.float32)
    for start in range(0, NUM_SUMS, BLOCK):
        mask = is_row[:, None] & (parts < NUM_SUMS - start)[None, :]
        total += tl.sum(tl.load(row_sums + rows[:, None] * NUM_SUMS + start + parts[None, :], mask, other=0.0), axis=1)
    return total
