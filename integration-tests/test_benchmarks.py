"""The benchmarks still run: their shortest forms, and a comparison of a server with itself."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent


def run_benchmark(script: str, *flags: str) -> list[Any]:
    command = [sys.executable, str(FOLDER / script), *flags]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return [json.loads(line) for line in ended.stdout.splitlines()]


def test_what_metrics_cost_is_told() -> None:
    lines = run_benchmark("bench_metrics.py", "--steps", "20")
    assert [line["name"] for line in lines] == ["token", "step", "request", "scrape"]


@pytest.mark.slow
def test_the_router_runs_the_steps_of_the_replay() -> None:
    [line] = run_benchmark("bench_router.py", "--rows", "chat-c1")
    assert line["name"] == "chat-c1"
    assert line["steps"] == line["ideal_steps"]
    assert 0.8 < line["share_of_ideal"] <= 1
    assert 0 <= line["idle_share"] < 0.2
    assert line["ttft_p50_ms"] >= line["ideal_ttft_p50_ms"]
    assert line["router_cpu_us_per_token"] > 0


@pytest.mark.slow
def test_rows_are_predicted() -> None:
    command = [sys.executable, str(FOLDER / "predict_rows.py"), "--rows", "chat-c1,chat-rate8"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows = [[cell.strip() for cell in line.split("|")[1:5]] for line in printed.splitlines()[2:]]
    found = {(row, figure): float(predicted) for row, figure, _, predicted in rows}
    assert found["chat-c1", "ttft_p50_ms"] > found["chat-c1", "tpot_p50_ms"] > 5.0  # its weights, at the copy rate
    assert found["chat-rate8", "tpot_p50_ms"] > found["chat-c1", "tpot_p50_ms"]


@pytest.mark.slow
def test_a_server_beside_itself(demo: Any) -> None:
    [line] = run_benchmark("bench_cpu.py", "--rows", "chat-c8", "--url", demo.url, "--peer", demo.url)
    assert line["ratios"]["out_tok_s"] == pytest.approx(line["ours"]["out_tok_s"] / line["peer"]["out_tok_s"], rel=1e-3)
    assert line["ours"]["ttft_p50_ms"] > 0


@pytest.mark.slow
def test_every_grammar_is_measured(demo: Any) -> None:
    lines = run_benchmark("bench_grammars.py", "--streams", "2", "--tokens", "8", "--pairs", "1", "--url", demo.url)
    assert len(lines) == 5
    for line in lines:
        with_grammar, without = reversed(line["token_us"])
        assert line["median_ratio"] == pytest.approx(with_grammar / without, rel=0.02)
        assert line["mask_ms_per_step"] > 0


def test_a_row_that_is_not_there() -> None:
    command = [sys.executable, str(FOLDER / "bench_cpu.py"), "--rows", "chat-c3"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "chat-c3" in ended.stderr
