"""Root-mean-square norm, alone and after adding the residual. One program per row, which stays in registers."""

import torch
import triton
import triton.language as tl

from text_generation_kernels.dispatch import early_launch, runs_kernel, wait_for_inputs
from text_generation_kernels.launch_settings import launch_settings

LARGEST_ROW = 32768


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """The normed rows of `x`."""  # [T, hidden], [hidden] -> [T, hidden]
    if not runs_kernel(x):
        return rms_norm_on_cpu(x, weight, eps)
    normed = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, None, weight, normed, None, eps)
    return normed


def add_rms_norm(
    x: torch.Tensor,  # [T, hidden]
    residual: torch.Tensor,  # [T, hidden]
    weight: torch.Tensor,  # [hidden]
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The normed sum of both and the sum itself, which is the new residual; on a CPU it is float32."""
    if not runs_kernel(x):
        total = residual.float() + x
        return rms_norm_on_cpu(total, weight, eps), total
    assert x.shape == residual.shape
    assert x.dtype == residual.dtype
    normed = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = torch.empty_like(normed)
    _launch(x, residual, weight, normed, total, eps)
    return normed, total


def rms_norm_on_cpu(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`rms_norm` of a CPU tensor: the root in float32, the result in the weight's type."""
    wide = x.float()
    length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    scale: torch.Tensor = (length.square() / x.shape[-1] + eps).rsqrt_()
    return (wide * scale).to(weight.dtype).mul_(weight)


def _launch(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    normed: torch.Tensor,
    total: torch.Tensor | None,
    eps: float,
) -> None:
    num_rows, hidden = x.shape
    assert weight.shape == (hidden,)
    assert hidden <= LARGEST_ROW
    assert x.stride(1) == 1
    assert residual is None or residual.stride(1) == 1
    if num_rows == 0:
        return
    block = triton.next_power_of_2(hidden)
    settings = launch_settings("rms_norm", x.device, "few_rows" if num_rows <= 256 else "")
    # A warp takes at least one 16-byte load of 2-byte values for each of its lanes.
    settings = settings | {"num_warps": max(1, min(settings["num_warps"], block // 256))}
    rms_norm_kernel[(num_rows,)](
        x, residual, weight, normed, total, x.stride(0), 0 if residual is None else residual.stride(0), eps,
        HIDDEN=hidden, BLOCK=block, **early_launch(x.device), **settings,
    )  # fmt: skip


@triton.jit
def rms_norm_kernel(
    x, residual, weight, normed, total, x_stride, residual_stride, eps, HIDDEN: tl.constexpr, BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(EARLY)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < HIDDEN
    values = tl.load(x + row * x_stride + columns, mask, other=0.0)
    dtype = values.dtype
    if residual is not None:
        added = tl.load(residual + row * residual_stride + columns, mask, other=0.0)
        values = (values.to(tl.float32) + added.to(tl.float32)).to(dtype)
        tl.store(total + row * HIDDEN + columns, values, mask)
    # Asked for before the row's sum is known: one wait for memory, not two.
    scales = tl.load(weight + columns, mask, other=0.0)
    wide = values.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / HIDDEN + eps)
    rounded = (wide * scale).to(dtype).to(tl.float32)
    tl.store(normed + row * HIDDEN + columns, (rounded * scales.to(tl.float32)).to(dtype), mask)
