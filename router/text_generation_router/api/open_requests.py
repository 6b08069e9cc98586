"""The requests between arrival and end: what the counters are balanced against, whenever somebody asks."""

from collections.abc import Callable, Iterable
from typing import Protocol

from text_generation_router.metrics import Metrics
from text_generation_router.token_stream import TokenStream


class OpenRequest(Protocol):
    """What is asked of a request."""

    @property
    def num_prompts(self) -> int:
        """Each counts as a request."""

    @property
    def streams(self) -> list[TokenStream]:
        """One for each generation."""

    @property
    def is_read(self) -> bool:
        """Whether its client is still there."""


class OpenRequests:
    """Knows them all, and how many tokens those before them took or left unread."""

    def __init__(self, metrics: Metrics, unfinished_ids: Callable[[], Iterable[int]]) -> None:
        """`unfinished_ids` answers the sequences that have not ended."""
        self._metrics = metrics
        self._unfinished_ids = unfinished_ids
        self._requests: set[OpenRequest] = set()
        self._num_streamed = 0  # of requests that have ended
        self._num_unread = 0
        metrics.on_scrape(self._report)

    def add(self, request: OpenRequest) -> None:
        """A request has arrived."""
        self._requests.add(request)

    def remove(self, request: OpenRequest) -> None:
        """A request has ended: nothing is written to its streams any more, and nobody reads them."""
        self._requests.remove(request)
        for stream in request.streams:
            self._num_streamed += stream.num_generated_tokens - stream.num_unread_tokens
            self._num_unread += stream.num_unread_tokens

    def _report(self) -> None:
        num_running, num_streamed, num_held = 0, self._num_streamed, 0
        readerless = set(self._unfinished_ids())
        for request in self._requests:
            num_running += request.num_prompts
            for stream in request.streams:
                num_streamed += stream.num_generated_tokens - stream.num_unread_tokens
                num_held += stream.num_unread_tokens
                if request.is_read:
                    readerless.discard(stream.sequence_id)
        self._metrics.requests.set_running(num_running)
        self._metrics.tokens.set_streams(num_streamed, num_held, self._num_unread)
        self._metrics.memory.set_readerless(len(readerless))
