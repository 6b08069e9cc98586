"""What is counted of requests, told by the HTTP side: how they came, ended and were refused, and their durations."""

from collections.abc import Sequence

from text_generation_router.errors import REJECTIONS, RouterError
from text_generation_router.exposition import Registry
from text_generation_router.token_stream import Timings

FAILURE_LABELS = ("overloaded", "validation", "template", "generation", "incomplete", "dropped")


def _hundredths(limit: int) -> list[float]:
    return [limit * k / 100 for k in range(1, 101)]


class RequestMetrics:
    """Requests; each prompt of a list is one. `set_limits` must be called before the first."""

    def __init__(self, registry: Registry) -> None:
        self._count = registry.counter("tgi_request_count", "Requests received")
        self._success = registry.counter("tgi_request_success", "Requests that ended well")
        self._failure = registry.counters(
            "tgi_request_failure", "Requests that did not end well, by reason", "err", FAILURE_LABELS
        )
        self._rejected = registry.counters("tgi_request_rejected", "Requests refused, by reason", "reason", REJECTIONS)
        self._running = registry.gauge("tgi_request_running", "Requests received and not ended")
        self._residual = registry.gauge(
            "tgi_request_residual", "Requests received that neither ended nor are running: always 0"
        )
        self._total = registry.duration("tgi_request_duration", "Arrival to last token, seconds")
        self._validation = registry.duration("tgi_request_validation_duration", "Arrival to queued, seconds")
        self._queue = registry.duration("tgi_request_queue_duration", "Queued to first scheduled, seconds")
        self._inference = registry.duration("tgi_request_inference_duration", "First scheduled to end, seconds")
        self._mean_time_per_token = registry.duration(
            "tgi_request_mean_time_per_token_duration", "Inference duration over generated tokens, seconds"
        )
        self._time_to_first_token = registry.duration(
            "tgi_request_time_to_first_token_duration", "Arrival to first token sent, seconds"
        )
        # The bounds of these three are the limits' hundredths: see set_limits.
        self._generated_tokens = registry.sizes("tgi_request_generated_tokens", "Tokens generated", [])
        self._input_length = registry.sizes("tgi_request_input_length", "Prompt tokens", [])
        self._max_new_tokens = registry.sizes("tgi_request_max_new_tokens", "Most tokens a request may generate", [])

    @property
    def first_token_counts(self) -> Sequence[int]:
        """Requests so far by the bucket of their time to first token."""
        return self._time_to_first_token.counts

    def set_limits(self, max_input_tokens: int, max_total_tokens: int) -> None:
        """Fit the buckets of token counts to the limits, once these are known."""
        self._input_length.set_bounds(_hundredths(max_input_tokens))
        self._generated_tokens.set_bounds(_hundredths(max_total_tokens))
        self._max_new_tokens.set_bounds(_hundredths(max_total_tokens))

    def arrived(self, count: int = 1) -> None:
        """Requests were received."""
        self._count.add(count)

    def validated(self, num_prompt_tokens: int, max_new_tokens: int) -> None:
        """A request is within the limits."""
        self._input_length.observe(num_prompt_tokens)
        self._max_new_tokens.observe(max_new_tokens)

    def first_token_read(self, seconds: float) -> None:
        """A request's first token goes out, so long after the request was received."""
        self._time_to_first_token.observe(seconds)

    def succeeded(self, count: int = 1) -> None:
        """Requests ended well."""
        self._success.add(count)

    def generated(self, timings: Timings, num_generated_tokens: int) -> None:
        """A generation of a request that ended well."""
        inference_ns = timings.finished_ns - timings.first_scheduled_ns
        self._total.observe((timings.finished_ns - timings.received_ns) / 1e9)
        self._validation.observe((timings.queued_ns - timings.received_ns) / 1e9)
        self._queue.observe((timings.first_scheduled_ns - timings.queued_ns) / 1e9)
        self._inference.observe(inference_ns / 1e9)
        self._mean_time_per_token.observe(inference_ns / max(num_generated_tokens, 1) / 1e9)
        self._generated_tokens.observe(num_generated_tokens)

    def failed(self, error: BaseException, count: int = 1) -> None:
        """Requests ended with `error`."""
        label = error.failure_label if isinstance(error, RouterError) else "generation"
        self._failure[label].add(count)
        if isinstance(error, RouterError) and error.rejection:
            self.rejected(error.rejection, count)

    def client_left(self, count: int = 1) -> None:
        """Requests ended because their client went away."""
        self._failure["dropped"].add(count)

    def rejected(self, reason: str, count: int = 1) -> None:
        """Requests were refused; `reason` is one of REJECTIONS. Those that `failed` tells of are counted there."""
        self._rejected[reason].add(count)

    def set_running(self, running: int) -> None:
        """Requests received and not ended, counted one by one; what the counters make of it is the residual."""
        self._running.set(running)
        ended = self._success.value + sum(counter.value for counter in self._failure.values())
        self._residual.set(self._count.value - ended - running)
