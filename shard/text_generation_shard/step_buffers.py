"""What a step needs from the host, in one buffer of fixed layout: filled on the host, sent to the device in one copy.

Graphs read the device's buffer, whose addresses never change. The host has several, so that one can be filled while
the copies of steps before it may still be under way.
"""

from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt
import torch

ALIGNMENT = 128
# Steps that the device may have been given and not finished, and the one being filled.
NUM_HOST_BUFFERS = 3

Array = npt.NDArray[np.generic]
_TORCH_TYPES = {np.dtype(np.int32): torch.int32, np.dtype(np.int64): torch.int64, np.dtype(np.float32): torch.float32}


class StepBuffers:
    """Named columns: `next_host` gives a set to fill, `send` brings what was filled to `device`."""

    def __init__(self, columns: Mapping[str, tuple[type[np.generic], int]], device: torch.device) -> None:
        """`columns`: name -> element type and number of elements."""
        sections, num_bytes = {}, 0
        for name, (kind, length) in columns.items():
            dtype = np.dtype(kind)
            sections[name] = (num_bytes, dtype, length)
            num_bytes += -(-dtype.itemsize * length // ALIGNMENT) * ALIGNMENT
        self._starts = {name: start for name, (start, _, _) in sections.items()}
        self._on_device = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        self.device: dict[str, torch.Tensor] = {
            name: self._on_device[start : start + dtype.itemsize * length].view(_TORCH_TYPES[dtype])
            for name, (start, dtype, length) in sections.items()
        }
        self._host = [
            torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda") for _ in range(NUM_HOST_BUFFERS)
        ]
        self._views: list[dict[str, Array]] = [
            {
                name: host.numpy()[start : start + dtype.itemsize * length].view(dtype)
                for name, (start, dtype, length) in sections.items()
            }
            for host in self._host
        ]
        self._turns = self._take_turns()

    @property
    def num_bytes(self) -> int:
        """Device memory held, for the memory ledger."""
        return self._on_device.nbytes

    def _take_turns(self) -> Iterator[int]:
        while True:
            yield from range(NUM_HOST_BUFFERS)

    def next_host(self) -> tuple[int, dict[str, Array]]:
        """The next set of host columns, with its number; what was in it has been sent long ago."""
        turn = next(self._turns)
        return turn, self._views[turn]

    def send(self, turn: int, until: str | None = None) -> None:
        """Copy a filled set to the device, in stream order; `until` leaves out a column and those that follow it."""
        end = None if until is None else self._starts[until]
        self._on_device[:end].copy_(self._host[turn][:end], non_blocking=True)


def to_device(array: Array, device: torch.device) -> torch.Tensor:
    """A copy of what changes seldom, in stream order; the host does not wait for the device."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that is there once the device has come this far in its stream."""
    if not tensor.is_cuda:
        return tensor
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
