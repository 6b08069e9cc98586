"""What the server counts: TGI's names, buckets and labels, and a few of our own.

The HTTP side reports requests, the engine reports the queue, steps, blocks and the prefix cache.
"""

from collections.abc import Callable

from text_generation_router.errors import RouterError
from text_generation_router.exposition import Counter, Gauge, Histogram, Registry
from text_generation_router.token_stream import Timings

DURATION_BOUNDS = [0.00015 * 1.5**i for i in range(35)]
FAILURE_LABELS = ("overloaded", "validation", "template", "generation", "incomplete", "dropped")
METHODS = ("prefill", "decode")
CONCAT_REASONS = ("backpressure", "chunking", "wait_exceeded")


def _hundredths(limit: int) -> list[float]:
    return [limit * k / 100 for k in range(1, 101)]


class Metrics:
    """One server's metrics. `set_limits` must be called before the first request."""

    def __init__(self) -> None:
        self._registry = Registry()
        self._refresh: list[Callable[[], None]] = []
        self._add_request_metrics()
        self._add_batch_metrics()
        self._add_memory_metrics()

    def on_scrape(self, refresh: Callable[[], None]) -> None:
        """Have `refresh` set the gauges of the moment whenever they are asked for."""
        self._refresh.append(refresh)

    def text(self) -> str:
        """The exposition, text format 0.0.4."""
        for refresh in self._refresh:
            refresh()
        return self._registry.text()

    def set_limits(self, max_input_tokens: int, max_total_tokens: int) -> None:
        """Fit the buckets of token counts to the limits, once these are known."""
        self._input_length.set_bounds(_hundredths(max_input_tokens))
        self._generated_tokens.set_bounds(_hundredths(max_total_tokens))
        self._max_new_tokens.set_bounds(_hundredths(max_total_tokens))

    # Requests: told by the HTTP side.

    def request_arrived(self, count: int = 1) -> None:
        """Requests were received; each prompt of a list is one."""
        self._request_count.add(count)
        self._running.set(self._running.value + count)

    def request_validated(self, num_prompt_tokens: int, max_new_tokens: int) -> None:
        """A request is within the limits."""
        self._input_length.observe(num_prompt_tokens)
        self._max_new_tokens.observe(max_new_tokens)

    def first_token_read(self, seconds: float) -> None:
        """A request's first token goes out, so long after the request was received."""
        self._time_to_first_token.observe(seconds)

    def tokens_followed(self, seconds: float, count: int) -> None:
        """`count` tokens came, each so long after the one before it in its request."""
        self._inter_token.observe(seconds, count)

    def request_succeeded(self, timings: Timings, num_prompt: int, num_generated: int) -> None:
        """A request of `num_prompt` tokens ended well."""
        self._request_success.add()
        self._running.set(self._running.value - 1)
        inference_ns = timings.finished_ns - timings.first_scheduled_ns
        self._request_duration.observe((timings.finished_ns - timings.received_ns) / 1e9)
        self._validation_duration.observe((timings.queued_ns - timings.received_ns) / 1e9)
        self._queue_duration.observe((timings.first_scheduled_ns - timings.queued_ns) / 1e9)
        self._inference_duration.observe(inference_ns / 1e9)
        self._mean_time_per_token.observe(inference_ns / max(num_generated, 1) / 1e9)
        self._generated_tokens.observe(num_generated)

    def request_failed(self, error: BaseException, count: int = 1) -> None:
        """Requests ended with `error`."""
        label = error.failure_label if isinstance(error, RouterError) else "generation"
        self._request_failure[label].add(count)
        self._running.set(self._running.value - count)

    def client_left(self, count: int = 1) -> None:
        """Requests ended because their client went away."""
        self._request_failure["dropped"].add(count)
        self._running.set(self._running.value - count)

    # Steps, queue and memory: told by the engine.

    def step_started(self, method: str) -> None:
        """A step was sent to the shards; `method` is prefill or decode."""
        self._step_count[method].add()

    def step_ended(
        self, method: str, *, inference_s: float, forward_s: float, decode_s: float, filter_s: float, mask_s: float
    ) -> None:
        """A step ended well: its whole duration, the shard's forward pass, text and stop checks, sending.

        `mask_s` is the work on grammars' masks beside the forward pass, 0 where no sequence has a grammar.
        """
        self._step_success[method].add()
        self._step_inference[method].observe(inference_s)
        self._step_forward[method].observe(forward_s)
        self._step_decode[method].observe(decode_s)
        self._step_filter[method].observe(filter_s)
        self._skipped_tokens.observe(0)
        if mask_s:
            self._mask_duration.observe(mask_s)

    def step_failed(self, method: str) -> None:
        """A step ended with an error."""
        self._step_failure[method].add()

    def batch_admitted(self, size: int) -> None:
        """`size` waiting sequences were admitted in one step."""
        self._next_size.observe(size)

    def batch_joined(self, reason: str, seconds: float) -> None:
        """Admitted sequences joined a running batch; `reason` is one of CONCAT_REASONS, `seconds` what it cost."""
        self._concat[reason].add()
        self._concat_duration.observe(seconds)

    def set_queue_size(self, size: int) -> None:
        """Sequences waiting."""
        self._queue_size.set(size)

    def set_batch(self, size: int, max_tokens: int) -> None:
        """Running sequences, and the tokens that they may grow to."""
        self._batch_size.set(size)
        self._batch_max_tokens.set(max_tokens)

    def set_capacity(self, max_total_tokens: int) -> None:
        """Tokens that the KV memory holds, known after warm-up."""
        self._capacity.set(max_total_tokens)

    def set_blocks(self, used: int, cached: int, total: int) -> None:
        """KV blocks: owned by sequences, kept by the prefix cache alone, and all."""
        self._blocks_used.set(used)
        self._blocks_cached.set(cached)
        self._blocks_total.set(total)

    def preempted(self, count: int = 1) -> None:
        """Sequences lost their blocks and are recomputed later."""
        self._preemptions.add(count)

    def prefix_query(self, query_tokens: int, hit_tokens: int) -> None:
        """A prompt of `query_tokens` was looked up in the prefix cache, which held `hit_tokens` of it."""
        self._prefix_query_tokens.add(query_tokens)
        self._prefix_hit_tokens.add(hit_tokens)

    # Declarations.

    def _counter(self, name: str, help_text: str) -> Counter:
        return self._registry.add(name, help_text, Counter())

    def _counters(self, name: str, help_text: str, label: str, values: tuple[str, ...]) -> dict[str, Counter]:
        add = self._registry.add
        return {value: add(name, help_text, Counter(), f'{label}="{value}"') for value in values}

    def _gauge(self, name: str, help_text: str) -> Gauge:
        return self._registry.add(name, help_text, Gauge())

    def _duration(self, name: str, help_text: str) -> Histogram:
        return self._registry.add(name, help_text, Histogram(DURATION_BOUNDS))

    def _durations(self, name: str, help_text: str, methods: tuple[str, ...] = METHODS) -> dict[str, Histogram]:
        add = self._registry.add
        return {m: add(name, help_text, Histogram(DURATION_BOUNDS), f'method="{m}"') for m in methods}

    def _sizes(self, name: str, help_text: str, bounds: list[float]) -> Histogram:
        return self._registry.add(name, help_text, Histogram(bounds))

    def _add_request_metrics(self) -> None:
        self._request_count = self._counter("tgi_request_count", "Requests received")
        self._request_success = self._counter("tgi_request_success", "Requests that ended well")
        self._request_failure = self._counters(
            "tgi_request_failure", "Requests that did not end well, by reason", "err", FAILURE_LABELS
        )
        self._running = self._gauge("tgi_request_running", "Requests received and not ended")
        self._request_duration = self._duration("tgi_request_duration", "Arrival to last token, seconds")
        self._validation_duration = self._duration("tgi_request_validation_duration", "Arrival to queued, seconds")
        self._queue_duration = self._duration("tgi_request_queue_duration", "Queued to first scheduled, seconds")
        self._inference_duration = self._duration("tgi_request_inference_duration", "First scheduled to end, seconds")
        self._mean_time_per_token = self._duration(
            "tgi_request_mean_time_per_token_duration", "Inference duration over generated tokens, seconds"
        )
        self._time_to_first_token = self._duration(
            "tgi_request_time_to_first_token_duration", "Arrival to first token sent, seconds"
        )
        self._inter_token = self._duration(
            "tgi_request_inter_token_duration", "Between two tokens of one request, seconds"
        )
        # The bounds of these three are the limits' hundredths: see set_limits.
        self._generated_tokens = self._sizes("tgi_request_generated_tokens", "Tokens generated", [])
        self._input_length = self._sizes("tgi_request_input_length", "Prompt tokens", [])
        self._max_new_tokens = self._sizes("tgi_request_max_new_tokens", "Most tokens a request may generate", [])
        self._skipped_tokens = self._sizes(
            "tgi_request_skipped_tokens", "Tokens accepted beyond the first in one step", [0]
        )

    def _add_batch_metrics(self) -> None:
        self._queue_size = self._gauge("tgi_queue_size", "Requests waiting")
        self._batch_size = self._gauge("tgi_batch_current_size", "Running sequences")
        self._batch_max_tokens = self._gauge("tgi_batch_current_max_tokens", "Tokens the running batch may grow to")
        self._capacity = self._gauge("tgi_batch_max_total_tokens", "Tokens the KV memory holds")
        bounds = [float(size) for size in range(1, 1025)]
        self._next_size = self._sizes("tgi_batch_next_size", "Size of each newly admitted batch", bounds)
        self._step_count = self._counters("tgi_batch_inference_count", "Steps started", "method", METHODS)
        self._step_success = self._counters("tgi_batch_inference_success", "Steps that ended well", "method", METHODS)
        self._step_failure = self._counters("tgi_batch_inference_failure", "Steps that failed", "method", METHODS)
        self._step_inference = self._durations("tgi_batch_inference_duration", "Whole steps, seconds")
        self._step_forward = self._durations("tgi_batch_forward_duration", "Forward passes, seconds")
        self._mask_duration = self._duration(
            "tgi_batch_mask_duration", "Work on grammars' masks beside one forward pass, seconds"
        )
        self._step_decode = self._durations("tgi_batch_decode_duration", "Tokens to text and stop checks, seconds")
        self._step_filter = self._durations("tgi_batch_filter_duration", "Sending and finishing, seconds")
        self._concat = self._counters(
            "tgi_batch_concat", "Times that new requests joined a running batch", "reason", CONCAT_REASONS
        )
        self._concat_duration = self._durations(
            "tgi_batch_concat_duration", "Cost of joining a running batch, seconds", ("decode",)
        )["decode"]

    def _add_memory_metrics(self) -> None:
        self._blocks_used = self._gauge("tgi_kv_blocks_used", "KV blocks owned by sequences")
        self._blocks_cached = self._gauge("tgi_kv_blocks_cached", "KV blocks kept by the prefix cache alone")
        self._blocks_total = self._gauge("tgi_kv_blocks_capacity", "KV blocks")
        self._preemptions = self._counter("tgi_preemptions", "Sequences whose blocks were taken back")
        self._prefix_query_tokens = self._counter(
            "tgi_prefix_cache_query_tokens", "Prompt tokens looked up in the prefix cache"
        )
        self._prefix_hit_tokens = self._counter(
            "tgi_prefix_cache_hit_tokens", "Prompt tokens found in the prefix cache"
        )
