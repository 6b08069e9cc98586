"""The engine: the loop around the scheduler. Takes requests, keeps two plans in flight, publishes tokens.

A plan that is due leaves before the tokens of the last result are turned into text, so that the shards never wait for
the router's output work, which is done in short slices; one with time to spare waits for requests that still arrive
(`plan_timing.py`). When the shards are lost, what ran waits for new ones and goes on from the tokens that it has.
"""

import asyncio
import contextlib
import logging
import time
from collections import deque
from functools import partial

from text_generation_router.block_manager import BlockManager
from text_generation_router.config import RouterConfig
from text_generation_router.deadlines import Deadlines
from text_generation_router.errors import (
    DeadlineExceeded,
    GenerationError,
    IncompleteGeneration,
    QueueFull,
    QueueTimeExceeded,
    ShuttingDown,
    Unhealthy,
)
from text_generation_router.garbage import GarbageCollection
from text_generation_router.launcher_link import LauncherLink
from text_generation_router.limits import Limits, QueueLimits, queue_limits, step_limits
from text_generation_router.live import LiveHistory
from text_generation_router.metrics import Metrics
from text_generation_router.output import SequenceOutput
from text_generation_router.plan_timing import PlanTiming
from text_generation_router.publisher import Publisher
from text_generation_router.scheduler import Scheduler
from text_generation_router.shard_client import ShardFailure, ShardProcess
from text_generation_router.shard_group import ShardGroup, ShardSupply
from text_generation_router.step import MAX_PLANS_IN_FLIGHT, PlanInFlight, StepPlan, StepResult
from text_generation_router.step_report import StepReport
from text_generation_router.token_stream import Timings, TokenStream
from text_generation_router.tokenizer import Tokenizer
from text_generation_router.valid_request import ValidRequest

logger = logging.getLogger(__name__)

MAX_RESULTS_BEHIND = 2
PROBE_INTERVAL_S = 1.0
# A plan leaves at once; a shard that does not read any more must not hold up the end.
STOP_TIMEOUT_S = 1.0
# A call to a shard that fails because the shard has died does so before the stream of plans breaks off, or after.
LOSS_TIMEOUT_S = 1.0


