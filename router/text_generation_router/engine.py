"""The engine: the loop around the scheduler. Takes requests, keeps two plans in flight, publishes tokens.

A plan that is due leaves before the tokens of the last result are turned into text, so that the shards never wait for
the router's output work, which is done in short slices; one with time to spare waits for requests that still arrive
(`plan_timing.py`).
"""

import asyncio
import logging
import time
from collections import deque

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
from text_generation_router.limits import Limits, QueueLimits, derive_limits, queue_limits, step_limits
from text_generation_router.metrics import Metrics
from text_generation_router.output import SequenceOutput
from text_generation_router.plan_timing import PlanTiming
from text_generation_router.publisher import Publisher
from text_generation_router.scheduler import Scheduler, SchedulerLimits
from text_generation_router.shard_client import ShardClient, ShardFailure, ShardProcess
from text_generation_router.shard_progress import ShardProgress
from text_generation_router.step import PlanInFlight, StepPlan, StepResult
from text_generation_router.step_report import StepReport
from text_generation_router.token_stream import Timings, TokenStream
from text_generation_router.tokenizer import Tokenizer
from text_generation_router.valid_request import ValidRequest

logger = logging.getLogger(__name__)

MAX_PLANS_IN_FLIGHT = 2
MAX_RESULTS_BEHIND = 2
PROBE_INTERVAL_S = 1.0
PROBE_TIMEOUT_NS = 2_000_000_000
# A plan leaves at once; a shard that does not read any more must not hold up the end.
STOP_TIMEOUT_S = 1.0


class Engine:
    """One server's scheduler, its shards, and the streams of the requests it serves."""

    def __init__(
        self,
        scheduler: Scheduler,
        shards: ShardClient,
        progress: ShardProgress,
        tokenizer: Tokenizer,
        metrics: Metrics,
        limits: Limits,
        waiting_limits: QueueLimits = QueueLimits(),  # noqa: B008 (it is frozen)
    ) -> None:
        self.limits = limits
        self._scheduler = scheduler
        self._shards = shards
        self._progress = progress
        self._tokenizer = tokenizer
        self._report = StepReport(metrics, scheduler)
        self._publisher = Publisher(scheduler, self._report)
        self._tokens = metrics.tokens
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
        self.failed = asyncio.Event()  # the shards are lost, or the loop is: nothing can be served any more
        self._loop_task: asyncio.Task[None] | None = None
        self._watch_task: asyncio.Task[None] | None = None

    # The requests' side.

    def submit(self, request: ValidRequest, timings: Timings) -> TokenStream:
        """Queue a request, also while draining. Raises ShuttingDown after that and Unhealthy when a shard is gone.

        Raises QueueFull when too many prompt tokens wait.
        """
        if self._failure is not None:
            raise Unhealthy
        if self._is_over:
            raise ShuttingDown
        self._check_room(request)
        sequence = self._scheduler.add(request)
        timings.queued_ns = time.monotonic_ns()
        stream = TokenStream(sequence.num_prompt_tokens, sequence.sequence_id, timings)
        try:
            self._publisher.add(SequenceOutput(sequence, stream, self._tokenizer))
        except Exception:
            self._scheduler.finish(sequence)
            raise
        age_s = (timings.queued_ns - timings.received_ns) / 1e9
        if self._queue_deadlines is not None:
            self._queue_deadlines.add(sequence.sequence_id)
        if self._deadlines is not None:
            self._deadlines.add(sequence.sequence_id, age_s)
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
            limit_s = self._queue_limits.queue_timeout_s
            self._publisher.cancel(sequence_id, QueueTimeExceeded(f": the request waited longer than {limit_s:g} s"))
            self._wakeup.set()

    def _end_late(self, sequence_id: int) -> None:
        """A sequence's whole time is over."""
        self._publisher.cancel(sequence_id, DeadlineExceeded(f"{self._queue_limits.request_timeout_s:g} s"))
        self._wakeup.set()

    def num_waiting(self) -> int:
        """Sequences that are not in the batch."""
        return len(self._scheduler.waiting)

    async def prepare_grammar(self, text: str) -> str:
        """Get the shard ready for a grammar; answers "", or why no request can have it. Raises Unhealthy."""
        try:
            return await self._shards.prepare_grammar(text)
        except ShardFailure as failure:
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
        self._wakeup.set()

    def is_healthy(self) -> bool:
        """Whether every rank answers and makes progress; cheap, and true however busy the server is."""
        if self._failure is not None or self._is_draining:
            return False
        if self._progress.overdue_rank() is not None:
            return False
        if self._in_flight and self._in_flight[0].plan.is_empty:
            return time.monotonic_ns() - self._in_flight[0].sent_ns < PROBE_TIMEOUT_NS
        return True

    def shard_processes(self) -> list[ShardProcess]:
        """The processes of the ranks."""
        return self._shards.processes

    def unfinished_ids(self) -> list[int]:
        """Sequences that have not ended, by the ids that their streams have."""
        return self._scheduler.unfinished_ids()

    def _report_tokens(self) -> None:
        num_dropped = self._scheduler.num_dropped_tokens + self._publisher.num_dropped_tokens
        self._tokens.set_results(self._publisher.num_held_tokens(), num_dropped)

    # The shards' side.

    def start(self) -> None:
        """Connect to the shards' Run streams and start the loop."""
        self._shards.start(self._on_result, self._on_failure)
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
            await asyncio.wait({self._loop_task}, timeout=STOP_TIMEOUT_S)
            self._loop_task.cancel()
            self._watch_task.cancel()
            await asyncio.gather(self._loop_task, self._watch_task, return_exceptions=True)
        await self._shards.close()

    def _on_result(self, result: StepResult) -> None:
        self._results.append((result, time.monotonic_ns()))
        self._wakeup.set()

    def _on_failure(self, failure: ShardFailure) -> None:
        if self._failure is None:
            logger.error("%s", failure)
            self._failure = failure
            self._wakeup.set()

    async def _run(self) -> None:
        """The loop and its end."""
        try:
            await self._loop()
            while self._results:  # they came before the failure
                self._receive()
        except Exception as error:
            logger.exception("the engine's loop failed")
            self._on_failure(ShardFailure(f"the engine's loop failed: {error!r}"))
        finally:
            self._is_draining = True
            self._report.abandoned(self._in_flight)
            self._publisher.abandon(GenerationError("a shard failed"))
            self.failed.set()

    async def _loop(self) -> None:
        """Receive, update, schedule, send; publish while there is nothing of that to do."""
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
            self._on_failure(failure)

    async def _watch(self) -> None:
        """Look now and then whether a shard is stuck; an idle one gets a probe."""
        while self._failure is None:
            await asyncio.sleep(PROBE_INTERVAL_S)
            if (rank := self._progress.overdue_rank()) is not None:
                self._on_failure(ShardFailure(f"shard {rank}: a step ran past its deadline"))
            elif not self._in_flight:
                self._is_probe_due = True
                self._wakeup.set()
            self._garbage.collect_all(is_idle=not self._in_flight)

    def _receive(self) -> None:
        sent, (result, result_ns) = self._in_flight.popleft(), self._results.popleft()
        self._report.received(result)
        self._timing.ended(sent, result, result_ns)
        self._publisher.put(sent, result, result_ns, self._scheduler.update(result))

    async def _publish_slice(self) -> None:
        started_ns = time.monotonic_ns()
        self._publisher.publish_slice()
        self._timing.published(time.monotonic_ns() - started_ns)
        self._garbage.collect_young(is_resting=False)
        await asyncio.sleep(0)  # results and requests may have come

    async def _fill_pipeline(self) -> None:
        """Send plans while there is room for them and they are due; a probe, if it is, to shards that have none."""
        await self._send_plans()
        if self._is_probe_due and not self._in_flight:
            await self._send(self._scheduler.probe())
        self._is_probe_due = False

    async def _send_plans(self) -> None:
        """Results that wait to be handed out hold plans back, so that they cannot pile up before fast shards."""
        while len(self._in_flight) < MAX_PLANS_IN_FLIGHT and self._publisher.num_waiting <= MAX_RESULTS_BEHIND:
            was_held = self._due is not None
            if self._in_flight and self._hold_back():
                return
            if (plan := self._scheduler.schedule()) is None:
                return
            await self._send(plan, is_held=was_held)

    def _hold_back(self) -> bool:
        """Whether the plan behind the running step is not due yet; the loop is then woken when it is."""
        now_ns = time.monotonic_ns()
        due_ns = self._timing.due_ns(self._in_flight[0], now_ns)
        if self._due is not None:
            self._due.cancel()
            self._due = None
        if due_ns <= now_ns:
            return False
        self._due = asyncio.get_running_loop().call_later((due_ns - now_ns) / 1e9, self._wakeup.set)
        return True

    async def _send(self, plan: StepPlan, is_held: bool = False) -> None:
        now_ns = time.monotonic_ns()
        self._in_flight.append(PlanInFlight(plan, now_ns, is_held))
        for new in plan.new_sequences:
            if (output := self._publisher.get(new.sequence_id)) is not None:
                output.stream.note_scheduled(now_ns, output.sequence.num_cached_tokens)
        await self._shards.send(plan)
        self._report.sent(plan)


