"""Replays requests through the router's own scheduler in virtual time: what a router without any overhead would reach.

Steps last as long as in simulated_shard.py, whose batch is used here too; two plans are in flight, as in the engine;
a result is known and the next plan there in the very moment a step ends. Imports the router, unlike everything else
in this folder but the simulated shard: it must be the real scheduler.
"""

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from simulated_shard import BLOCK_SIZE, Batch, StepTimes
from text_generation_proto import shard_pb2
from text_generation_router.block_manager import BlockManager
from text_generation_router.scheduler import Scheduler, SchedulerLimits
from text_generation_router.shard_client import pack_plan, unpack_result
from text_generation_router.step import StepResult
from text_generation_router.valid_request import ValidRequest

MAX_PLANS_IN_FLIGHT = 2


@dataclass(frozen=True)
class IdealRequest:
    """One request; `offset_ns` is when it starts, unless the concurrency says so."""

    token_ids: list[int]
    max_new_tokens: int
    offset_ns: int = 0


@dataclass
class IdealTimes:
    """When a request started, and when each of its tokens was known."""

    start_ns: int
    token_ns: list[int] = field(default_factory=list)
    is_over: bool = False

    @property
    def first_token_ns(self) -> int:
        """When the first token was known."""
        return self.token_ns[0]

    @property
    def end_ns(self) -> int:
        """When the last token was known."""
        return self.token_ns[-1]


@dataclass(frozen=True)
class Ideal:
    """The whole replay; times in the order of the requests."""

    times: list[IdealTimes]
    num_steps: int
    num_preemptions: int
    num_prefix_hit_tokens: int

    @property
    def duration_ns(self) -> int:
        """From the first start to the last end."""
        return max(times.end_ns for times in self.times) - min(times.start_ns for times in self.times)


class Replay:
    """One run in virtual time, with a cold prefix cache."""

    def __init__(self, times: StepTimes, limits: SchedulerLimits, requests: Sequence[IdealRequest]) -> None:
        blocks = BlockManager(times.capacity_tokens // BLOCK_SIZE, BLOCK_SIZE)
        self._scheduler = Scheduler(limits, blocks, frozenset())
        self._step_times = times
        self._batch = Batch(seed=1)
        self._requests = requests
        self._arrivals: list[tuple[int, int]] = []  # heap of (start, index) of requests that have not started
        self._held_back: deque[int] = deque()  # requests that start when another ends
        self._index_of: dict[int, int] = {}  # by sequence id
        self._times = [IdealTimes(request.offset_ns) for request in requests]
        self._in_flight: deque[tuple[int, StepResult]] = deque()  # end of the step, and its result
        self._shard_free_ns = 0
        self._num_steps = 0

    def run(self, concurrency: int | None) -> Ideal:
        """Start requests at their offsets, or so many of them at once, and run until all have ended."""
        indices = range(len(self._requests))
        if concurrency is None:
            self._arrivals = [(self._requests[index].offset_ns, index) for index in indices]
            heapq.heapify(self._arrivals)
        else:
            self._arrivals = [(0, index) for index in indices[:concurrency]]
            self._held_back.extend(indices[concurrency:])
        while self._arrivals or self._in_flight:
            next_arrival_ns = self._arrivals[0][0] if self._arrivals else None
            step_end_ns = self._in_flight[0][0] if self._in_flight else None
            if step_end_ns is None or (next_arrival_ns is not None and next_arrival_ns <= step_end_ns):
                assert next_arrival_ns is not None
                self._start_requests(next_arrival_ns)
                self._send_plans(next_arrival_ns)
            else:
                self._end_step(step_end_ns)
                self._send_plans(step_end_ns)
        assert all(times.is_over for times in self._times), "a request was never finished"
        return Ideal(
            self._times, self._num_steps, self._scheduler.num_preemptions, self._scheduler.num_prefix_hit_tokens
        )

    def _start_requests(self, now_ns: int) -> None:
        while self._arrivals and self._arrivals[0][0] <= now_ns:
            _, index = heapq.heappop(self._arrivals)
            request = self._requests[index]
            sequence = self._scheduler.add(ValidRequest(request.token_ids, request.max_new_tokens, ignore_eos=True))
            self._index_of[sequence.sequence_id] = index
            self._times[index].start_ns = now_ns

    def _send_plans(self, now_ns: int) -> None:
        while len(self._in_flight) < MAX_PLANS_IN_FLIGHT and (plan := self._scheduler.schedule()) is not None:
            message = shard_pb2.StepPlan.FromString(pack_plan(plan))
            self._batch.apply(message)
            result, duration_ns, _ = self._batch.run(message, self._step_times)
            self._num_steps += duration_ns > 0
            self._shard_free_ns = max(self._shard_free_ns, now_ns) + duration_ns
            self._in_flight.append((self._shard_free_ns, unpack_result(result)))

    def _end_step(self, now_ns: int) -> None:
        _, result = self._in_flight.popleft()
        for progress in self._scheduler.update(result):
            times = self._times[self._index_of[progress.sequence.sequence_id]]
            times.token_ns.append(now_ns)
            if progress.finish_reason is not None:
                times.is_over = True
                if self._held_back:
                    heapq.heappush(self._arrivals, (now_ns, self._held_back.popleft()))
        if self._arrivals and self._arrivals[0][0] <= now_ns:
            self._start_requests(now_ns)
