"""Which tensors a Triton kernel can take, and what a wrapper must know of the device."""

import torch
import triton
import triton.language as tl

from text_generation_kernels.gpu import gpu_of

# Set when Triton was imported with TRITON_INTERPRET=1: kernels then run, slowly, on CPU tensors.
INTERPRETS = bool(triton.knobs.runtime.interpret)

# Triton's Gluon still changes from version to version: of others than these its kernels are not used. On a GPU ran 3.6.
HAS_GLUON = (3, 6) <= tuple(int(part) for part in triton.__version__.split(".")[:2]) <= (3, 9)


def runs_kernel(tensor: torch.Tensor) -> bool:
    """Whether operations on `tensor` go to the kernel; otherwise they go to the reference."""
    return tensor.is_cuda or INTERPRETS or (tensor.is_meta and gpu_of(tensor.device) is not None)


def num_multiprocessors(device: torch.device) -> int:
    """How many programs of the largest size run at once."""
    gpu = gpu_of(device)
    return 4 if gpu is None else gpu.num_multiprocessors


def launches_early(device: torch.device) -> bool:
    """Whether a kernel may be started while the one ahead of it on the stream ends (programmatic dependent launch)."""
    gpu = gpu_of(device)
    return gpu is not None and gpu.capability >= (9, 0)


def early_launch(device: torch.device) -> dict[str, bool]:
    """Launch options of a kernel that hands its parameter EARLY to `wait_for_inputs` before it touches memory.

    Or to `start_next` and `wait_for_others`, if it may run beside the kernel ahead.
    """
    is_early = launches_early(device)
    return {"EARLY": True, "launch_pdl": True} if is_early else {"EARLY": False}


@triton.jit
def wait_for_inputs(EARLY: tl.constexpr):
    """Wait until the kernels ahead have ended and what they wrote can be read; then let the next kernel start."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def start_next(EARLY: tl.constexpr):
    """Let the next kernel start, in one that does not wait for the kernel ahead: both need only what came before.

    Neither may write what the other reads or writes. The kernel ahead has called `wait_for_inputs`, so that those
    before it had ended and written their results to the second-level cache when this one was started, and no
    first-level cache holds anything older. `wait_for_others` must follow as the last thing.
    """
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_others(EARLY: tl.constexpr):
    """Wait until the kernels ahead have ended, so that who waits for this one waits for them too."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
