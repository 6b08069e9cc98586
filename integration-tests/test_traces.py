"""Traces as an OpenTelemetry collector gets them from the running server, and what happens when there is none."""

import contextlib
import itertools
import socket
import threading
import time
from collections.abc import Iterator
from concurrent import futures
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span

TRACE_ID, PARENT_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PROMPT = "".join(f"{number}, " for number in range(100))  # a token a byte: several chunks of 64
CHUNK = 64
ENVIRONMENT = {
    "OTEL_BSP_SCHEDULE_DELAY": "50",
    "OTEL_EXPORTER_OTLP_TIMEOUT": "1",
    "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment.name=test",
}


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Takes spans on a port, and can be gone for a while."""

    def __init__(self) -> None:
        self._received = threading.Condition()
        self.resources: list[dict[str, Any]] = []
        self.spans: list[Span] = []
        self.port = 0
        self._server: grpc.Server | None = None

    def Export(self, request: Any, context: Any) -> trace_service_pb2.ExportTraceServiceResponse:
        with self._received:
            for group in request.resource_spans:
                self.resources.append(read_attributes(group.resource))
                self.spans += [span for scope in group.scope_spans for span in scope.spans]
            self._received.notify_all()
        return trace_service_pb2.ExportTraceServiceResponse()

    def start(self) -> None:
        self._server = grpc.server(futures.ThreadPoolExecutor(2), options=[("grpc.so_reuseport", 0)])
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        self._server.start()

    def stop(self) -> None:
        assert self._server is not None
        self._server.stop(0).wait()

    def wait_for(self, trace_id: str, timeout_s: float = 30.0) -> list[Span]:
        """All spans of a trace, once the root, which is sent last, is there."""
        with self._received:
            assert self._received.wait_for(lambda: self._root(trace_id) is not None, timeout_s), "no root span came"
            return [span for span in self.spans if span.trace_id.hex() == trace_id]

    def _root(self, trace_id: str) -> Span | None:
        return next((s for s in self.spans if s.trace_id.hex() == trace_id and s.kind == Span.SPAN_KIND_SERVER), None)


def read_attributes(holder: Any) -> dict[str, Any]:
    return {attribute.key: read_value(attribute.value) for attribute in holder.attributes}


def read_value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    assert kind is not None
    return [read_value(one) for one in value.array_value.values] if kind == "array_value" else getattr(value, kind)


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    collector = Collector()
    collector.start()
    yield collector
    collector.stop()


@pytest.fixture(scope="module")
def traced(serve: Any, tiny_model: Any, collector: Collector) -> Iterator[Any]:
    flags = ("--model-id", str(tiny_model), "--dtype", "float32", "--max-batch-prefill-tokens", str(CHUNK))
    endpoint = ("--otlp-endpoint", f"http://127.0.0.1:{collector.port}", "--otlp-service-name", "llm.router")
    with serve(*flags, *endpoint, environment=ENVIRONMENT) as server:
        yield server


def generate(server: Any, trace_id: str, prompt: str = PROMPT) -> dict[str, str]:
    """A greedy answer of four tokens under a remote parent: its headers."""
    body = {"inputs": prompt, "parameters": {"max_new_tokens": 4, "ignore_eos_token": True}}
    reply = server.post("/generate", body, headers={"traceparent": f"00-{trace_id}-{PARENT_ID}-01"})
    assert reply.status == 200, reply.body
    return reply.headers


def test_the_collector_gets_the_whole_tree_below_the_remote_parent(traced: Any, collector: Collector) -> None:
    before_ns = time.time_ns()
    headers = generate(traced, TRACE_ID)
    spans = collector.wait_for(TRACE_ID)
    after_ns = time.time_ns()

    (root,) = (span for span in spans if span.kind == Span.SPAN_KIND_SERVER)
    assert root.name == "POST /generate"
    assert root.parent_span_id.hex() == PARENT_ID
    assert headers["traceresponse"].startswith(f"00-{TRACE_ID}-{root.span_id.hex()}-")
    children = sorted((s for s in spans if s is not root), key=lambda s: (s.start_time_unix_nano, s.end_time_unix_nano))
    assert {span.parent_span_id for span in children} == {root.span_id}
    num_chunks = -(-len(PROMPT) // CHUNK)
    assert [span.name for span in children] == ["validate", "queue", *["prefill"] * num_chunks, "decode"]
    assert before_ns <= root.start_time_unix_nano <= root.end_time_unix_nano <= after_ns
    for one, next_one in itertools.pairwise(children):
        assert root.start_time_unix_nano <= one.start_time_unix_nano <= one.end_time_unix_nano
        assert one.end_time_unix_nano <= next_one.start_time_unix_nano, "one phase after the other"
    assert children[-1].end_time_unix_nano <= root.end_time_unix_nano

    attributes = read_attributes(root)
    assert attributes["gen_ai.usage.input_tokens"] == len(PROMPT)
    assert attributes["gen_ai.usage.output_tokens"] == int(headers["x-generated-tokens"])
    assert attributes["gen_ai.usage.cache_read.input_tokens"] == 0
    assert attributes["gen_ai.response.finish_reasons"] in (["length"], ["eos_token"])
    assert attributes["tgi.preemptions"] == 0
    chunks = [read_attributes(span) for span in children if span.name == "prefill"]
    assert sum(chunk["tgi.prefill.tokens"] for chunk in chunks) == len(PROMPT)
    assert all(chunk["tgi.prefill.tokens"] <= CHUNK for chunk in chunks)
    resource = collector.resources[-1]
    assert resource["service.name"] == "llm.router"
    assert resource["deployment.environment.name"] == "test"


def test_a_prefix_hit_shows_in_the_tree(traced: Any, collector: Collector) -> None:
    prompt = "hit " * 50
    generate(traced, "1" * 32, prompt)
    generate(traced, "2" * 32, prompt)
    spans = collector.wait_for("2" * 32)
    (root,) = (read_attributes(span) for span in spans if span.kind == Span.SPAN_KIND_SERVER)
    num_hit = root["gen_ai.usage.cache_read.input_tokens"]
    assert num_hit > len(prompt) // 2
    chunks = [read_attributes(span) for span in spans if span.name == "prefill"]
    assert sum(chunk["tgi.prefill.tokens"] for chunk in chunks) == len(prompt) - num_hit
    assert chunks[0]["gen_ai.usage.cache_read.input_tokens"] == num_hit


def test_requests_go_on_while_the_collector_is_gone(traced: Any, collector: Collector) -> None:
    collector.stop()
    for number in range(5):
        generate(traced, f"{number + 16:032x}")
    traced.wait_for(lambda: "Traces do not reach" in traced.log(), "a warning")
    collector.start()

    def is_back() -> bool:
        generate(traced, f"{time.monotonic_ns():032x}")
        return "Traces reach" in traced.log()

    traced.wait_for(is_back, "traces again", 60.0)
    assert traced.log().count("Traces do not reach") == 1
    assert "opentelemetry" not in traced.log()


def test_a_server_whose_collector_never_answers_serves_and_ends(serve: Any, tiny_model: Any) -> None:
    with (
        contextlib.closing(socket.create_server(("127.0.0.1", 0))) as silent,
        serve(
            *("--model-id", str(tiny_model), "--dtype", "float32"),
            *("--otlp-endpoint", f"127.0.0.1:{silent.getsockname()[1]}"),
        ) as server,
    ):
        for number in range(3):
            generate(server, f"{number + 1:032x}")
