"""The limit on requests served or queued: `--max-concurrent-requests` permits, taken or refused at once."""

import asyncio
import contextlib
import math
import time
from collections import Counter, deque
from collections.abc import Callable

from text_generation_router.errors import Overloaded, ShuttingDown

_MAX_RETRY_AFTER_S = 60
# The rate at which requests end is that of the last ones within this time.
_WINDOW_S = 30.0
_MAX_ENDS = 1000


class Permits:
    """Counts permits, by tenant; also says when a refused request is likely to fare better."""

    def __init__(self, total: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._total = total
        self._clock = clock
        self._taken: Counter[str] = Counter()
        self._num_taken = 0
        self._ends: deque[float] = deque(maxlen=_MAX_ENDS)
        self._is_closed = False
        self._all_back = asyncio.Event()
        self._all_back.set()

    @property
    def num_taken(self) -> int:
        """Permits in use."""
        return self._num_taken

    def check(self, count: int = 1, tenant: str = "") -> None:
        """Raise what `take` would raise.

        A tenant that holds less than its share, the total over all tenants that hold any, is served up to it even when
        others have taken the rest; so at times there are more permits in use than the total, at most twice as many.
        """
        if self._is_closed:
            raise ShuttingDown()
        if self._num_taken + count <= self._total:
            return
        share = self._total // (len(self._taken) + (tenant not in self._taken))
        if self._taken[tenant] + count > share or self._num_taken + count > 2 * self._total:
            raise Overloaded()

    def take(self, count: int, tenant: str = "") -> None:
        """Take `count` permits, or raise Overloaded; once they are closed, ShuttingDown."""
        self.check(count, tenant)
        self._taken[tenant] += count
        self._num_taken += count
        self._all_back.clear()

    def give_back(self, count: int, tenant: str = "", is_served: bool = True) -> None:
        """Return permits; `is_served`: of a request that was queued, not refused."""
        assert 0 <= count <= self._taken[tenant], "more permits returned than taken"
        self._num_taken -= count
        self._taken[tenant] -= count
        if not self._taken[tenant]:
            del self._taken[tenant]
        if self._num_taken == 0:
            self._all_back.set()
        if is_served:
            self._ends.extend([self._clock()] * count)

    def close(self) -> None:
        """Let no more be taken."""
        self._is_closed = True

    async def all_back(self, timeout_s: float) -> bool:
        """Wait until no permit is taken; False when that takes longer."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._all_back.wait()
        return self._num_taken == 0

    def retry_after_s(self, num_waiting: int) -> int:
        """Whole seconds until the requests that wait now should be served, at the rate at which they lately ended."""
        if not self._ends:
            return 1  # nothing is known
        now = self._clock()
        while self._ends and now - self._ends[0] > _WINDOW_S:
            self._ends.popleft()
        if not self._ends:
            return _MAX_RETRY_AFTER_S
        rate = len(self._ends) / max(now - self._ends[0], 1.0)
        return min(max(math.ceil(num_waiting / rate), 1), _MAX_RETRY_AFTER_S)
