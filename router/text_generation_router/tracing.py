"""Traces: sends the spans of sampled requests to an OpenTelemetry collector, over OTLP and gRPC, from a thread.

The standard variables (OTEL_TRACES_SAMPLER, OTEL_BSP_…, OTEL_EXPORTER_OTLP_…, OTEL_RESOURCE_ATTRIBUTES) hold. A
collector that does not answer costs spans, never time: what is not sent waits in a queue of fixed length.
"""

import logging
import threading
import time
from collections.abc import Mapping, Sequence

from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import SpanKind
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from text_generation_router.request_trace import RequestTrace

logger = logging.getLogger(__name__)

# How long the last spans may take to leave when the server ends.
LAST_SPANS_S = 2.0
_CHAT_PATH = "/v1/chat/completions"


class Tracing:
    """Begins a trace for each request. Close it at the end."""

    def __init__(self, provider: TracerProvider, model_name: str) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("text_generation_router")
        self._propagator = TraceContextTextMapPropagator()
        self._model_name = model_name

    def begin(self, method: str, path: str, headers: Mapping[str, str], received_ns: int) -> RequestTrace:
        """The trace of a request that was received at `received_ns`; its header `traceparent` names the parent.

        `path` is one of the routes, whose number is small.
        """
        clock_offset_ns = time.time_ns() - time.monotonic_ns()
        root = self._tracer.start_span(
            f"{method} {path}",
            self._propagator.extract(headers),
            SpanKind.SERVER,
            {
                "http.request.method": method,
                "http.route": path,
                "gen_ai.operation.name": "chat" if path == _CHAT_PATH else "text_completion",
                "gen_ai.provider.name": "text-generation-inference",
                "gen_ai.request.model": self._model_name,
            },
            start_time=received_ns + clock_offset_ns,
        )
        return RequestTrace(self._tracer, root, clock_offset_ns)

    def close(self) -> None:
        """Send what is left, for a short time at most."""
        # A collector that is gone would hold the provider's own shutdown up for half a minute.
        last = threading.Thread(target=self._provider.shutdown, daemon=True)
        last.start()
        last.join(LAST_SPANS_S)


class ReportingExporter(SpanExporter):
    """Logs when spans cannot be sent any more and when they can again, instead of every attempt."""

    def __init__(self, exporter: SpanExporter, endpoint: str) -> None:
        self._exporter = exporter
        self._endpoint = endpoint
        self._num_lost = 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Send spans; the exporter itself repeats what may be repeated."""
        result = self._exporter.export(spans)
        if result is not SpanExportResult.SUCCESS:
            if not self._num_lost:
                logger.warning("Traces do not reach %s; spans are dropped until they do", self._endpoint)
            self._num_lost += len(spans)
        elif self._num_lost:
            logger.info("Traces reach %s again; it lacks %d spans or more", self._endpoint, self._num_lost)
            self._num_lost = 0
        return result

    def shutdown(self) -> None:
        """End the connection."""
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """Nothing is held back here."""
        return self._exporter.force_flush(timeout_millis)


def start_tracing(endpoint: str, service_name: str, model_name: str) -> Tracing:
    """Traces for the collector at `endpoint`, http://HOST:PORT, https://HOST:PORT or HOST:PORT."""
    provider = TracerProvider(resource=Resource.create({"service.name": service_name}), shutdown_on_exit=False)
    exporter = OTLPSpanExporter(endpoint if "://" in endpoint else f"http://{endpoint}")
    provider.add_span_processor(BatchSpanProcessor(ReportingExporter(exporter, endpoint)))
    # From here on they would only repeat what ReportingExporter says once.
    for name in ("opentelemetry.exporter", "opentelemetry.sdk._shared_internal"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    logger.info("Traces go to %s, as %s", endpoint, service_name)
    return Tracing(provider, model_name)
