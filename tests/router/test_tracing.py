"""Traces of requests to a scripted engine: the tree, sampling, outcomes; and a collector that comes and goes."""

import asyncio
import logging
import subprocess
import sys

import pytest
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from text_generation_router.errors import GenerationError, IncompleteGeneration
from text_generation_router.tracing import ReportingExporter, Tracing

GENERATE = {"inputs": "abc", "parameters": {"max_new_tokens": 5}}
TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


def is_sampled(headers) -> bool:
    return bool(int(headers["traceresponse"].rsplit("-", 1)[1], 16) & 1)


class Traced:
    """Traces that stay in memory."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        provider = TracerProvider(resource=Resource({}), shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracing = Tracing(provider, "org/model")

    @property
    def spans(self) -> list[ReadableSpan]:
        return list(self._exporter.get_finished_spans())

    def root(self) -> ReadableSpan:
        (root,) = (span for span in self.spans if span.kind is SpanKind.SERVER)
        return root


@pytest.fixture
def ask(serving, make_engine, until):
    """`ask(path, body)`: the spans of one request, and its answer's headers."""

    def run(path, body, engine=None, headers=None, leaves=False):
        traced = Traced()

        async def main():
            async with serving(engine or make_engine()) as served:
                served.context.tracing = traced.tracing
                async with served.client.post(path, json=body, headers=headers) as response:
                    if not leaves:
                        await response.read()
                await until(lambda: traced.spans or not is_sampled(response.headers))
                return response.headers

        return traced, asyncio.run(main())

    return run


def test_one_prompt_is_a_tree_of_phases_in_order(ask):
    traced, headers = ask("/generate", GENERATE)
    root = traced.root()
    assert root.name == "POST /generate"
    assert root.parent is None
    children = [span for span in traced.spans if span is not root]
    assert [span.name for span in children] == ["validate", "queue", "decode"]
    assert {span.parent.span_id for span in children} == {root.context.span_id}
    times = [(span.start_time, span.end_time) for span in (root, *children)]
    assert all(start <= end for start, end in times)
    assert all(times[0][0] <= start and end <= times[0][1] for start, end in times)
    assert times[1][0] == times[0][0]
    assert times[1][1] == times[2][0], "queued as soon as it is valid"
    assert headers["traceresponse"].startswith(f"00-{root.context.trace_id:032x}-{root.context.span_id:016x}-")
    assert is_sampled(headers)


def test_attributes_follow_the_generative_ai_conventions(ask):
    body = {"model": "tgi", "messages": [{"role": "user", "content": "abc"}], "max_tokens": 3, "top_p": 0.5, "seed": 1}
    traced, _ = ask("/v1/chat/completions", body)
    attributes = traced.root().attributes
    assert attributes["gen_ai.operation.name"] == "chat"
    assert attributes["gen_ai.request.model"] == "org/model"
    assert attributes["gen_ai.request.max_tokens"] == 3
    assert attributes["gen_ai.request.temperature"] == 1.0
    assert attributes["gen_ai.request.top_p"] == 0.5
    assert attributes["gen_ai.usage.input_tokens"] == len("user:abc\nassistant:")
    assert attributes["gen_ai.usage.output_tokens"] == 3
    assert attributes["gen_ai.usage.cache_read.input_tokens"] == 2
    assert attributes["gen_ai.response.finish_reasons"] == ("length",)
    assert attributes["gen_ai.response.time_to_first_chunk"] > 0
    assert attributes["http.response.status_code"] == 200
    assert attributes["tgi.preemptions"] == 1
    (decode,) = (span.attributes for span in traced.spans if span.name == "decode")
    assert decode["gen_ai.usage.output_tokens"] == 3
    assert decode["gen_ai.response.finish_reasons"] == ("length",)
    assert decode["tgi.preemptions"] == 1
    assert not [value for value in attributes.values() if "abc" in str(value)], "no text of a client"


def test_each_prompt_of_a_list_has_its_own_phases(ask):
    traced, _ = ask("/v1/completions", {"model": "tgi", "prompt": ["a", "bc"], "max_tokens": 2})
    names = [(span.name, span.attributes.get("tgi.prompt.index")) for span in traced.spans]
    assert names[:-1] == [("validate", None), ("queue", 0), ("decode", 0), ("queue", 1), ("decode", 1)]
    assert traced.root().attributes["gen_ai.usage.input_tokens"] == len("abc") + 2  # each begins with BOS
    assert traced.root().attributes["gen_ai.response.finish_reasons"] == ("length", "length")


