"""The spans of one request: its root from arrival on, everything below it made from timestamps once it has ended."""

from collections.abc import Sequence

from opentelemetry.trace import Span, SpanContext, StatusCode, Tracer, set_span_in_context
from opentelemetry.util.types import AttributeValue

from text_generation_router.errors import GenerationError, RouterError
from text_generation_router.token_stream import PrefillChunk, TokenStream
from text_generation_router.valid_request import ValidRequest

Attributes = dict[str, AttributeValue]
_CLIENT_LEFT = "client_left"
_FIRST_SERVER_STATUS = 500


class RequestTrace:
    """One request's trace. Below the root: validate, then for each prompt queue, prefill (one a chunk) and decode."""

    def __init__(self, tracer: Tracer, root: Span, clock_offset_ns: int) -> None:
        """`clock_offset_ns` is what the monotonic clock lacks to the time since 1970."""
        self._tracer = tracer
        self._root = root
        self._parent = set_span_in_context(root)
        self._clock_offset_ns = clock_offset_ns

    @property
    def is_recorded(self) -> bool:
        """Whether the sampler wants this request."""
        return self._root.is_recording()

    @property
    def response_header(self) -> str:
        """The root's place in its trace, for the answer's header `traceresponse`."""
        context: SpanContext = self._root.get_span_context()
        return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"

    def end(
        self,
        received_ns: int,
        ended_ns: int,
        prompts: Sequence[tuple[ValidRequest, TokenStream]],
        error: BaseException | None,
        has_status: bool,
    ) -> None:
        """Make the spans. `prompts` are those that were queued; `has_status` says that 200 was sent before `error`."""
        if not self.is_recorded:
            return
        validated_ns = max((stream.timings.queued_ns for _, stream in prompts), default=ended_ns)
        self._add("validate", received_ns, validated_ns, {})
        for index, (_, stream) in enumerate(prompts):
            self._add_prompt(stream, ended_ns, {"tgi.prompt.index": index} if len(prompts) > 1 else {})
        if prompts:
            self._root.set_attributes(_request_attributes([request for request, _ in prompts]))
            self._root.set_attributes(_usage_attributes([stream for _, stream in prompts]))
        self._set_outcome(error, has_status)
        self._root.end(ended_ns + self._clock_offset_ns)

    def _add_prompt(self, stream: TokenStream, ended_ns: int, index: Attributes) -> None:
        timings = stream.timings
        self._add("queue", timings.queued_ns, timings.first_scheduled_ns or ended_ns, index)
        for chunk in stream.prefills or ():
            self._add("prefill", chunk.started_ns, chunk.ended_ns, _chunk_attributes(chunk, stream) | index)
        if timings.first_token_ns:
            attributes: Attributes = {
                "gen_ai.usage.output_tokens": stream.num_generated_tokens,
                "tgi.preemptions": stream.num_preemptions,
            }
            if stream.finish_reason is not None:
                attributes["gen_ai.response.finish_reasons"] = [str(stream.finish_reason)]
            self._add("decode", timings.first_token_ns, timings.finished_ns or ended_ns, attributes | index)

    def _add(self, name: str, started_ns: int, ended_ns: int, attributes: Attributes) -> None:
        offset_ns = self._clock_offset_ns
        span = self._tracer.start_span(name, self._parent, attributes=attributes, start_time=started_ns + offset_ns)
        span.end(ended_ns + offset_ns)

    def _set_outcome(self, error: BaseException | None, has_status: bool) -> None:
        """By OpenTelemetry's rules a server's span is an error only where the server, not its client, is at fault."""
        if error is None:
            self._root.set_attribute("http.response.status_code", 200)
        elif not isinstance(error, Exception) or isinstance(error, ConnectionError):
            self._root.set_attribute("error.type", _CLIENT_LEFT)
        else:
            status = error.status if isinstance(error, RouterError) else _FIRST_SERVER_STATUS
            kind = error.error_type if isinstance(error, RouterError) else type(error).__name__
            self._root.set_attribute("http.response.status_code", 200 if has_status else status)
            self._root.set_attribute("error.type", kind)
            if status >= _FIRST_SERVER_STATUS or isinstance(error, GenerationError):
                self._root.set_status(StatusCode.ERROR, str(error))


def _request_attributes(requests: Sequence[ValidRequest]) -> Attributes:
    """What was asked for; the prompts of one request share it."""
    sampling = requests[0].sampling
    attributes: Attributes = {
        "gen_ai.request.max_tokens": max(request.max_new_tokens for request in requests),
        "gen_ai.request.temperature": sampling.temperature,
    }
    if sampling.temperature > 0:
        attributes |= {"gen_ai.request.top_p": sampling.top_p, "gen_ai.request.top_k": sampling.top_k}
    return attributes


def _usage_attributes(streams: Sequence[TokenStream]) -> Attributes:
    attributes: Attributes = {
        "gen_ai.usage.input_tokens": sum(stream.num_prompt_tokens for stream in streams),
        "gen_ai.usage.cache_read.input_tokens": sum(stream.num_cached_tokens for stream in streams),
        "gen_ai.usage.output_tokens": sum(stream.num_generated_tokens for stream in streams),
        "gen_ai.response.finish_reasons": [str(s.finish_reason) for s in streams if s.finish_reason is not None],
        "tgi.preemptions": sum(stream.num_preemptions for stream in streams),
    }
    first_tokens_ns = [stream.timings.first_token_ns for stream in streams if stream.timings.first_token_ns]
    if first_tokens_ns:
        waited_ns = min(first_tokens_ns) - streams[0].timings.received_ns
        attributes["gen_ai.response.time_to_first_chunk"] = waited_ns / 1e9
    return attributes


def _chunk_attributes(chunk: PrefillChunk, stream: TokenStream) -> Attributes:
    attributes: Attributes = {
        "tgi.step": chunk.step,
        "tgi.prefill.tokens": chunk.num_tokens,
        "tgi.step.prefill_tokens": chunk.num_step_prefill_tokens,
        "tgi.step.decode_tokens": chunk.num_step_decode_tokens,
    }
    if stream.prefills is not None and chunk is stream.prefills[0]:
        attributes["gen_ai.usage.cache_read.input_tokens"] = stream.num_cached_tokens
    return attributes
