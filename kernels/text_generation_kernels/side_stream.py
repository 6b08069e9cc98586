"""Streams beside the current one, for kernels that need different parts of the GPU at the same time."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@functools.cache
def _stream(device: torch.device, purpose: str) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@contextmanager
def beside(device: torch.device, purpose: str) -> Iterator[None]:
    """Launch the body's kernels on the purpose's own stream, after all that the current stream has been given.

    `join` must follow before the current stream's work counts as done, and before memory that the body's kernels use
    is freed. On a CPU the body simply runs.
    """
    if device.type != "cuda":
        yield
        return
    side = _stream(device, purpose)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        yield


def join(device: torch.device, purpose: str) -> None:
    """Let the current stream wait for what was launched beside it."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).wait_stream(_stream(device, purpose))