class Engine:
    """One server's scheduler, its shards, and the streams of the requests it serves."""

    def __init__(
        self,
        scheduler: Scheduler,
        supply: ShardSupply,
        group: ShardGroup,
        tokenizer: Tokenizer,
        metrics: Metrics,
        limits: Limits,
        waiting_limits: QueueLimits = QueueLimits(),  # noqa: B008 (it is frozen)
    ) -> None:
        self.limits = limits
        self._scheduler = scheduler
        self._supply = supply
        self._group: ShardGroup | None = group  # None while there are no shards
        self._loss = asyncio.Event()  # the group is lost
        self._loss_ended = asyncio.Event()  # there is a group, or there will be none
        self._tokenizer = tokenizer
        self._report = StepReport(metrics, scheduler)
        self._publisher = Publisher(scheduler, self._report)
        self.live = LiveHistory(metrics, scheduler)
        self._tokens = metrics.tokens
        self._processes = metrics.processes
        metrics.on_scrape(self._report_tokens)
        self._queue_limits = waiting_limits
        self._queue_deadlines = self._deadlines = None
        if (limit_s := waiting_limits.queue_timeout_s) is not None:
            self._queue_deadlines = Deadlines(limit_s, self._end_waiting)
        if (limit_s := waiting_limits.request_timeout_s) is not None:
            self._deadlines = Deadlines(limit_s, self._end_late)
        self._garbage = GarbageCollection()
        self._in_flight: deque[PlanInFlight] = deque()
        self._timing = PlanTiming()
        self._due: asyncio.TimerHandle | None = None  # wakes the loop when a plan that is held back must leave
        self._results: deque[tuple[StepResult, int]] = deque()  # with the time at which it came
        self._is_probe_due = False
        self._wakeup = asyncio.Event()
        self._failure: ShardFailure | None = None
        self._is_draining = False
        self._is_stopping = False
        self._is_over = False  # the drain has ended: what is not queued by now never will be
        self.failed = asyncio.Event()  # the shards are lost for good, or the loop is: nothing can be served any more
        self._loop_task: asyncio.Task[None] | None = None
        self._watch_task: asyncio.Task[None] | None = None

    # The requests' side.

    def submit(self, request: ValidRequest, timings: Timings, is_further: bool = False) -> TokenStream:
        """Queue a request, also while draining or without shards. Raises ShuttingDown and Unhealthy after the end.

        Raises QueueFull when too many prompt tokens wait, unless it is a further run of a prompt that was let in.
        """
        if self.failed.is_set():
            raise Unhealthy
        if self._is_over:
            raise ShuttingDown
        if not is_further:
            self._check_room(request)
        sequence = self._scheduler.add(request)
        timings.queued_ns = time.monotonic_ns()
        stream = TokenStream(sequence.num_prompt_tokens, sequence.sequence_id, timings)
        try:
            self._publisher.add(SequenceOutput(sequence, stream, self._tokenizer))
        except Exception:
            self._scheduler.finish(sequence)
            raise
        if self._queue_deadlines is not None:
            self._queue_deadlines.add(sequence.sequence_id, (timings.queued_ns - timings.admitted_ns) / 1e9)
        if self._deadlines is not None:
            self._deadlines.add(sequence.sequence_id, (timings.queued_ns - timings.received_ns) / 1e9)
        self._wakeup.set()
        return stream

    def _check_room(self, request: ValidRequest) -> None:
        limit, num_tokens = self._queue_limits.max_prompt_tokens, len(request.token_ids)
        if limit is not None and not self._scheduler.waiting.has_room(request.tenant, num_tokens, limit):
            raise QueueFull(f": {self._scheduler.waiting.num_prompt_tokens} prompt tokens wait, at most {limit} may")

    def _end_waiting(self, sequence_id: int) -> None:
        """A sequence's time to wait is over."""
        output = self._publisher.get(sequence_id)
        if output is not None and not output.stream.timings.first_scheduled_ns:
            self._publisher.cancel(sequence_id, QueueTimeExceeded(f"{self._queue_limits.queue_timeout_s:g} s"))
            self._wakeup.set()

    def _end_late(self, sequence_id: int) -> None:
        """A sequence's whole time is over."""
        self._publisher.cancel(sequence_id, DeadlineExceeded(f"{self._queue_limits.request_timeout_s:g} s"))
        self._wakeup.set()

    def num_waiting(self) -> int:
        """Sequences that are not in the batch."""
        return len(self._scheduler.waiting)

    async def prepare_grammar(self, text: str) -> str:
        """Get the shards ready for a grammar; answers "", or why no request can have it.

        Waits while there are no shards. Raises Unhealthy, and ShuttingDown after the end.
        """
        while True:
            await self._loss_ended.wait()
            group, loss = self._group, self._loss
            if group is None:
                raise ShuttingDown if self._is_over else Unhealthy
            try:
                return await group.shards.prepare_grammar(text)
            except ShardFailure as failure:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LOSS_TIMEOUT_S):
                        await loss.wait()
                if not loss.is_set():
                    raise Unhealthy from failure

    def cancel(self, stream: TokenStream) -> None:
        """End a request whose client is gone; does nothing when it has ended already."""
        self._publisher.cancel(stream.sequence_id, IncompleteGeneration())
        self._wakeup.set()

    def start_drain(self) -> None:
        """Be unhealthy from now on, so that nobody sends more; what was admitted may still come and is served."""
        self._is_draining = True

    def end_all(self) -> None:
        """End what still runs with an error, and refuse whatever comes."""
        self._is_over = True
        self._publisher.end_all(IncompleteGeneration(": the server is shutting down"))
        self._loss_ended.set()
        self._wakeup.set()

    def is_healthy(self) -> bool:
        """Whether every rank answers and makes progress; cheap, and true however busy the server is."""
        if self._group is None or self._failure is not None or self._is_draining:
            return False
        return self._group.progress.stuck_rank(self._unanswered()) is None

    def is_alive(self) -> bool:
        """Whether what is accepted will be served: also without shards, as long as new ones may come."""
        return not self.failed.is_set()

    def shard_processes(self) -> list[ShardProcess]:
        """The processes of the ranks; none while there are no shards."""
        group = self._group  # which another thread may ask for while it changes
        return [] if group is None else group.shards.processes

    def unfinished_ids(self) -> list[int]:
        """Sequences that have not ended, by the ids that their streams have."""
        return self._scheduler.unfinished_ids()

    def _report_tokens(self) -> None:
        num_dropped = self._scheduler.num_dropped_tokens + self._publisher.num_dropped_tokens
        self._tokens.set_results(self._publisher.num_held_tokens(), num_dropped)

    # The shards' side.

    def start(self) -> None:
        """Connect to the shards' Run streams and start the loop."""
        assert self._group is not None
        self._use(self._group)
        self._loop_task = asyncio.create_task(self._run())
        self._watch_task = asyncio.create_task(self._watch())

    def take_over_garbage(self) -> None:
        """Collect garbage when the loop has time for it, instead of when Python thinks fit."""
        self._garbage.take_over()

    async def stop(self) -> None:
        """End the loop, not in the middle of a plan that some ranks have and others do not, and the connections."""
        self._is_stopping = True
        self._wakeup.set()
        if self._loop_task is not None and self._watch_task is not None:
            await asyncio.wait({self._loop_task}, timeout=STOP_TIMEOUT_S if self._group is not None else 0.0)
            self._loop_task.cancel()
            self._watch_task.cancel()
            await asyncio.gather(self._loop_task, self._watch_task, return_exceptions=True)
        if self._group is not None:
            await self._group.shards.close()
        await self._supply.close()

    def _use(self, group: ShardGroup) -> None:
        self._group, self._failure = group, None
        self._timing, self._due = PlanTiming(), None
        self._loss = asyncio.Event()
        group.shards.start(partial(self._on_result, group), partial(self._on_failure, group))
        self._loss_ended.set()

    def _on_result(self, group: ShardGroup, result: StepResult) -> None:
        if group is self._group:
            self._results.append((result, time.monotonic_ns()))
            self._wakeup.set()

    def _on_failure(self, group: ShardGroup, failure: ShardFailure) -> None:
        if group is self._group and self._failure is None:
            logger.error("%s", failure)
            self._failure = failure
            self._loss_ended.clear()
            self._loss.set()
            self._wakeup.set()

    async def _run(self) -> None:
        """Serve with one group of shards after another, and end everything when there is none any more."""
        try:
            while not self._is_stopping:
                await self._loop()
                while self._results:  # they came before the failure
                    self._receive()
                if self._failure is not None:
                    await self._recover(self._failure)
        except ShardFailure as failure:
            logger.error("There are no shards any more: %s", failure)
        except Exception:
            logger.exception("the engine's loop failed")
        finally:
            self._is_draining = True
            self.failed.set()
            self._loss_ended.set()
            self._report.abandoned(self._in_flight)
            self._publisher.abandon(GenerationError("a shard failed"))

    async def _loop(self) -> None:
        """Receive, update, schedule, send; publish while there is nothing of that to do."""
        group = self._group
        assert group is not None
        try:
            while self._failure is None and not self._is_stopping:
                if self._results:
                    self._receive()
                elif self._publisher.has_work:
                    await self._publish_slice()
                else:
                    self._garbage.collect_young(is_resting=True)
                    await self._wakeup.wait()
                    self._wakeup.clear()
                await self._fill_pipeline()
        except ShardFailure as failure:
            self._on_failure(group, failure)

    async def _recover(self, failure: ShardFailure) -> None:
        """Let what ran wait, end what lost the shards twice, and go on with the next group, when there is one."""
        lost, self._group = self._group, None
        assert lost is not None
        if failure.is_stuck:
            logger.error("What each shard did last:\n%s", lost.progress.describe())
        self._report.abandoned(self._in_flight)
        self._in_flight.clear()
        culprits = self._scheduler.start_over()
        while self._publisher.has_work:
            await self._publish_slice()
        for sequence in culprits:
            self._publisher.cancel(sequence.sequence_id, GenerationError("the shards were lost twice while it ran"))
        try:
            group = await self._supply.next_group(failure, self._scheduler.grammars)
        finally:
            await lost.shards.abandon()
        self._scheduler.blocks.clear(group.num_blocks)
        self._use(group)
        self._processes.shards_restarted()
        logger.info("The shards are back; %d sequences go on or begin", self._scheduler.num_unfinished)

    async def _watch(self) -> None:
        """Look now and then whether a shard is stuck; an idle one gets a probe."""
        stuck: tuple[ShardGroup, int] | None = None
        while True:
            await asyncio.sleep(PROBE_INTERVAL_S)
            self._garbage.collect_all(self._is_idle)
            group = self._group
            if group is None:
                continue
            if self._failure is not None:
                await group.shards.abandon()  # a plan that a stuck shard does not read holds the loop up
                continue
            was_stuck, rank = stuck, group.progress.stuck_rank(self._unanswered())
            stuck = None if rank is None else (group, rank)
            # Twice in a row, or what was stopped together with this process would count as stuck.
            if stuck is not None and stuck == was_stuck:
                self._on_failure(group, ShardFailure(f"shard {rank} makes no progress", is_stuck=True))
            elif stuck is None and self._is_idle:
                self._is_probe_due = True
                self._wakeup.set()

    @property
    def _is_idle(self) -> bool:
        """Nothing runs or waits to be handed out. While results wait for that, there can be a batch and no plan."""
        return not (self._in_flight or self._scheduler.running or self._publisher.has_work)

    def _unanswered(self) -> list[PlanInFlight]:
        """The plans that the shards owe a result, oldest first."""
        return list(self._in_flight)[len(self._results) :]

    def _receive(self) -> None:
        sent, (result, result_ns) = self._in_flight.popleft(), self._results.popleft()
        self._report.received(result)
        self._timing.ended(sent, result, result_ns)
        self.live.note_step(sent, result_ns)
        self._publisher.put(sent, result, result_ns, self._scheduler.update(result))

    async def _publish_slice(self) -> None:
        started_ns = time.monotonic_ns()
        self._publisher.publish_slice()
        self._timing.published(time.monotonic_ns() - started_ns)
        self._garbage.collect_young(is_resting=False)
        await asyncio.sleep(0)  # results and requests may have come

    async def _fill_pipeline(self) -> None:
        """Send plans while there is room for them and they are due; a probe, if it is, to idle shards.

        By a probe too the shards compute what is in the batch.
        """
        await self._send_plans()
        if self._is_probe_due and self._is_idle and self._failure is None:
            await self._send(self._scheduler.probe())
        self._is_probe_due = False

    async def _send_plans(self) -> None:
        """Results that wait to be handed out hold plans back, so that they cannot pile up before fast shards."""
        while (
            self._failure is None
            and len(self._in_flight) < MAX_PLANS_IN_FLIGHT
            and self._publisher.num_waiting <= MAX_RESULTS_BEHIND
        ):
            was_held = self._due is not None and bool(self._in_flight)
            if self._hold_back():
                return
            if (plan := self._scheduler.schedule()) is None:
                return
            await self._send(plan, is_held=was_held)

    def _hold_back(self) -> bool:
        """Whether the plan behind the running step is not due yet; the loop is then woken when it is."""
        if self._due is not None:
            self._due.cancel()
            self._due = None
        if not self._in_flight:
            return False
        now_ns = time.monotonic_ns()
        due_ns = self._timing.due_ns(self._in_flight[0], now_ns)
        if due_ns <= now_ns:
            return False
        self._due = asyncio.get_running_loop().call_later((due_ns - now_ns) / 1e9, self._wakeup.set)
        return True

    async def _send(self, plan: StepPlan, is_held: bool = False) -> None:
        assert self._group is not None
        now_ns = time.monotonic_ns()
        self._in_flight.append(PlanInFlight(plan, now_ns, is_held))
        self._report.sent(plan)
        for new in plan.new_sequences:
            if (output := self._publisher.get(new.sequence_id)) is not None:
                output.stream.note_scheduled(now_ns, output.sequence.num_cached_tokens)
        await self._group.shards.send(plan)


async def start_engine(config: RouterConfig, tokenizer: Tokenizer, metrics: Metrics) -> Engine:
    """Get the first group of shards ready, derive the limits and start the engine.

    Raises ShardFailure when a shard does not answer or the limits do not fit its memory, and InvalidLimits when
    they contradict the model.
    """
    link = LauncherLink()
    await link.open(config.launcher_fd)
    supply = ShardSupply(config, tokenizer, link)
    group, limits = await supply.first_group()
    blocks = BlockManager(group.num_blocks, group.info.block_size, config.prefix_caching)
    scheduler = Scheduler(step_limits(config, group.info), blocks, tokenizer.eos_token_ids)
    metrics.set_limits(limits.max_input_tokens, limits.max_total_tokens)
    info = group.info
    metrics.processes.set_model(
        config.model_id, config.model_sha or "", info.dtype, info.device_name, config.world_size
    )
    num_tokens = group.num_blocks * info.block_size
    metrics.memory.set_capacity(num_tokens)
    engine = Engine(scheduler, supply, group, tokenizer, metrics, limits, queue_limits(config, num_tokens))
    engine.start()
    return engine