def test_a_remote_parent_is_taken_and_decides(ask):
    header = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01", "tracestate": "vendor=x"}
    traced, headers = ask("/generate", GENERATE, headers=header)
    root = traced.root()
    assert f"{root.parent.span_id:016x}" == PARENT_ID
    assert root.parent.is_remote
    assert {f"{span.context.trace_id:032x}" for span in traced.spans} == {TRACE_ID}
    assert root.context.trace_state["vendor"] == "x"

    traced, headers = ask("/generate", GENERATE, headers={"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-00"})
    assert traced.spans == []
    assert headers["traceresponse"].startswith(f"00-{TRACE_ID}-")
    assert not is_sampled(headers)


def test_the_standard_variable_chooses_the_sampler(ask, monkeypatch):
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_always_off")
    assert ask("/generate", GENERATE)[0].spans == []
    assert ask("/generate", GENERATE, headers={"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01"})[0].spans


@pytest.mark.parametrize("header", ["", "garbage", "00-0-0-01", f"ff-{TRACE_ID}-{PARENT_ID}-01"])
def test_a_bad_parent_begins_a_new_trace(ask, header):
    root = ask("/generate", GENERATE, headers={"traceparent": header})[0].root()
    assert root.parent is None
    assert f"{root.context.trace_id:032x}" != TRACE_ID


def test_what_is_refused_ends_in_validation_and_is_not_the_servers_fault(ask):
    traced, _ = ask("/generate", {"inputs": "abc", "parameters": {"max_new_tokens": 0}})
    assert [span.name for span in traced.spans] == ["validate", "POST /generate"]
    root = traced.root()
    assert root.attributes["http.response.status_code"] == 422
    assert root.attributes["error.type"] == "validation"
    assert root.status.status_code is StatusCode.UNSET


@pytest.mark.parametrize(
    ("error", "kind", "status"),
    [(GenerationError("no"), "generation", 424), (IncompleteGeneration(), "incomplete_generation", 500)],
)
def test_what_fails_on_the_way_is_an_error(ask, make_engine, error, kind, status):
    traced, _ = ask("/generate", GENERATE, make_engine(error=error))
    root = traced.root()
    assert root.attributes["error.type"] == kind
    assert root.attributes["http.response.status_code"] == status
    assert root.status.status_code is StatusCode.ERROR
    traced, _ = ask("/generate_stream", GENERATE, make_engine(error=error))
    assert traced.root().attributes["http.response.status_code"] == 200, "sent before the error"
    assert traced.root().status.status_code is StatusCode.ERROR


def test_a_client_that_leaves_is_neither_success_nor_error(ask, make_engine):
    root = ask("/generate_stream", GENERATE, make_engine(is_hanging=True), leaves=True)[0].root()
    assert root.attributes["error.type"] == "client_left"
    assert root.status.status_code is StatusCode.UNSET


def test_without_a_collector_no_answer_has_a_trace(serving):
    async def run():
        async with serving() as served, served.client.post("/generate", json=GENERATE) as response:
            assert response.status == 200
            assert "traceresponse" not in response.headers

    asyncio.run(run())


def test_nothing_of_it_is_loaded_before_a_collector_is_named():
    program = (
        "import sys, text_generation_router.__main__, text_generation_router.app\n"
        "print([name for name in sys.modules if name.startswith('opentelemetry')])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


class Collector(SpanExporter):
    def __init__(self) -> None:
        self.is_there = False

    def export(self, spans):
        return SpanExportResult.SUCCESS if self.is_there else SpanExportResult.FAILURE


def test_a_collector_that_goes_and_comes_is_two_lines(caplog):
    collector = Collector()
    exporter = ReportingExporter(collector, "http://collector:4317")
    with caplog.at_level(logging.INFO):
        for _ in range(5):
            exporter.export([None, None])
        collector.is_there = True
        exporter.export([None])
        exporter.export([None])
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert "10 spans" in caplog.records[1].getMessage()
