"""The exposition, read by prometheus_client's parser, against the contract's table of names, labels and buckets."""

import bisect
import math
import re
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from text_generation_router import errors
from text_generation_router.errors import (
    REJECTIONS,
    GenerationError,
    Overloaded,
    RouterError,
    TemplateError,
    ValidationError,
)
from text_generation_router.exposition import Histogram
from text_generation_router.metrics import Metrics
from text_generation_router.process_metrics import GpuReading
from text_generation_router.token_stream import Timings

MAX_INPUT, MAX_TOTAL = 640, 1000
DURATIONS = [0.00015 * 1.5**i for i in range(35)]
METHODS = {("method", "prefill"), ("method", "decode")}
FAILURES = {("err", e) for e in ("overloaded", "validation", "template", "generation", "incomplete", "dropped")}
# name: (type, labelled series, bounds)
CONTRACT = {
    "tgi_request_count": ("counter", None, None),
    "tgi_request_success": ("counter", None, None),
    "tgi_request_failure": ("counter", FAILURES, None),
    "tgi_request_duration": ("histogram", None, DURATIONS),
    "tgi_request_validation_duration": ("histogram", None, DURATIONS),
    "tgi_request_queue_duration": ("histogram", None, DURATIONS),
    "tgi_request_inference_duration": ("histogram", None, DURATIONS),
    "tgi_request_mean_time_per_token_duration": ("histogram", None, DURATIONS),
    "tgi_request_generated_tokens": ("histogram", None, [MAX_TOTAL * k / 100 for k in range(1, 101)]),
    "tgi_request_input_length": ("histogram", None, [MAX_INPUT * k / 100 for k in range(1, 101)]),
    "tgi_request_max_new_tokens": ("histogram", None, [MAX_TOTAL * k / 100 for k in range(1, 101)]),
    "tgi_request_skipped_tokens": ("histogram", None, [0.0]),
    "tgi_queue_size": ("gauge", None, None),
    "tgi_queue_prompt_tokens": ("gauge", None, None),
    "tgi_batch_current_size": ("gauge", None, None),
    "tgi_batch_current_max_tokens": ("gauge", None, None),
    "tgi_batch_max_total_tokens": ("gauge", None, None),
    "tgi_batch_next_size": ("histogram", None, [float(k) for k in range(1, 1025)]),
    "tgi_batch_inference_count": ("counter", METHODS, None),
    "tgi_batch_inference_success": ("counter", METHODS, None),
    "tgi_batch_inference_failure": ("counter", METHODS, None),
    "tgi_batch_inference_duration": ("histogram", METHODS, DURATIONS),
    "tgi_batch_forward_duration": ("histogram", METHODS, DURATIONS),
    "tgi_batch_mask_duration": ("histogram", None, DURATIONS),
    "tgi_batch_decode_duration": ("histogram", METHODS, DURATIONS),
    "tgi_batch_filter_duration": ("histogram", METHODS, DURATIONS),
    "tgi_batch_concat": (
        "counter",
        {("reason", reason) for reason in ("backpressure", "chunking", "wait_exceeded")},
        None,
    ),
    "tgi_batch_concat_duration": ("histogram", {("method", "decode")}, DURATIONS),
    "tgi_kv_blocks_used": ("gauge", None, None),
    "tgi_kv_blocks_cached": ("gauge", None, None),
    "tgi_kv_blocks_capacity": ("gauge", None, None),
    "tgi_preemptions": ("counter", None, None),
    "tgi_prefix_cache_query_tokens": ("counter", None, None),
    "tgi_prefix_cache_hit_tokens": ("counter", None, None),
    "tgi_request_time_to_first_token_duration": ("histogram", None, DURATIONS),
    "tgi_request_inter_token_duration": ("histogram", None, DURATIONS),
    "tgi_request_rejected": ("counter", {("reason", reason) for reason in REJECTIONS}, None),
    "tgi_request_running": ("gauge", None, None),
    "tgi_request_residual": ("gauge", None, None),
    "tgi_tokens_sampled": ("counter", None, None),
    "tgi_tokens_streamed": ("counter", None, None),
    "tgi_tokens_held": ("gauge", {("by", "results"), ("by", "streams")}, None),
    "tgi_tokens_dropped": ("counter", {("reason", "ended"), ("reason", "unread")}, None),
    "tgi_tokens_residual": ("gauge", None, None),
    "tgi_step_duration": ("histogram", {("kind", kind) for kind in ("prefill", "decode", "mixed")}, DURATIONS),
    "tgi_step_scheduled_tokens": (
        "histogram",
        {("kind", "prefill"), ("kind", "decode")},
        [float(2**k) for k in range(15)],
    ),
    "tgi_sequences_without_reader": ("gauge", None, None),
    "tgi_recomputed_tokens": ("counter", None, None),
}