async def start_engine(config: RouterConfig, tokenizer: Tokenizer, metrics: Metrics) -> Engine:
    """Connect to the shards, warm them up, derive the limits and start the engine.

    Raises ShardFailure when a shard does not answer or the limits do not fit its memory, and InvalidLimits when
    they contradict the model.
    """
    shards = ShardClient(config.shard_uds_path, config.world_size)
    info = await shards.info()
    metrics.processes.set_model(
        config.model_id, config.model_sha or "", info.dtype, info.device_name, config.world_size
    )
    max_step_tokens, max_num_sequences = step_limits(config, info)
    num_blocks = await shards.warm_up(
        max_step_tokens, max_num_sequences, config.max_total_tokens or 0, config.max_batch_total_tokens or 0
    )
    limits = derive_limits(config, info, num_blocks)
    blocks = BlockManager(num_blocks, info.block_size, config.prefix_caching)
    scheduler = Scheduler(SchedulerLimits(max_step_tokens, max_num_sequences), blocks, tokenizer.eos_token_ids)
    metrics.set_limits(limits.max_input_tokens, limits.max_total_tokens)
    metrics.memory.set_capacity(num_blocks * info.block_size)
    tokens = tokenizer.grammar_tokens(info.vocab_size)
    if tokens is not None and not config.disable_grammar_support:
        await shards.load_vocabulary(*tokens)
    progress = ShardProgress(config.run_folder, config.world_size)
    waiting_limits = queue_limits(config, num_blocks * info.block_size)
    engine = Engine(scheduler, shards, progress, tokenizer, metrics, limits, waiting_limits)
    engine.start()
    return engine
