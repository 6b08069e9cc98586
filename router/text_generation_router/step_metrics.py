"""What is counted of steps, told by the engine."""

from text_generation_router.exposition import Histogram, Registry, label

METHODS = ("prefill", "decode")  # TGI's: a step that computes prompt tokens is prefill
KINDS = ("prefill", "decode", "mixed")
CONCAT_REASONS = ("backpressure", "chunking", "wait_exceeded")
_POWERS_OF_TWO = [float(2**k) for k in range(15)]


class StepMetrics:
    """Steps, by what they compute."""

    def __init__(self, registry: Registry) -> None:
        bounds = [float(size) for size in range(1, 1025)]
        self._next_size = registry.sizes("tgi_batch_next_size", "Size of each newly admitted batch", bounds)
        self._count = registry.counters("tgi_batch_inference_count", "Steps started", "method", METHODS)
        self._success = registry.counters("tgi_batch_inference_success", "Steps that ended well", "method", METHODS)
        self._failure = registry.counters("tgi_batch_inference_failure", "Steps that failed", "method", METHODS)
        durations = registry.durations
        self._inference = durations("tgi_batch_inference_duration", "Whole steps, seconds", "method", METHODS)
        self._forward = durations("tgi_batch_forward_duration", "Forward passes, seconds", "method", METHODS)
        self._decode = durations(
            "tgi_batch_decode_duration", "Tokens to text and stop checks, seconds", "method", METHODS
        )
        self._filter = durations("tgi_batch_filter_duration", "Sending and finishing, seconds", "method", METHODS)
        self._mask = registry.duration(
            "tgi_batch_mask_duration", "Work on grammars' masks beside one forward pass, seconds"
        )
        self._concat = registry.counters(
            "tgi_batch_concat", "Times that new requests joined a running batch", "reason", CONCAT_REASONS
        )
        self._concat_duration = durations(
            "tgi_batch_concat_duration", "Cost of joining a running batch, seconds", "method", ("decode",)
        )["decode"]
        self._skipped_tokens = registry.sizes(
            "tgi_request_skipped_tokens", "Tokens accepted beyond the first in one step", [0]
        )
        self._device = durations("tgi_step_duration", "Forward pass and sampling on the device, seconds", "kind", KINDS)
        self._scheduled_tokens = {
            kind: registry.add(
                "tgi_step_scheduled_tokens",
                "Prompt tokens or decoded tokens that one step computes, where it computes any",
                Histogram(_POWERS_OF_TWO),
                label("kind", kind),
            )
            for kind in METHODS
        }

    @property
    def num_prompt_tokens(self) -> int:
        """Prompt tokens that steps so far compute."""
        return int(self._scheduled_tokens["prefill"].sum)

    def started(self, method: str, num_prefill_tokens: int, num_decode_tokens: int) -> None:
        """A step was sent to the shards; `method` is prefill or decode."""
        self._count[method].add()
        if num_prefill_tokens:
            self._scheduled_tokens["prefill"].observe(num_prefill_tokens)
        if num_decode_tokens:
            self._scheduled_tokens["decode"].observe(num_decode_tokens)

    def ended(
        self,
        method: str,
        kind: str,
        *,
        inference_s: float,
        device_s: float,
        forward_s: float,
        decode_s: float,
        filter_s: float,
        mask_s: float,
    ) -> None:
        """A step ended well: whole duration, time on the device, the forward pass alone, text and stop checks, sending.

        `kind` is one of KINDS; `mask_s` is the work on grammars' masks beside the forward pass, 0 where no sequence
        has a grammar.
        """
        self._success[method].add()
        self._inference[method].observe(inference_s)
        self._device[kind].observe(device_s)
        self._forward[method].observe(forward_s)
        self._decode[method].observe(decode_s)
        self._filter[method].observe(filter_s)
        self._skipped_tokens.observe(0)
        if mask_s:
            self._mask.observe(mask_s)

    def failed(self, method: str) -> None:
        """A step ended with an error."""
        self._failure[method].add()

    def admitted(self, size: int) -> None:
        """`size` waiting sequences were admitted in one step."""
        self._next_size.observe(size)

    def joined(self, reason: str, seconds: float) -> None:
        """Admitted sequences joined a running batch; `reason` is one of CONCAT_REASONS, `seconds` what it cost."""
        self._concat[reason].add()
        self._concat_duration.observe(seconds)
