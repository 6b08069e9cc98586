"""The books of generated tokens: each one that was sampled is streamed, held by the router, or dropped."""

from collections.abc import Sequence

from text_generation_router.exposition import Registry

HOLDERS = ("results", "streams")
DROPS = ("ended", "unread")


class TokenMetrics:
    """Counts them at the places where they come and go. The residual, what no place accounts for, is always 0."""

    def __init__(self, registry: Registry) -> None:
        self._sampled = registry.counter("tgi_tokens_sampled", "Tokens that the shards answered")
        self._streamed = registry.counter("tgi_tokens_streamed", "Tokens that were handed to a request's answer")
        self._held = registry.gauges(
            "tgi_tokens_held",
            "Tokens not handed out yet: in results, or in streams that nobody has read on",
            "by",
            HOLDERS,
        )
        self._dropped = registry.counters(
            "tgi_tokens_dropped",
            "Tokens for nobody: sampled after the end of their sequence, or unread when its request ended",
            "reason",
            DROPS,
        )
        self._residual = registry.gauge(
            "tgi_tokens_residual", "Tokens sampled that are not streamed, held or dropped: always 0"
        )
        self._inter_token = registry.duration(
            "tgi_request_inter_token_duration", "Between two tokens of one request, seconds"
        )

    @property
    def num_sampled(self) -> int:
        """Tokens answered so far."""
        return self._sampled.value

    @property
    def next_token_counts(self) -> Sequence[int]:
        """Tokens so far by the bucket of their distance to the one before."""
        return self._inter_token.counts

    def sampled(self, count: int) -> None:
        """A result with so many tokens has come."""
        self._sampled.add(count)

    def followed(self, seconds: float, count: int) -> None:
        """`count` tokens came, each so long after the one before it in its request."""
        self._inter_token.observe(seconds, count)

    def set_results(self, num_held: int, num_dropped: int) -> None:
        """Tokens in results that are not handed out, and all so far that came for a sequence that had ended."""
        self._held["results"].set(num_held)
        self._dropped["ended"].set_total(num_dropped)

    def set_streams(self, num_streamed: int, num_held: int, num_unread: int) -> None:
        """Of all streams so far: tokens read, tokens that can still be read, and tokens that nobody will read."""
        self._streamed.set_total(num_streamed)
        self._held["streams"].set(num_held)
        self._dropped["unread"].set_total(num_unread)

    def balance(self) -> None:
        """Set the residual, once everything else is set."""
        accounted = self._streamed.value + sum(counter.value for counter in self._dropped.values())
        self._residual.set(self._sampled.value - accounted - sum(gauge.value for gauge in self._held.values()))