def make_metrics():
    metrics = Metrics()
    metrics.set_limits(MAX_INPUT, MAX_TOTAL)
    return metrics


def parse(metrics):
    return {family.name: family for family in text_string_to_metric_families(metrics.text())}


def samples(metrics):
    """(sample name, labels) to value."""
    families = parse(metrics).values()
    return {(bare_name(family, s), frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def bare_name(family, sample):
    """The name as exposed: the parser gives every counter's samples the suffix that OpenMetrics wants."""
    return sample.name.removesuffix("_total") if family.type == "counter" else sample.name


def value(metrics, name, **labels):
    return samples(metrics)[name, frozenset(labels.items())]


@pytest.mark.parametrize("name", CONTRACT)
def test_every_name_is_there_from_the_start(name):
    kind, series, bounds = CONTRACT[name]
    family = parse(make_metrics())[name]
    assert family.type == kind
    assert all(sample.value == 0 for sample in family.samples)
    labels = {item for sample in family.samples for item in sample.labels.items() if item[0] != "le"}
    assert labels == (series or set())
    names = {bare_name(family, sample) for sample in family.samples}
    if bounds is None:
        assert names == {name}
        return
    assert names == {f"{name}_bucket", f"{name}_sum", f"{name}_count"}
    num_series = len(series) if series else 1
    found = [float(s.labels["le"]) for s in family.samples if s.name.endswith("_bucket")]
    assert len(found) == num_series * (len(bounds) + 1)
    assert sorted(set(found)) == pytest.approx([*bounds, math.inf])


def test_the_documentation_names_all_with_their_types_and_labels():
    page = Path(__file__).parents[2] / "docs" / "operations.md"
    tables, _, _ = page.read_text().partition("\n## Overload\n")
    documented = {}
    for line in tables.splitlines():
        if line.startswith("| tgi_"):
            _, names, described, _, _ = line.split("|")
            kind, *labels = described.strip().split(", ")
            documented |= {name: (kind, set(labels)) for name in re.findall(r"\w+", names)}
    metrics = make_metrics()
    metrics.processes.set_build("4.0.0", "", "")
    metrics.processes.set_model("m", "", "bfloat16", "Some GPU", 1)
    metrics.processes.set_resident("router", 1)
    metrics.processes.set_gpu(0, GpuReading(1, 2, 0.5, 100.0))
    exposed = {}
    for name, family in parse(metrics).items():
        labels = {label for sample in family.samples for label in sample.labels}
        exposed[name] = (family.type, labels - {"le"})
    assert documented == exposed


def test_no_suffixes_that_dashboards_do_not_ask_for():
    text = make_metrics().text()
    names = {line.split("{")[0].split(" ")[0] for line in text.splitlines() if not line.startswith("#")}
    assert not [name for name in names if name.endswith(("_total", "_created")) and name != "tgi_kv_blocks_capacity"]
    assert "# TYPE tgi_request_count counter" in text.splitlines()


def test_accepted_is_success_and_failed_and_left_and_running():
    metrics = make_metrics()
    metrics.requests.arrived(9)
    metrics.requests.succeeded()
    metrics.requests.generated(Timings(10**9, 10**9, 2 * 10**9, 4 * 10**9, 5 * 10**9, 8 * 10**9), 8)
    for error in (ValidationError("x"), Overloaded(), GenerationError("x"), KeyError("x"), TemplateError("x")):
        metrics.requests.failed(error)
    metrics.requests.client_left()
    failures = {err: value(metrics, "tgi_request_failure", err=err) for _, err in FAILURES}
    assert failures == {
        "overloaded": 1,
        "validation": 1,
        "template": 1,
        "generation": 2,
        "incomplete": 0,
        "dropped": 1,
    }
    rejected = {reason: value(metrics, "tgi_request_rejected", reason=reason) for reason in REJECTIONS}
    assert {reason for reason, count in rejected.items() if count} == {"validation", "concurrent_requests", "template"}
    metrics.requests.set_running(2)
    assert value(metrics, "tgi_request_running") == 2
    assert value(metrics, "tgi_request_residual") == 0
    metrics.requests.set_running(1)
    assert value(metrics, "tgi_request_residual") == 1
    for name, seconds in (
        ("duration", 7),
        ("validation_duration", 1),
        ("queue_duration", 2),
        ("inference_duration", 4),
        ("mean_time_per_token_duration", 0.5),
        ("generated_tokens", 8),
    ):
        assert value(metrics, f"tgi_request_{name}_sum") == seconds
        assert value(metrics, f"tgi_request_{name}_count") == 1


def test_every_error_has_labels_that_exist():
    classes = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, RouterError)]
    assert len(classes) > 10
    for kind in classes:
        if kind is not RouterError:
            make_metrics().requests.failed(kind("x"))


