"""Brings parts of files into a GPU's memory: several threads read into pinned memory, from which the GPU copies.

One thread's reads do not keep the bus busy, and a GPU copies memory that is not pinned several times as slowly. What
goes where is first noted down, then done in one sweep, in the order of the files as far as the threads agree.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Protocol

import torch

logger = logging.getLogger(__name__)

# Large enough for the disk and the bus, small enough that all threads end at about the same time.
PIECE_BYTES = 8 * 2**20
MAX_THREADS = 8
# Of each thread: one is read into while the other is copied.
NUM_BUFFERS = 2


class StreamError(OSError):
    """A file ended before its header says it does."""


@dataclass(frozen=True)
class Piece:
    """Rows that lie one after another in a file, and the place of the same rows on the device."""

    file: int  # descriptor
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    columns: slice | None  # of those rows, all that is wanted
    destination: torch.Tensor

    @property
    def num_bytes(self) -> int:
        """What is read of the file."""
        return self.destination.shape[0] * _row_bytes(self.shape, self.dtype)


class Lane(Protocol):
    """One thread's way to the device; made and used in that thread alone."""

    def next_buffer(self) -> torch.Tensor:
        """Memory to read into, uint8; what it held before has been copied."""
        ...

    def copy(self, rows: torch.Tensor, columns: slice | None, destination: torch.Tensor) -> None:
        """Send what was read into the last buffer, converted to the destination's type."""
        ...

    def finish(self) -> None:
        """Wait until all has arrived."""
        ...


class CudaLane:
    """Copies on a stream of its own, which starts where the stream that memory was allocated on then was."""

    def __init__(self, device: torch.device, num_bytes: int, allocated_on: torch.cuda.Stream) -> None:
        # A new thread's current GPU is the first one, whatever that of the others is.
        torch.cuda.set_device(device)
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(allocated_on)
        self._buffers = [torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True) for _ in range(NUM_BUFFERS)]
        self._copied = [torch.cuda.Event() for _ in range(NUM_BUFFERS)]  # type: ignore[no-untyped-call]
        self._turn = 0

    def next_buffer(self) -> torch.Tensor:
        self._turn = (self._turn + 1) % NUM_BUFFERS
        self._copied[self._turn].synchronize()
        return self._buffers[self._turn]

    def copy(self, rows: torch.Tensor, columns: slice | None, destination: torch.Tensor) -> None:
        with torch.cuda.stream(self._stream):
            if columns is None and rows.dtype == destination.dtype:
                destination.copy_(rows, non_blocking=True)
            else:  # cut and converted over there: the host would take longer
                arrived = rows.to(destination.device, non_blocking=True)
                destination.copy_(arrived if columns is None else arrived[:, columns])
            self._copied[self._turn].record(self._stream)

    def finish(self) -> None:
        self._stream.synchronize()


class WeightStream:
    """Notes down what is to be copied, then copies it."""

    def __init__(self, make_lane: Callable[[int], Lane], num_threads: int, piece_bytes: int = PIECE_BYTES) -> None:
        """`make_lane`: from the size of its buffers."""
        self._make_lane = make_lane
        self._num_threads = num_threads
        self._piece_bytes = piece_bytes
        self._pieces: list[Piece] = []

    @classmethod
    def to_gpu(cls, device: torch.device) -> "WeightStream":
        """A stream into memory of this GPU that the current stream may have been given work for."""
        current = torch.cuda.current_stream(device)
        device = current.device  # with its number, which threads must be told
        num_threads = max(1, min(MAX_THREADS, os.cpu_count() or 1))
        return cls(lambda num_bytes: CudaLane(device, num_bytes, current), num_threads)

    def add(
        self,
        file: int,
        offset: int,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        rows: slice,
        columns: slice | None,
        destination: torch.Tensor,
    ) -> None:
        """Bring rows of the tensor that lies at `offset` to `destination`; the file stays open until `run` ends."""
        assert len(destination) == rows.stop - rows.start
        row_bytes = _row_bytes(shape, dtype)
        num_rows = max(1, self._piece_bytes // row_bytes)
        for first in range(rows.start, rows.stop, num_rows):
            end = min(first + num_rows, rows.stop)
            place = destination[first - rows.start : end - rows.start]
            self._pieces.append(Piece(file, offset + first * row_bytes, shape, dtype, columns, place))

    def run(self) -> None:
        """Copy everything; raises StreamError or what else went wrong first."""
        if not self._pieces:
            return
        started_s, largest = time.monotonic(), max(piece.num_bytes for piece in self._pieces)
        pieces, lock = iter(self._pieces), threading.Lock()

        def work() -> None:
            lane = self._make_lane(largest)
            with torch.inference_mode():  # of a thread
                for piece in _take_turns(pieces, lock):
                    buffer = lane.next_buffer()[: piece.num_bytes]
                    read_fully(piece.file, buffer.numpy().data, piece.offset)
                    lane.copy(buffer.view(piece.dtype).view(-1, *piece.shape[1:]), piece.columns, piece.destination)
            lane.finish()

        with ThreadPoolExecutor(self._num_threads, thread_name_prefix="weights") as pool:
            threads = [pool.submit(work) for _ in range(self._num_threads)]
            try:
                wait(threads, return_when=FIRST_EXCEPTION)  # whichever thread it is in
            finally:
                with lock:  # after an error the others stop at their next piece
                    for _ in pieces:
                        pass
            for thread in threads:
                thread.result()
        num_bytes, seconds = sum(piece.num_bytes for piece in self._pieces), time.monotonic() - started_s
        logger.info("Read %.2f GB of weights in %.2f s: %.1f GB/s", num_bytes / 1e9, seconds, num_bytes / 1e9 / seconds)


def _take_turns(pieces: Iterator[Piece], lock: threading.Lock) -> Iterator[Piece]:
    """Pieces that no other thread has taken."""
    while True:
        with lock:
            piece = next(pieces, None)
        if piece is None:
            return
        yield piece


def read_fully(file: int, buffer: memoryview, offset: int) -> None:
    """Fill the buffer from the file; a read may bring less than it was asked for."""
    while buffer:
        num_read = os.preadv(file, [buffer], offset)
        if num_read == 0:
            raise StreamError("a file of weights ends before its header says it does")
        buffer, offset = buffer[num_read:], offset + num_read


def _row_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    num_bytes = dtype.itemsize
    for size in shape[1:]:
        num_bytes *= size
    return num_bytes
