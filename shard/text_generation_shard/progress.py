"""The progress file: what this rank is doing, for others to read without asking it.

`<run_folder>/progress-<rank>` is 56 bytes, seven little-endian unsigned 64-bit integers:

    step, started_ns, deadline_ns, ended_ns, operation, num_tokens, num_attended_tokens

Times are CLOCK_MONOTONIC, which all processes of a machine share. A step is running while ended_ns < started_ns,
and stuck once the clock has passed deadline_ns as well. All are 0 until the first step. Each word is stored in
one piece, and started_ns is stored last when a step starts, so a running step never shows an old deadline. What
follows ended_ns tells what the rank did last (see Operation) and how much the step computes and attends to.
"""

import mmap
import os
import sys
import time
from collections import deque
from enum import IntEnum
from pathlib import Path

_NUM_WORDS = 7
_STEP, _STARTED, _DEADLINE, _ENDED, _OPERATION, _TOKENS, _ATTENDED = range(_NUM_WORDS)

GRACE_NS = 2_000_000_000
FIRST_USE_NS = 30_000_000_000


class Operation(IntEnum):
    """The parts of a step that a rank can be stuck in."""

    NOTHING = 0
    FORWARD_PASS = 1  # on a GPU: giving it to the device
    CHOICE_OF_TOKENS = 2
    DEVICE = 3  # waiting for it


class StepTimes:
    """Predicts how long a step takes, from the steps of its size class so far.

    A class is the order of magnitude (a power of two) of the tokens computed and of the tokens attended to. Its
    prediction is the longest step seen, fading by a 64th a step, so that one slow step is not kept for ever.
    """

    def __init__(self) -> None:
        self._longest_ns: dict[tuple[int, int], int] = {}
        self.worst_case_ns = 0  # as warm-up found it
        self.first_use_ns = FIRST_USE_NS

    def allowance_ns(self, size_class: tuple[int, int]) -> int:
        """How long a step may take: 2 s + 4 x the prediction.

        The first of its class may be the first to use a kernel. The quickest known class of larger steps predicts how
        long it computes, or else warm-up's worst case.
        """
        longest_ns = self._longest_ns.get(size_class)
        if longest_ns is not None:
            return GRACE_NS + 4 * longest_ns
        tokens, attended = size_class
        larger = [ns for (t, a), ns in self._longest_ns.items() if t >= tokens and a >= attended]
        return GRACE_NS + self.first_use_ns + 4 * min(larger, default=self.worst_case_ns)

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
        # Steps given to the device and not ended: number, tokens computed, tokens attended to. The oldest one runs.
        self._steps: deque[tuple[int, int, int]] = deque()
        path = Path(run_folder) / f"progress-{rank}"
        # A new file: whoever still has the one of an earlier process mapped must not find it cut off.
        path.unlink(missing_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(descriptor, _NUM_WORDS * 8)
            self._map = mmap.mmap(descriptor, _NUM_WORDS * 8)
        finally:
            os.close(descriptor)
        self._words = memoryview(self._map).cast("Q")

    def note_worst_case(self, duration_ns: int, compiles_kernels: bool) -> None:
        """How long warm-up's largest steps took, and whether a later step may have to compile a kernel."""
        self._times.worst_case_ns = duration_ns
        self._times.first_use_ns = FIRST_USE_NS if compiles_kernels else 0

    def start(self, step: int, num_tokens: int, num_attended_tokens: int) -> None:
        """A step starts that computes `num_tokens` and reads the keys and values of `num_attended_tokens`.

        One that is started before the step ahead of it has ended shows once that has.
        """
        self._steps.append((step, num_tokens, num_attended_tokens))
        if len(self._steps) == 1:
            self._show(time.monotonic_ns())

    def enter(self, operation: Operation) -> None:
        """What this rank does from now on."""
        self._words[_OPERATION] = operation

    def end(self) -> None:
        """The oldest step has ended."""
        now = time.monotonic_ns()
        _, num_tokens, num_attended_tokens = self._steps.popleft()
        self._times.record(_size_class(num_tokens, num_attended_tokens), now - self._words[_STARTED])
        self._words[_ENDED] = now
        if self._steps:
            self._show(now + 1)

    def _show(self, started_ns: int) -> None:
        step, num_tokens, num_attended_tokens = self._steps[0]
        self._words[_TOKENS], self._words[_ATTENDED] = num_tokens, num_attended_tokens
        self._words[_DEADLINE] = started_ns + self._times.allowance_ns(_size_class(num_tokens, num_attended_tokens))
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


def _size_class(num_tokens: int, num_attended_tokens: int) -> tuple[int, int]:
    return num_tokens.bit_length(), num_attended_tokens.bit_length()
