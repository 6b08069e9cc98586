"""Lets few handlers begin in one pass of the event loop, so that a burst of requests does not keep it from the engine.

A thousand requests that come at once take more than a second to read and check. Without turns all of that is done
before the first of them reaches the shards.
"""

import asyncio
from collections import deque

# A handler's first part takes about half a millisecond.
TURNS_PER_PASS = 4


class Turns:
    """First come, first served."""

    def __init__(self) -> None:
        self._num_left = TURNS_PER_PASS
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._is_counting = False  # whether `_next_pass` will be called

    async def take(self) -> None:
        """Return at once if this pass of the loop has a turn left, else in a later one."""
        loop = asyncio.get_running_loop()
        if not self._is_counting:
            self._is_counting = True
            loop.call_soon(self._next_pass)
        if self._num_left and not self._waiting:
            self._num_left -= 1
            return
        turn = loop.create_future()
        self._waiting.append(turn)
        await turn

    def _next_pass(self) -> None:
        self._num_left = TURNS_PER_PASS
        while self._num_left and self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():  # its client may have left
                turn.set_result(None)
                self._num_left -= 1
        self._is_counting = self._num_left < TURNS_PER_PASS
        if self._is_counting:
            asyncio.get_running_loop().call_soon(self._next_pass)
