"""The figures against numpy and against times worked out by hand."""

import json
import math

import numpy as np
import pytest
from text_generation_launcher.benchmark.client import Record
from text_generation_launcher.benchmark.load import LoadResult, Pace
from text_generation_launcher.benchmark.report import Targets, find_knee, percentile, summarize

MS = 1_000_000
NO_TARGETS = Targets()
ALL_AT_ONCE = Pace()


def make_record(start_ms: float, times_ms: list[float], num_tokens: int | None = None, wanted: int = 0) -> Record:
    num_tokens = len(times_ms) if num_tokens is None else num_tokens
    record = Record(wanted or num_tokens, start_ns=int(start_ms * MS), num_tokens=num_tokens, num_prompt_tokens=10)
    record.times_ns.extend(int(time * MS) for time in times_ms)
    record.end_ns = record.times_ns[-1] + MS
    return record


def summary_of(records: list[Record], targets: Targets = NO_TARGETS, pace: Pace = ALL_AT_ONCE, cpu_s: float = 1e-3):
    return summarize("row", pace, LoadResult(records, cpu_s), targets)


@pytest.mark.parametrize("size", [1, 2, 3, 10, 101, 1000])
@pytest.mark.parametrize("percent", [0, 1, 50, 95, 99, 100])
def test_percentiles_are_those_of_numpy(size, percent):
    values = np.random.default_rng(size).exponential(5.0, size)
    assert percentile(sorted(values.tolist()), percent) == pytest.approx(np.percentile(values, percent))


def test_nothing_measured_is_nan_and_null_in_json():
    assert math.isnan(percentile([], 50))
    summary = summary_of([make_record(0, [5.0])])
    assert math.isnan(summary.latencies_ms["tpot"][50])
    assert json.loads(json.dumps(summary.as_json(), allow_nan=False))["tpot_p50_ms"] is None


def test_one_stream_by_hand():
    summary = summary_of([make_record(100, [130, 140, 160, 190])])
    assert summary.latencies_ms["ttft"] == {50: 30, 95: 30, 99: 30}
    assert summary.latencies_ms["tpot"] == {50: 20, 95: 20, 99: 20}
    assert summary.latencies_ms["e2e"][50] == summary.mean_e2e_ms == 90
    assert summary.latencies_ms["itl"][50] == 20
    assert summary.latencies_ms["itl"][99] == pytest.approx(np.percentile([10, 20, 30], 99))
    assert summary.wall_s == pytest.approx(0.091)  # to the end of the stream, 1 ms after its last token
    assert summary.output_tokens_per_s == pytest.approx(4 / 0.091)
    assert summary.prompt_tokens_per_s == pytest.approx(10 / 0.091)
    assert summary.client_cpu_us_per_token == pytest.approx(250)


def test_tpot_is_per_token_and_itl_per_event():
    summary = summary_of([make_record(0, [10, 50], num_tokens=5)])
    assert summary.latencies_ms["tpot"][50] == 10
    assert summary.latencies_ms["itl"][50] == 40


def test_many_streams_against_numpy():
    random = np.random.default_rng(7)
    streams = [(i * 3.0, i * 3.0 + np.cumsum(random.exponential(8.0, int(random.integers(2, 40))))) for i in range(50)]
    summary = summary_of([make_record(start, times.tolist()) for start, times in streams])
    for percent in (50, 95, 99):
        expected = {
            "ttft": np.percentile([times[0] - start for start, times in streams], percent),
            "tpot": np.percentile([(times[-1] - times[0]) / (len(times) - 1) for _, times in streams], percent),
            "itl": np.percentile(np.concatenate([np.diff(times) for _, times in streams]), percent),
            "e2e": np.percentile([times[-1] - start for start, times in streams], percent),
        }
        for kind, value in expected.items():
            assert summary.latencies_ms[kind][percent] == pytest.approx(value, abs=1e-5)


def test_failed_and_short_requests_are_counted_and_left_out():
    failed = make_record(0, [500.0])
    failed.error = "HTTP 500"
    short = make_record(0, [400.0, 600.0], wanted=9)
    summary = summary_of([make_record(0, [10.0, 20.0]), failed, short])
    assert (summary.num_requests, summary.num_failed, summary.num_short) == (3, 1, 1)
    assert summary.latencies_ms["ttft"][99] == 10
    assert summary.requests_per_s == pytest.approx(1 / summary.wall_s)
    assert summary.first_error == "HTTP 500"
    assert not summary.is_clean
    assert summary_of([short]).first_error == "2 tokens came instead of 9"


def test_goodput_counts_requests_that_met_both_targets():
    fast = make_record(0, [10, 20, 30])
    late = make_record(0, [90, 100, 110])
    jerky = make_record(0, [10, 20, 95])
    records = [fast, late, jerky]
    wall_s = summary_of(records).wall_s
    assert summary_of(records).goodput_requests_per_s is None
    for targets, count in (
        (Targets(ttft_ms=50), 2),
        (Targets(itl_ms=50), 2),
        (Targets(50, 50), 1),
        (Targets(5, 50), 0),
    ):
        assert summary_of(records, targets).goodput_requests_per_s == pytest.approx(count / wall_s)


def test_the_knee_is_where_throughput_over_latency_is_largest():
    def level(concurrency: int, tpot_ms: float):
        records = [make_record(0, [tpot_ms * i for i in range(1, 11)]) for _ in range(concurrency)]
        return summary_of(records, pace=Pace(concurrency=concurrency))

    levels = [level(1, 5), level(4, 5.2), level(16, 6), level(32, 12), level(64, 24)]
    knee = find_knee(levels)
    assert knee is not None
    assert knee.pace.concurrency == 16
    assert find_knee([]) is None


def test_the_text_names_every_figure():
    text = summary_of([make_record(0, [10, 20, 30])], Targets(ttft_ms=50)).as_text()
    for word in ("row", "all at once", "1 requests, 0 failed, 0 short", "goodput", "TTFT", "TPOT", "ITL", "us of CPU"):
        assert word in text