def test_sampled_is_streamed_and_held_and_dropped():
    metrics = make_metrics()
    metrics.tokens.sampled(20)
    metrics.tokens.set_results(num_held=3, num_dropped=2)
    metrics.tokens.set_streams(num_streamed=9, num_held=5, num_unread=1)
    assert value(metrics, "tgi_tokens_residual") == 0
    assert value(metrics, "tgi_tokens_dropped", reason="unread") == 1
    metrics.tokens.sampled(4)
    assert value(metrics, "tgi_tokens_residual") == 4


def test_labels_may_hold_any_text():
    metrics = make_metrics()
    name = 'C:\\models\\"my"\nmodel'
    metrics.processes.set_model(name, "", "bfloat16", "Some GPU", 2)
    (sample,) = parse(metrics)["tgi_model_info"].samples
    assert sample.value == 1
    assert sample.labels == {
        "model_id": name,
        "model_sha": "",
        "dtype": "bfloat16",
        "device": "Some GPU",
        "num_shards": "2",
    }


def test_buckets_count_what_is_at_most_their_bound():
    bounds = [0.5, 1.0, 2.5]
    observed = [0.0, 0.5, 0.50001, 1.0, 2.0, 2.5, 3.0, 99.0]
    histogram = Histogram(bounds)
    for number in observed:
        histogram.observe(number)
    lines = dict(line.rsplit(" ", 1) for line in histogram.lines("h", 'm="x"'))
    for bound, text in ((0.5, "0.5"), (1.0, "1"), (2.5, "2.5")):
        assert int(lines[f'h_bucket{{m="x",le="{text}"}}']) == bisect.bisect_right(sorted(observed), bound)
    assert lines['h_bucket{m="x",le="+Inf"}'] == lines['h_count{m="x"}'] == str(len(observed))
    assert float(lines['h_sum{m="x"}']) == pytest.approx(sum(observed))


