"""The watcher that router and shard each carry."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WATCHERS = [ROOT / f"{part}/text_generation_{part}/parent_watch.py" for part in ("router", "shard")]
# Tells when it is ready, then reports a SIGTERM; ends at it unless told to ignore it.
CHILD = """
import runpy, signal, sys, time
def handler(number, frame):
    print("sigterm", flush=True)
    if sys.argv[3] == "obey":
        sys.exit(0)
signal.signal(signal.SIGTERM, handler)
runpy.run_path(sys.argv[1])["watch_parent"](sys.argv[2])
print("ready", flush=True)
while True:
    time.sleep(0.05)
"""


def start_child(watcher: Path, run_folder: Path, manner: str, launcher_pid: str) -> "subprocess.Popen[str]":
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(watcher), str(run_folder), manner],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TEXT_GENERATION_LAUNCHER_PID": launcher_pid},
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    return child


def test_both_packages_carry_the_same_watcher() -> None:
    assert WATCHERS[0].read_text() == WATCHERS[1].read_text()


@pytest.mark.parametrize("watcher", WATCHERS, ids=["router", "shard"])
def test_a_child_that_obeys_ends_by_itself(watcher: Path, tmp_path: Path) -> None:
    child = start_child(watcher, tmp_path, "obey", "1")
    output, _ = child.communicate(timeout=30)  # closes its input
    assert (output, child.returncode) == ("sigterm\n", 0)


def test_a_child_that_does_not_end_cleans_up_and_is_ended(tmp_path: Path) -> None:
    run_folder = tmp_path / "run"
    (run_folder / "model").mkdir(parents=True)
    child = start_child(WATCHERS[0], run_folder, "ignore", "1")
    output, _ = child.communicate(timeout=30)
    assert (output, child.returncode) == ("sigterm\n", 1)
    assert not run_folder.exists()


def test_without_a_launcher_nothing_is_watched(tmp_path: Path) -> None:
    with start_child(WATCHERS[1], tmp_path, "obey", "") as child:
        assert child.stdin is not None
        child.stdin.close()
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(timeout=0.5)
        child.send_signal(signal.SIGKILL)
