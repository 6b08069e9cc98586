"""The limit on requests served or queued: `--max-concurrent-requests` permits, taken or refused at once."""

import asyncio
import contextlib
import math

from text_generation_router.errors import Overloaded, ShuttingDown

_MAX_RETRY_AFTER_S = 60
# Weight of the newest duration in the running mean.
_SMOOTHING = 0.1


class Permits:
    """Counts permits; also says when one is likely to be free again."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._taken = 0
        self._mean_held_s = 0.0
        self._is_closed = False
        self._all_back = asyncio.Event()
        self._all_back.set()

    @property
    def num_taken(self) -> int:
        """Permits in use."""
        return self._taken

    def take(self, count: int) -> None:
        """Take `count` permits, or raise Overloaded; once they are closed, ShuttingDown."""
        if self._is_closed:
            raise ShuttingDown()
        if self._taken + count > self._total:
            raise Overloaded()
        self._taken += count
        self._all_back.clear()

    def give_back(self, count: int, held_s: float) -> None:
        """Return permits that were held for so long."""
        assert 0 <= count <= self._taken, "more permits returned than taken"
        self._taken -= count
        if self._taken == 0:
            self._all_back.set()
        self._mean_held_s += _SMOOTHING * (held_s - self._mean_held_s)

    def close(self) -> None:
        """Let no more be taken."""
        self._is_closed = True

    async def all_back(self, timeout_s: float) -> bool:
        """Wait until no permit is taken; False when that takes longer."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._all_back.wait()
        return self._taken == 0

    def retry_after_s(self) -> int:
        """Whole seconds until a permit should be free, at the rate at which they lately came back."""
        return min(max(math.ceil(self._mean_held_s / self._total), 1), _MAX_RETRY_AFTER_S)
