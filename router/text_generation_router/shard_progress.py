"""Reads the progress files in which each rank notes the step it is in, so that nobody has to ask a busy shard.

A file is four little-endian unsigned 64-bit integers: step, started_ns, deadline_ns, ended_ns, times of the monotonic
clock. A step is running while ended_ns < started_ns, and overdue once the clock has passed deadline_ns as well.
"""

import mmap
import time
from pathlib import Path

_STARTED, _DEADLINE, _ENDED = 1, 2, 3


class ShardProgress:
    """The progress files of all ranks, mapped."""

    def __init__(self, run_folder: str, world_size: int) -> None:
        """Map the files, which exist once the shards answer; raises OSError otherwise."""
        self._words = [self._open(Path(run_folder) / f"progress-{rank}") for rank in range(world_size)]

    @staticmethod
    def _open(path: Path) -> memoryview:
        with path.open("rb") as file:
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)).cast("Q")

    def overdue_rank(self) -> int | None:
        """A rank whose step has run past its deadline, if there is one."""
        now_ns = time.monotonic_ns()
        for rank, words in enumerate(self._words):
            if words[_ENDED] < words[_STARTED] and now_ns > words[_DEADLINE]:
                return rank
        return None
