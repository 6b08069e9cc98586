"""Deadlines of sequences: how long one may take from a moment on, the same for all of them."""

import asyncio
from collections import deque
from collections.abc import Callable


class Deadlines:
    """Calls `expire` with each sequence's id once its time is over, whether it has ended meanwhile or not.

    As all have the same time, they run out in the order in which they were added: one timer is enough, and the ends of
    sequences need not be told. One that was older when it was added ends late by that at most.
    """

    def __init__(self, limit_s: float, expire: Callable[[int], None]) -> None:
        self._limit_s = limit_s
        self._expire = expire
        self._open: deque[tuple[float, int]] = deque()  # when it is over, on the loop's clock

    def add(self, sequence_id: int, age_s: float = 0.0) -> None:
        """A sequence's time began so long ago."""
        loop = asyncio.get_running_loop()
        self._open.append((loop.time() + self._limit_s - age_s, sequence_id))
        if len(self._open) == 1:
            loop.call_at(self._open[0][0], self._check)

    def _check(self) -> None:
        loop = asyncio.get_running_loop()
        while self._open and self._open[0][0] <= loop.time():
            _, sequence_id = self._open.popleft()
            self._expire(sequence_id)
        if self._open:
            loop.call_at(self._open[0][0], self._check)
