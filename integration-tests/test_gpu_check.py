"""The check of a GPU, rehearsed on a CPU: it runs, reports, and keeps what it has when a part fails."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

COMMAND = [sys.executable, str(Path(__file__).parent / "gpu_check"), "--rehearse", "--jobs", "2"]


def rehearse(folder: Path, *flags: str) -> tuple[int, dict[str, Any], str]:
    """Exit code, JSON report and Markdown report."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [*COMMAND, "--output", str(folder), *flags]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    report = json.loads((folder / "gpu-check.json").read_text())
    return ended.returncode, report["parts"], (folder / "gpu-check.md").read_text()


def test_a_part_that_fails_leaves_what_it_had_and_the_others_run(tmp_path: Path) -> None:
    flags = ("--parts", "trace,startup,suite,memory", "--trace-flags", "--mixed 3+40")
    code, parts, text = rehearse(tmp_path, *flags)
    assert code == 1
    assert [part["failure"] for part in parts.values()] == ["ended with 1", None, None, None]
    assert any("no room for a prompt of 40" in line for line in parts["trace"]["last_lines"])
    assert [case["name"] for case in parts["trace"]["figures"]["cases"]] == ["decode 1", "decode 3"]
    [start] = parts["startup"]["figures"]["starts"]
    assert start["kind"] == "cold"
    assert 0 < sum(start["launcher_s"].values()) < start["healthy_s"] + 1
    assert {"weights", "import"} <= start["shard_s"].keys()
    row = parts["suite"]["figures"]["rows"][-1]
    assert (row["name"], row["failed"], row["short"]) == ("chat-c1", 0, 0)
    held = parts["memory"]["figures"]["looks"]
    assert [line["requests"] for line in held] == [10, 20, 30, 40, 50]
    assert all(line["text_generation_router_kib"] > 10_000 for line in held)
    assert all(line["text_generation_shard_kib"] > 10_000 for line in held)
    assert "| trace | ended with 1 |" in text
    assert "### decode 3: 3 tokens a step" in text
    assert "| chat-c1 | ttft_p50_ms |" in text


def test_parts_have_a_time_limit(tmp_path: Path) -> None:
    code, parts, text = rehearse(tmp_path, "--parts", "benchmarks,kernels", "--limit-s", "1")
    assert code == 1
    assert parts["benchmarks"]["failure"] == "did not end within 1 s"
    assert parts["kernels"]["failure"] == "not run: no time was left"
    assert "| kernels | not run: no time was left |" in text


@pytest.mark.slow
def test_all_parts(tmp_path: Path) -> None:
    code, parts, _ = rehearse(tmp_path)
    assert [name for name, part in parts.items() if part["failure"]] == []
    assert code == 0
    assert list(parts) == ["kernels", "parity", "benchmarks", "trace", "startup", "suite", "memory"]
    assert {row["operation"] for row in parts["benchmarks"]["figures"]["rows"]} == {"gated_activation", "rms_norm"}
    for name in ("kernels", "parity"):
        assert all(row["tests"] > row["skipped"] for row in parts[name]["figures"]["files"])
