"""The progress file, read back as the bytes its description promises."""

import stat
import struct
import time
from pathlib import Path

from text_generation_shard.progress import ProgressFile, StepTimes

SECOND = 10**9


def read(path: Path) -> tuple[int, int, int, int]:
    return struct.unpack("<7Q", path.read_bytes())[:4]


def test_a_step_shows_while_it_runs_and_after(tmp_path: Path) -> None:
    progress = ProgressFile(tmp_path, rank=3)
    path = tmp_path / "progress-3"
    assert read(path) == (0, 0, 0, 0)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    before = time.monotonic_ns()
    progress.start(7, 100, 1000)
    after = time.monotonic_ns()
    step, started, deadline, ended = read(path)
    assert step == 7
    assert before <= started <= after
    assert ended < started
    assert deadline - started == 32 * SECOND  # the first step of its class
    progress.end()
    assert read(path)[:3] == (step, started, deadline)
    assert started <= read(path)[3] <= time.monotonic_ns()
    progress.start(8, 100, 1000)
    step, started, deadline, ended_before = read(path)
    assert step == 8
    assert ended_before < started
    assert 2 * SECOND <= deadline - started < 32 * SECOND
    progress.close()
    assert read(path)[0] == 8


def test_a_failed_rank_is_overdue_at_once(tmp_path: Path) -> None:
    progress = ProgressFile(tmp_path, rank=0)
    progress.start(1, 1, 1)
    progress.end()
    progress.fail()
    _, started, deadline, ended = read(tmp_path / "progress-0")
    assert ended < started
    assert deadline <= time.monotonic_ns()


def test_an_old_file_starts_anew(tmp_path: Path) -> None:
    (tmp_path / "progress-0").write_bytes(b"\xff" * 64)
    ProgressFile(tmp_path, rank=0)
    assert read(tmp_path / "progress-0") == (0, 0, 0, 0)


def test_steps_are_allowed_four_times_the_longest_of_their_class() -> None:
    times = StepTimes()
    assert times.allowance_ns((1, 1)) == 32 * SECOND
    times.record((1, 1), SECOND)
    times.record((1, 1), SECOND // 10)
    assert 5.9 * SECOND <= times.allowance_ns((1, 1)) <= 6 * SECOND
    assert times.allowance_ns((1, 2)) == 32 * SECOND
    times.record((1, 1), 3 * SECOND)
    assert times.allowance_ns((1, 1)) == 14 * SECOND


def test_one_slow_step_is_forgotten_in_the_end() -> None:
    times = StepTimes()
    times.record((1, 1), 100 * SECOND)
    for _ in range(1000):
        times.record((1, 1), SECOND)
    assert times.allowance_ns((1, 1)) == 6 * SECOND
