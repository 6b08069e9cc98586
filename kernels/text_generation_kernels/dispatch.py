"""Which tensors a Triton kernel can take, and what a wrapper must know of the device."""

import functools

import torch
import triton

# Set when Triton was imported with TRITON_INTERPRET=1: kernels then run, slowly, on CPU tensors.
INTERPRETS = bool(triton.knobs.runtime.interpret)


def runs_kernel(tensor: torch.Tensor) -> bool:
    """Whether operations on `tensor` go to the kernel; otherwise they go to the reference."""
    return tensor.is_cuda or INTERPRETS


@functools.cache
def num_multiprocessors(device: torch.device) -> int:
    """How many programs of the largest size run at once."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@functools.cache
def zeroed_counters(device: torch.device, num_counters: int) -> torch.Tensor:
    """Counters that every kernel leaves at zero; kernels that use them run one after another, on one stream.

    Made once, before the first graph that uses them is captured, and never freed.
    """
    return torch.zeros(num_counters, dtype=torch.int32, device=device)
