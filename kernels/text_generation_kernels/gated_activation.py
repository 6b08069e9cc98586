"""silu or gelu of one half of a row, times the other half: what stands between an MLP's two products."""

from typing import Literal

import torch
import triton
import triton.language as tl

from text_generation_kernels import reference, reference_fused
from text_generation_kernels.dispatch import early_launch, runs_kernel, wait_for_inputs
from text_generation_kernels.launch_settings import launch_settings

Activation = Literal["silu", "gelu", "gelu_tanh"]


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """silu of the first half of the last dimension, times the second half."""  # [T, 2 * I] -> [T, I]
    return gated_activation(x, "silu")


def gated_activation(x: torch.Tensor, activation: Activation) -> torch.Tensor:
    """The activation of the first half of the last dimension, times the second half."""  # [T, 2 * I] -> [T, I]
    if not runs_kernel(x):
        if activation == "silu":
            return reference.silu_and_mul(x)
        return reference_fused.gelu_and_mul(x, "tanh" if activation == "gelu_tanh" else "none")
    num_rows, doubled = x.shape
    assert doubled % 2 == 0
    assert x.stride(1) == 1
    width = doubled // 2
    output = torch.empty(num_rows, width, dtype=x.dtype, device=x.device)
    settings = launch_settings("gated_activation", x.device)
    # Blocks are the first axis: a launch has room for 2**31 programs there, 65 535 on the second.
    num_blocks = triton.cdiv(width, settings["BLOCK"])
    if num_rows:
        gated_activation_kernel[(num_rows * num_blocks,)](
            x, output, x.stride(0), num_blocks, WIDTH=width, ACTIVATION=activation, **early_launch(x.device), **settings
        )
    return output


@triton.jit
def activate(gate, ACTIVATION: tl.constexpr):
    """silu, gelu or gelu_tanh of float32 values."""
    if ACTIVATION == "silu":
        return gate * tl.sigmoid(gate)
    if ACTIVATION == "gelu":
        return 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    # tanh(y) is 2 * sigmoid(2 * y) - 1.
    return gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))


@triton.jit
def gated_activation_kernel(
    x, output, x_stride, num_blocks, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ACTIVATION: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(EARLY)
    row = (tl.program_id(0) // num_blocks).to(tl.int64)
    columns = (tl.program_id(0) % num_blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < WIDTH
    gate = tl.load(x + row * x_stride + columns, mask, other=0.0)
    up = tl.load(x + row * x_stride + WIDTH + columns, mask, other=0.0)
    dtype = gate.dtype
    # Rounded between the two operations, as two operations would.
    active = activate(gate.to(tl.float32), ACTIVATION).to(dtype)
    product = active.to(tl.float32) * up.to(tl.float32)
    tl.store(output + row * WIDTH + columns, product.to(dtype), mask)