def test_what_the_engine_reports():
    metrics = make_metrics()
    metrics.on_scrape(lambda: metrics.memory.set_queue(7, 70))
    steps, memory = metrics.steps, metrics.memory
    times = {"inference_s": 0.25, "device_s": 2, "forward_s": 0.125, "decode_s": 0.5, "filter_s": 0.0625, "mask_s": 0.5}
    steps.started("decode", num_prefill_tokens=0, num_decode_tokens=48)
    steps.ended("decode", "decode", **times)
    steps.started("prefill", num_prefill_tokens=2000, num_decode_tokens=16)
    steps.failed("prefill")
    steps.admitted(3)
    steps.joined("chunking", 0.5)
    memory.set_batch(4, 400)
    memory.set_capacity(4096)
    memory.set_blocks(used=5, cached=6, total=256)
    memory.set_preempted(2, 33)
    memory.set_prefix_cache(100, 64)
    memory.set_readerless(1)
    metrics.requests.first_token_read(0.5)
    metrics.tokens.followed(0.125, 4)
    metrics.processes.set_resident("shard-1", 4096)
    metrics.processes.set_gpu(1, GpuReading(5, 10, 0.75, None))
    for name, labels, expected in (
        ("tgi_batch_inference_count", {"method": "decode"}, 1),
        ("tgi_batch_inference_success", {"method": "decode"}, 1),
        ("tgi_batch_inference_failure", {"method": "prefill"}, 1),
        ("tgi_batch_inference_duration_sum", {"method": "decode"}, 0.25),
        ("tgi_batch_forward_duration_sum", {"method": "decode"}, 0.125),
        ("tgi_batch_decode_duration_sum", {"method": "decode"}, 0.5),
        ("tgi_batch_filter_duration_sum", {"method": "decode"}, 0.0625),
        ("tgi_batch_mask_duration_sum", {}, 0.5),
        ("tgi_batch_inference_duration_count", {"method": "prefill"}, 0),
        ("tgi_step_duration_sum", {"kind": "decode"}, 2),
        ("tgi_step_scheduled_tokens_sum", {"kind": "prefill"}, 2000),
        ("tgi_step_scheduled_tokens_count", {"kind": "prefill"}, 1),
        ("tgi_step_scheduled_tokens_sum", {"kind": "decode"}, 64),
        ("tgi_batch_next_size_sum", {}, 3),
        ("tgi_batch_concat", {"reason": "chunking"}, 1),
        ("tgi_batch_concat_duration_sum", {"method": "decode"}, 0.5),
        ("tgi_queue_size", {}, 7),
        ("tgi_queue_prompt_tokens", {}, 70),
        ("tgi_batch_current_size", {}, 4),
        ("tgi_batch_current_max_tokens", {}, 400),
        ("tgi_batch_max_total_tokens", {}, 4096),
        ("tgi_kv_blocks_used", {}, 5),
        ("tgi_kv_blocks_cached", {}, 6),
        ("tgi_kv_blocks_capacity", {}, 256),
        ("tgi_preemptions", {}, 2),
        ("tgi_recomputed_tokens", {}, 33),
        ("tgi_prefix_cache_query_tokens", {}, 100),
        ("tgi_prefix_cache_hit_tokens", {}, 64),
        ("tgi_sequences_without_reader", {}, 1),
        ("tgi_request_time_to_first_token_duration_sum", {}, 0.5),
        ("tgi_request_inter_token_duration_sum", {}, 0.5),
        ("tgi_request_inter_token_duration_count", {}, 4),
        ("tgi_process_resident_memory_bytes", {"process": "shard-1"}, 4096),
        ("tgi_gpu_memory_used_bytes", {"rank": "1"}, 5),
        ("tgi_gpu_memory_total_bytes", {"rank": "1"}, 10),
        ("tgi_gpu_utilization_ratio", {"rank": "1"}, 0.75),
    ):
        assert value(metrics, name, **labels) == expected, name
    assert "tgi_gpu_power_watts" not in metrics.text()
