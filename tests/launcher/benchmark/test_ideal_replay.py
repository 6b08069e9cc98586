"""The benchmarks' own arithmetic: the replay in virtual time, idle time and ratios, against sums worked out by hand."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from text_generation_kernels.benchmarks import prediction
from text_generation_router.scheduler import SchedulerLimits

MS = 1_000_000
SCRIPTS = Path(__file__).resolve().parents[3] / "integration-tests"


@pytest.fixture(scope="module")
def scripts():
    """Import of the scripts beside each other, as when they are run by path."""
    sys.path.insert(0, str(SCRIPTS))
    import bench_cpu
    import bench_router
    import bench_rows
    import ideal_replay
    import predict_rows

    sys.path.remove(str(SCRIPTS))
    return {module.__name__: module for module in (bench_cpu, bench_router, bench_rows, ideal_replay, predict_rows)}


@pytest.fixture
def ideal(scripts) -> ModuleType:
    return scripts["ideal_replay"]


@pytest.fixture
def times(ideal, tmp_path):
    """Each step takes 3 ms and 1 ms more for each token whose keys and values it reads."""
    values = {
        "gemm_ms": {"1": 2.0, "1000": 2.0},
        "flops_per_token": 1,
        "tflops": 1,
        "kv_bytes_per_token": 1e6,
        "hbm_bytes_per_s": 1e9,
        "attention_flops_per_query_per_cached_token": 0,
        "attention_tflops": 1,
        "fixed_ms": 1.0,
        "kv_capacity_tokens": 1600,
    }
    (tmp_path / "steps.json").write_text(json.dumps(values))
    return ideal.StepTimes(tmp_path / "steps.json")


LIMITS = SchedulerLimits(max_step_tokens=100, max_num_sequences=10)


def in_ms(times) -> tuple[float, float, float]:
    return times.start_ns / MS, times.first_token_ns / MS, times.end_ns / MS


def test_one_request(ideal, times):
    """The prompt of 3 reads 3 tokens: 6 ms. Three more steps read 4, 5 and 6 tokens: 7, 8 and 9 ms."""
    replayed = ideal.Replay(times, LIMITS, [ideal.IdealRequest([5, 6, 7], 4)]).run(concurrency=1)
    assert in_ms(replayed.times[0]) == (0, 6, 30)
    assert replayed.num_steps == 4
    assert replayed.duration_ns == 30 * MS


def test_a_prompt_in_chunks(ideal, times):
    """With a budget of 2, the prompt takes two steps that read 2 and 3 tokens: 5 and 6 ms."""
    limits = SchedulerLimits(max_step_tokens=2, max_num_sequences=1)
    replayed = ideal.Replay(times, limits, [ideal.IdealRequest([5, 6, 7], 1)]).run(concurrency=1)
    assert in_ms(replayed.times[0]) == (0, 11, 11)
    assert replayed.num_steps == 2


def test_one_after_the_other(ideal, times):
    requests = [ideal.IdealRequest([5, 6, 7], 4), ideal.IdealRequest([8, 9, 1], 4)]
    replayed = ideal.Replay(times, LIMITS, requests).run(concurrency=1)
    assert [in_ms(each) for each in replayed.times] == [(0, 6, 30), (30, 36, 60)]


def test_requests_come_at_their_times(ideal, times):
    """The second comes when two plans are in flight, until 13 ms. Then a step reads 5 and 3 tokens: 11 ms."""
    requests = [ideal.IdealRequest([5, 6, 7], 3), ideal.IdealRequest([8, 9, 1], 1, offset_ns=MS)]
    replayed = ideal.Replay(times, LIMITS, requests).run(concurrency=None)
    assert [in_ms(each) for each in replayed.times] == [(0, 6, 24), (1, 24, 24)]


def test_a_shared_prefix_is_computed_once(ideal, times):
    """All of 32 tokens but the last block are found again: a hit never covers the last token."""
    requests = [ideal.IdealRequest(list(range(32)), 1)] * 2
    replayed = ideal.Replay(times, LIMITS, requests).run(concurrency=1)
    assert replayed.num_prefix_hit_tokens == 16
    assert replayed.num_preemptions == 0


def test_figures_of_a_replay(ideal, times, scripts):
    """Tokens after 6, 13, 21 and 30 ms."""
    replayed = ideal.Replay(times, LIMITS, [ideal.IdealRequest([5, 6, 7], 4)]).run(concurrency=1)
    figures = scripts["predict_rows"].figures_of(ideal.Ideal(replayed.times * 2, 0, 0, 0))
    assert figures["out_tok_s"] == pytest.approx(8 / 0.030)
    assert [figures[f"{name}_p50_ms"] for name in ("ttft", "tpot", "itl")] == [6, 8, 8]
    assert figures["itl_p99_ms"] == pytest.approx(9)


def test_predicted_steps_are_those_of_the_kernels(scripts):
    """Steps of the replay count keys and pairs; the kernels' predictions sequences and prompts."""
    times = scripts["predict_rows"].PredictedTimes()

    def predicted_ns(*sizes):
        return sum(prediction.by_part(prediction.step(*sizes)).values()) * 1e3

    assert times.step_ns(32, 32 * 1100, 0) == pytest.approx(predicted_ns(32, 1100), rel=1e-6)
    mixed = times.step_ns(544, 32 * 1100 + 512, 512 * 513 // 2)
    assert mixed == pytest.approx(predicted_ns(32, 1100, 512), rel=0.01)


def test_idle_share(scripts):
    """Open from 0 to 10 and from 20 to 30; busy from 2 to 8, outside any request, and from 18 to 25."""
    records = [{"start_ns": a, "end_ns": b} for a, b in [(0, 6), (4, 10), (20, 30)]]
    idle_share = scripts["bench_router"].idle_share
    assert idle_share(records, [(2, 8), (12, 14), (18, 25)]) == pytest.approx(1 - (6 + 5) / 20)
    assert idle_share(records, [(0, 10), (10, 30)]) == 0
    assert idle_share(records, []) == 1


def test_a_profile_is_told_by_the_innermost_function_of_the_router(scripts, tmp_path):
    path = tmp_path / "profile"
    path.write_text("main:x;router/a:f;json:dumps 3\nrouter/a:f;router/b:g 5\nmain:x 2\n")
    lines = scripts["bench_router"].profile_text(path, us_per_token=20.0).splitlines()
    assert [line.split() for line in lines] == [
        ["10.00", "us", "a", "token", "router/b:g"],
        ["6.00", "us", "a", "token", "router/a:f"],
        ["4.00", "us", "a", "token", "other"],
    ]


def test_ratios(scripts):
    ours, peer = {"out_tok_s": 30.0, "tpot_p50_ms": None}, {"out_tok_s": 10.0, "tpot_p50_ms": 2.0}
    assert scripts["bench_cpu"].ratios(ours, peer) == {"out_tok_s": 3.0, "tpot_p50_ms": None}


def test_rows_are_selected_by_name(scripts):
    rows = scripts["bench_rows"]
    assert rows.select_rows(rows.CPU_ROWS, []) == list(rows.CPU_ROWS)
    assert [row.name for row in rows.select_rows(rows.CPU_ROWS, ["chat-c8", "chat-c1"])] == ["chat-c1", "chat-c8"]
    with pytest.raises(rows.BenchmarkFailed, match="chat-c2"):
        rows.select_rows(rows.CPU_ROWS, ["chat-c2"])
