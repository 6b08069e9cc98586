"""Which rank counts as stuck, told from files as the shards write them."""

import struct
import time
from pathlib import Path

import pytest
from text_generation_router.shard_progress import ShardProgress
from text_generation_router.step import PlanInFlight, StepPlan

SECOND = 10**9


def write(folder: Path, rank: int, step: int, started_s: float, deadline_s: float, ended_s: float) -> None:
    """Times are seconds from now; a file is changed in place, as a shard does."""
    now = time.monotonic_ns()
    times = [now + int(seconds * SECOND) for seconds in (started_s, deadline_s, ended_s)]
    path = folder / f"progress-{rank}"
    with path.open("r+b" if path.exists() else "w+b") as file:
        file.write(struct.pack("<7Q", step, *times, 2, 48, 1000))


def sent(step: int, seconds_ago: float) -> PlanInFlight:
    return PlanInFlight(StepPlan(step), time.monotonic_ns() - int(seconds_ago * SECOND))


RUNNING, OVERDUE = (7, -5, 1, -6), (7, -5, -1, -6)
IDLE = (7, -9, -8, -8.5)


@pytest.mark.parametrize(
    ("ranks", "in_flight", "stuck"),
    [
        ([IDLE], [], None),
        ([IDLE], [(8, 1)], None),  # it has not taken the plan yet
        ([IDLE], [(8, 3)], 0),
        ([IDLE], [(7, 9), (8, 9)], 0),  # the result of a step that it has ended never came
        ([(7, -9, -8, -1)], [(7, 9), (8, 9)], None),  # it has ended just now
        ([RUNNING], [(7, 9), (8, 9)], None),
        ([OVERDUE], [(7, 9), (8, 9)], 0),
        ([RUNNING, IDLE], [(7, 9)], None),  # the other is done with its part
        ([RUNNING, IDLE], [(7, 9), (8, 9)], 1),
        ([RUNNING, OVERDUE], [(7, 9)], 1),
        ([(0, 0, 0, 0)], [(1, 1)], None),
    ],
)
def test_stuck_ranks(tmp_path, ranks, in_flight, stuck):
    for rank, times in enumerate(ranks):
        write(tmp_path, rank, *times)
    progress = ShardProgress(str(tmp_path), len(ranks))
    assert progress.stuck_rank([sent(*plan) for plan in in_flight]) == stuck


def test_the_log_tells_what_each_rank_did(tmp_path):
    write(tmp_path, 0, *OVERDUE)
    write(tmp_path, 1, *IDLE)
    first, second = ShardProgress(str(tmp_path), 2).describe().splitlines()
    assert first.startswith("shard 0: in step 7 (48 tokens that attend to 1000) for 5.0 s, allowed 4.0 s")
    assert first.endswith("last operation: the choice of tokens")
    assert second == "shard 1: idle for 8.5 s since step 7 (48 tokens that attend to 1000)"
