"""The progress file: what this rank is doing, for others to read without asking it.

`<run_folder>/progress-<rank>` is 32 bytes, four little-endian unsigned 64-bit integers:

    step, started_ns, deadline_ns, ended_ns

Times are CLOCK_MONOTONIC, which all processes of a machine share. A step is running while ended_ns < started_ns,
and stuck once the clock has passed deadline_ns as well. All are 0 until the first step. Each word is stored in
one piece, and started_ns is stored last when a step starts, so a running step never shows an old deadline.
"""

import mmap
import os
import sys
import time
from collections import deque
from pathlib import Path

_NUM_BYTES = 32
_STEP, _STARTED, _DEADLINE, _ENDED = range(4)

GRACE_NS = 2_000_000_000
FIRST_USE_NS = 30_000_000_000


class StepTimes:
    """Predicts how long a step takes, from the steps of its size class so far.

    A class is the order of magnitude (a power of two) of the tokens computed and of the tokens attended to. Its
    prediction is the longest step seen, fading by a 64th a step, so that one slow step is not kept for ever.
    """

    def __init__(self) -> None:
        self._longest_ns: dict[tuple[int, int], int] = {}
        self.worst_case_ns = 0  # as warm-up found it

    def allowance_ns(self, size_class: tuple[int, int]) -> int:
        """How long a step may take: 2 s + 4 x the prediction.

        The first of its class is predicted by warm-up's worst case, and has 30 s more.
        """
        longest_ns = self._longest_ns.get(size_class)
        if longest_ns is None:
            return GRACE_NS + FIRST_USE_NS + 4 * self.worst_case_ns
        return GRACE_NS + 4 * longest_ns

    def record(self, size_class: tuple[int, int], duration_ns: int) -> None:
        """Note how long a step took."""
        longest_ns = self._longest_ns.get(size_class, 0)
        self._longest_ns[size_class] = max(duration_ns, longest_ns - longest_ns // 64)


class ProgressFile:
    """Writes one rank's progress file."""

    def __init__(self, run_folder: str | Path, rank: int) -> None:
        if sys.byteorder != "little":
            raise RuntimeError("the progress file needs a little-endian machine")
        self._times = StepTimes()
        # Steps given to the device and not ended: number, size class. The oldest is the one that runs.
        self._steps: deque[tuple[int, tuple[int, int]]] = deque()
        path = Path(run_folder) / f"progress-{rank}"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(descriptor, _NUM_BYTES)
            self._map = mmap.mmap(descriptor, _NUM_BYTES)
        finally:
            os.close(descriptor)
        self._words = memoryview(self._map).cast("Q")

    def note_worst_case(self, duration_ns: int) -> None:
        """How long warm-up's largest steps took: what a step of an unknown class may take."""
        self._times.worst_case_ns = duration_ns

    def start(self, step: int, num_tokens: int, num_attended_tokens: int) -> None:
        """A step starts that computes `num_tokens` and reads the keys and values of `num_attended_tokens`.

        One that is started before the step ahead of it has ended shows once that has.
        """
        self._steps.append((step, (num_tokens.bit_length(), num_attended_tokens.bit_length())))
        if len(self._steps) == 1:
            self._show(time.monotonic_ns())

    def end(self) -> None:
        """The oldest step has ended."""
        now = time.monotonic_ns()
        _, size_class = self._steps.popleft()
        self._times.record(size_class, now - self._words[_STARTED])
        self._words[_ENDED] = now
        if self._steps:
            self._show(now + 1)

    def _show(self, started_ns: int) -> None:
        step, size_class = self._steps[0]
        self._words[_DEADLINE] = started_ns + self._times.allowance_ns(size_class)
        self._words[_STEP] = step
        self._words[_STARTED] = started_ns

    def fail(self) -> None:
        """The rank is about to exit: whatever it was doing is overdue from now on."""
        now = time.monotonic_ns()
        self._words[_DEADLINE] = now
        self._words[_STARTED] = max(now, self._words[_ENDED] + 1)

    def close(self) -> None:
        """Unmap the file; it stays for others to read."""
        self._words.release()
        self._map.close()
