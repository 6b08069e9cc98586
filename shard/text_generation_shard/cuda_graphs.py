"""Recorded steps: which sizes are recorded, and the recording that serves a given one.

A recording is made for a number of rows and replays the same launches on the same addresses; a step of fewer rows is
padded. What a recording is made of is left to a recorder, so that all but the GPU's part runs anywhere.
"""

import bisect
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Protocol

import torch

Launch = Callable[[], object]


class Recorder(Protocol):
    """Turns launches into something that repeats them."""

    def record(self, launch: Launch) -> Launch:
        """Run `launch`, then record it."""
        ...


class CudaRecorder:
    """CUDA graphs that share one memory pool: record large ones first, and none may run beside another."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, launch: Launch) -> Launch:
        """The first run compiles kernels and lets libraries allocate, which no graph can hold."""
        launch()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            launch()
        return graph.replay


class Recordings:
    """Recordings by key and size."""

    def __init__(self, recorder: Recorder, sizes: Iterable[int]) -> None:
        self._recorder = recorder
        self._sizes = sorted(set(sizes))
        self._recordings: dict[tuple[Hashable, int], Launch] = {}

    def padded_size(self, size: int, limit: int, least: int = 1) -> int:
        """The smallest size from `least` to `limit` that is recorded and holds `size` rows; `size` if there is none."""
        index = bisect.bisect_left(self._sizes, max(size, least))
        if index == len(self._sizes) or self._sizes[index] > limit:
            return size
        return self._sizes[index]

    def sizes_within(self, limit: int, least: int = 1) -> Sequence[int]:
        """The sizes to record from `least` to `limit`, largest first."""
        return [size for size in reversed(self._sizes) if least <= size <= limit]

    def record(self, key: Hashable, size: int, launch: Launch) -> None:
        """Make the recording of `launch`, which computes `size` rows."""
        self._recordings[key, size] = self._recorder.record(launch)

    def find(self, key: Hashable, size: int) -> Launch | None:
        """The recording for exactly that many rows."""
        return self._recordings.get((key, size))

    def __len__(self) -> int:
        return len(self._recordings)
