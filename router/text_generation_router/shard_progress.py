"""Reads the progress files in which each rank notes the step it is in, so that nobody has to ask a busy shard.

A file is seven little-endian unsigned 64-bit integers: step, started_ns, deadline_ns, ended_ns, operation, num_tokens,
num_attended_tokens; times of the monotonic clock. A step is running while ended_ns < started_ns, and overdue once the
clock has passed deadline_ns as well.
"""

import mmap
import time
from collections.abc import Sequence
from pathlib import Path

from text_generation_router.step import PlanInFlight

_STEP, _STARTED, _DEADLINE, _ENDED, _OPERATION, _TOKENS, _ATTENDED = range(7)
_OPERATIONS = ("none", "the forward pass", "the choice of tokens", "waiting for the device")
# A rank that has no step takes a plan, or sends a result, at once.
ANSWER_TIMEOUT_NS = 2_000_000_000


class ShardProgress:
    """The progress files of all ranks, mapped."""

    def __init__(self, run_folder: str, world_size: int) -> None:
        """Map the files, which exist once the shards answer; raises OSError otherwise."""
        self._words = [self._open(Path(run_folder) / f"progress-{rank}") for rank in range(world_size)]

    @staticmethod
    def _open(path: Path) -> memoryview:
        with path.open("rb") as file:
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)).cast("Q")

    def stuck_rank(self, in_flight: Sequence[PlanInFlight]) -> int | None:
        """A rank that makes no progress, if there is one, while these plans, oldest first, have no result."""
        now_ns = time.monotonic_ns()
        for rank, words in enumerate(self._words):
            if words[_ENDED] < words[_STARTED]:
                is_stuck = now_ns > words[_DEADLINE]
            else:
                # Rank 0 owes a result for every plan, the others may be done with some of them.
                due = next((sent for sent in in_flight if rank == 0 or sent.plan.step > words[_STEP]), None)
                is_stuck = due is not None and now_ns - max(due.sent_ns, words[_ENDED]) > ANSWER_TIMEOUT_NS
            if is_stuck:
                return rank
        return None

    def describe(self) -> str:
        """What each rank did last, for the log: a line a rank."""
        now_ns = time.monotonic_ns()
        return "\n".join(f"shard {rank}: {_describe(words, now_ns)}" for rank, words in enumerate(self._words))


def _describe(words: memoryview, now_ns: int) -> str:
    if not words[_STARTED]:
        return "no step yet"
    step = f"step {words[_STEP]} ({words[_TOKENS]} tokens that attend to {words[_ATTENDED]})"
    operation = words[_OPERATION]
    name = _OPERATIONS[operation] if operation < len(_OPERATIONS) else str(operation)
    if words[_ENDED] >= words[_STARTED]:
        return f"idle for {(now_ns - words[_ENDED]) / 1e9:.1f} s since {step}"
    allowed_s = (words[_DEADLINE] - words[_STARTED]) / 1e9
    return f"in {step} for {(now_ns - words[_STARTED]) / 1e9:.1f} s, allowed {allowed_s:.1f} s; last operation: {name}"
