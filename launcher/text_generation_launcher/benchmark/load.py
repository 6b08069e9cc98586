"""Many requests: at a fixed concurrency, or at a rate of arrivals whatever the server does."""

import asyncio
import contextlib
import gc
import random
import resource
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import uvloop

from text_generation_launcher.benchmark.client import Call, Record, StreamClient, Target
from text_generation_launcher.benchmark.progress import Progress

POISSON, CONSTANT = "poisson", "constant"


@dataclass(frozen=True)
class Pace:
    """When requests start: `concurrency` of them at any time, or `rate` a second, or (neither) all at once."""

    concurrency: int | None = None
    rate: float | None = None
    arrivals: str = POISSON
    seed: int = 1

    def offsets_s(self, count: int) -> list[float]:
        """When each request starts, for a rate: the first at once, then with exponential or equal gaps."""
        assert self.rate is not None
        random_numbers, offset, offsets = random.Random(self.seed), 0.0, []
        for _ in range(count):
            offsets.append(offset)
            offset += random_numbers.expovariate(self.rate) if self.arrivals == POISSON else 1 / self.rate
        return offsets

    @property
    def load(self) -> float | None:
        """The number that a sweep varies; None for all at once."""
        return self.concurrency if self.rate is None else self.rate

    @property
    def label(self) -> str:
        """In words."""
        if self.rate is not None:
            return f"{self.rate:g} requests/s ({self.arrivals})"
        return "all at once" if self.concurrency is None else f"concurrency {self.concurrency}"


@dataclass(frozen=True)
class LoadResult:
    """Every request's record, in the order of the calls, and the CPU time this process took."""

    records: list[Record]
    cpu_s: float


def run_load(target: Target, calls: Sequence[Call], pace: Pace, progress: Progress) -> LoadResult:
    """Send all calls at the given pace and wait for their ends."""
    _allow_many_connections()
    gc.collect()
    gc.freeze()  # prompts and bodies need not be looked at again and again
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_run(target, calls, pace, progress))


def _allow_many_connections() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


async def _run(target: Target, calls: Sequence[Call], pace: Pace, progress: Progress) -> LoadResult:
    records = [Record(call.num_wanted) for call in calls]
    cpu_s = time.process_time()
    async with StreamClient(target) as client:
        watching = asyncio.create_task(progress.watch(records))
        try:
            if pace.rate is not None:
                await _open_loop(client, calls, records, pace)
            else:
                await _closed_loop(client, calls, records, pace.concurrency or len(calls))
        finally:
            watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watching
    return LoadResult(records, time.process_time() - cpu_s)


async def _closed_loop(client: StreamClient, calls: Sequence[Call], records: list[Record], concurrency: int) -> None:
    """Each of `concurrency` workers sends its next request when its last has ended."""
    todo = iter(zip(calls, records, strict=True))

    async def work(todo: Iterable[tuple[Call, Record]]) -> None:
        for call, record in todo:
            await client.send(call, record)

    await asyncio.gather(*(work(todo) for _ in range(min(concurrency, len(calls)))))


async def _open_loop(client: StreamClient, calls: Sequence[Call], records: list[Record], pace: Pace) -> None:
    """Requests start at their times, however many are open."""
    start_s = time.monotonic()
    tasks = []
    for call, record, offset_s in zip(calls, records, pace.offsets_s(len(calls)), strict=True):
        await asyncio.sleep(start_s + offset_s - time.monotonic())
        tasks.append(asyncio.create_task(client.send(call, record)))
    await asyncio.gather(*tasks)
