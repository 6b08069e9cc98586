"""Deadlines of sequences: how long one may take from a moment on, the same for all of them."""

import asyncio
from collections.abc import Callable
from heapq import heappop, heappush


class Deadlines:
    """Calls `expire` with each sequence's id once its time is over; whether it has ended meanwhile need not be told."""

    def __init__(self, limit_s: float, expire: Callable[[int], None]) -> None:
        self._limit_s = limit_s
        self._expire = expire
        self._open: list[tuple[float, int]] = []  # a heap: when it is over, on the loop's clock
        self._timer: asyncio.TimerHandle | None = None

    def add(self, sequence_id: int, age_s: float = 0.0) -> None:
        """A sequence's time began so long ago."""
        entry = (asyncio.get_running_loop().time() + self._limit_s - age_s, sequence_id)
        heappush(self._open, entry)
        if self._open[0] is entry:
            self._set_timer()

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_at(self._open[0][0], self._check)

    def _check(self) -> None:
        now_s = asyncio.get_running_loop().time()
        while self._open and self._open[0][0] <= now_s:
            _, sequence_id = heappop(self._open)
            self._expire(sequence_id)
        if self._open:
            self._set_timer()
