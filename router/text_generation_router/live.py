"""What the live page shows: a sample a second of the last five minutes, and the last steps.

It costs a fraction of a millisecond a second and a tuple a step, whoever watches, and nothing for a token.
"""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from text_generation_router.exposition import DURATION_BOUNDS
from text_generation_router.metrics import Metrics
from text_generation_router.scheduler import Scheduler
from text_generation_router.step import PlanInFlight

INTERVAL_S = 1.0
MAX_SAMPLES = 300
MAX_STEPS = 160
# Samples whose tokens and latencies are taken together: single seconds jump too much to be read.
WINDOW = 5


class Sample(NamedTuple):
    """How the server stood at one moment; rates and durations are of the last few seconds, None without any."""

    running: int
    waiting: int
    used_blocks: int
    cached_blocks: int
    generated_per_s: float
    prompt_per_s: float
    first_token_p50_s: float | None
    first_token_p99_s: float | None
    next_token_p50_s: float | None
    next_token_p99_s: float | None


class Totals(NamedTuple):
    """What had been counted at one moment."""

    time_s: float
    num_sampled: int
    num_prompt: int
    first_tokens: Sequence[int]  # by bucket of DURATION_BOUNDS
    next_tokens: Sequence[int]


class Step(NamedTuple):
    """A step that has ended; nanoseconds of the monotonic clock."""

    step: int
    started_ns: int
    ended_ns: int
    num_prefill_tokens: int
    num_decode_tokens: int


class LiveHistory:
    """Takes the samples while it is sampling, and keeps the steps that it is told of."""

    def __init__(self, metrics: Metrics, scheduler: Scheduler) -> None:
        self._metrics = metrics
        self._scheduler = scheduler
        self._totals = deque([self._count()], WINDOW + 1)
        self._samples: deque[Sample] = deque(maxlen=MAX_SAMPLES)
        self._steps: deque[Step] = deque(maxlen=MAX_STEPS)
        self._started_s = time.monotonic()
        self._last_result_ns = 0

    def note_step(self, sent: PlanInFlight, result_ns: int) -> None:
        """A result has come; a plan that waited behind another one counts from that one's result."""
        plan = sent.plan
        if not plan.is_empty:
            started_ns = max(sent.sent_ns, self._last_result_ns)
            self._steps.append(Step(plan.step, started_ns, result_ns, plan.num_prefill_tokens, plan.num_decode_tokens))
        self._last_result_ns = result_ns

    @contextlib.asynccontextmanager
    async def sampling(self) -> AsyncIterator[None]:
        """Inside it samples are taken."""
        task = asyncio.create_task(self._sample_on())
        try:
            yield
        finally:
            task.cancel()

    async def _sample_on(self) -> None:
        while True:
            self.sample()
            await asyncio.sleep(INTERVAL_S)

    def sample(self) -> None:
        """Take one sample."""
        now, before = self._count(), self._totals[0]
        elapsed_s = max(now.time_s - before.time_s, 1e-9)
        first = [after - earlier for earlier, after in zip(before.first_tokens, now.first_tokens, strict=True)]
        following = [after - earlier for earlier, after in zip(before.next_tokens, now.next_tokens, strict=True)]
        scheduler = self._scheduler
        self._samples.append(
            Sample(
                len(scheduler.running),
                len(scheduler.waiting),
                scheduler.blocks.num_held,
                scheduler.blocks.num_cached,
                (now.num_sampled - before.num_sampled) / elapsed_s,
                (now.num_prompt - before.num_prompt) / elapsed_s,
                quantile(first, 0.5),
                quantile(first, 0.99),
                quantile(following, 0.5),
                quantile(following, 0.99),
            )
        )
        self._totals.append(now)

    def _count(self) -> Totals:
        metrics = self._metrics
        return Totals(
            time.monotonic(),
            metrics.tokens.num_sampled,
            metrics.steps.num_prompt_tokens,
            metrics.requests.first_token_counts,
            metrics.tokens.next_token_counts,
        )

    def state(self) -> dict[str, Any]:
        """All of it, as the page reads it; steps in milliseconds since the start."""
        if not self._samples:
            self.sample()
        return {
            "uptime_s": time.monotonic() - self._started_s,
            "now_ms": self._ms(time.monotonic_ns()),
            "interval_s": INTERVAL_S,
            "max_samples": MAX_SAMPLES,
            "num_blocks": self._scheduler.blocks.num_blocks,
            "block_size": self._scheduler.blocks.block_size,
            "columns": Sample._fields,
            "samples": [tuple(sample) for sample in self._samples],
            "steps": [(s.step, self._ms(s.started_ns), self._ms(s.ended_ns), *s[3:]) for s in self._steps],
        }

    def _ms(self, time_ns: int) -> float:
        return round(time_ns / 1e6 - self._started_s * 1e3, 3)


def quantile(counts: Sequence[int], share: float) -> float | None:
    """The duration in seconds that a share of the observations is at most; within a bucket they lie evenly."""
    rank = share * sum(counts)
    if not rank:
        return None
    below = 0
    for (low, high), count in zip(pairwise([0.0, *DURATION_BOUNDS]), counts, strict=False):
        if below + count >= rank:
            return low + (high - low) * (rank - below) / count
        below += count
    return DURATION_BOUNDS[-1]
