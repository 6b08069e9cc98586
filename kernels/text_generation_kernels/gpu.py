"""What launches must know of the GPU they run on, or are compiled for where they cannot run."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Gpu:
    """The facts that launches depend on."""

    name: str
    capability: tuple[int, int]
    num_multiprocessors: int


_assumed: Gpu | None = None


def gpu_of(device: torch.device) -> Gpu | None:
    """The device's GPU; of tensors without memory ("meta") the assumed one. None where Triton interprets."""
    if device.type == "cuda":
        return _real_gpu(device)
    return _assumed if device.type == "meta" else None


@functools.cache
def _real_gpu(device: torch.device) -> Gpu:
    properties = torch.cuda.get_device_properties(device)
    return Gpu(properties.name, (properties.major, properties.minor), properties.multi_processor_count)


@contextmanager
def assumed_gpu(gpu: Gpu) -> Iterator[None]:
    """Inside, operations on tensors without memory launch the kernels that they would launch on this GPU."""
    global _assumed
    before, _assumed = _assumed, gpu
    try:
        yield
    finally:
        _assumed = before
