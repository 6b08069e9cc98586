"""The step loop: the main thread runs what the service's threads hand it, one thing at a time and in order.

Torch keeps its thread pool and the GPU its stream per thread, so everything that touches the model runs here.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from queue import Empty, SimpleQueue
from typing import TypeVar

from text_generation_shard.model_runner import ModelRunner, StepInFlight
from text_generation_shard.step import PlanError, StepPlan, StepResult

logger = logging.getLogger(__name__)

T = TypeVar("T")

# One plan runs while the next one waits; a further one is not read from the socket yet.
MAX_PLANS_IN_FLIGHT = 2

# A signal that arrives in the instant before the queue's wait begins does not end that wait: Python runs its handler
# once the wait is over. Garbage is collected after such a wait, too: right after the last step a search for it, which
# takes milliseconds, would hold up a request that follows closely.
IDLE_POLL_S = 0.2

# How often the loop looks whether the device has ended a step, while it waits for the plan of the next one.
DEVICE_POLL_S = 0.0002


def _do_nothing() -> None:
    """The task of a loop that only wants to look around."""


class FatalError(Exception):
    """Why a stream ended together with its process."""


class PlanStream:
    """One Run stream: its results wait here to be sent, and so does the reason for its end."""

    def __init__(self) -> None:
        self.is_ended = False
        self.error: PlanError | FatalError | None = None
        self.last_step = 0
        self.slots = threading.Semaphore(MAX_PLANS_IN_FLIGHT)
        self._results: SimpleQueue[StepResult | None] = SimpleQueue()

    def put(self, result: StepResult) -> None:
        """Hand a result to the thread that sends it."""
        self._results.put(result)

    def end(self, error: PlanError | FatalError | None = None) -> None:
        """Nothing follows; called again, without effect."""
        if self.is_ended:
            return
        self.error = error
        self.is_ended = True
        self._results.put(None)
        self.slots.release()

    def next_result(self) -> StepResult | None:
        """The next result; None at the end, then `error` tells why."""
        return self._results.get()


class StepLoop:
    """A queue of tasks and the loop that runs them. `submit`, `open` and `call` may be called from any thread."""

    def __init__(self, runner: ModelRunner, rank: int, world_size: int) -> None:
        self.runner = runner
        self._sends_results = rank == 0
        self._is_alone = world_size == 1
        self._tasks: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._is_stopping = False
        self._in_flight: deque[tuple[PlanStream, StepInFlight]] = deque()
        self._stream: PlanStream | None = None
        self._stream_changes = threading.Condition()

    def run(self) -> None:
        """Run tasks until `stop`; what a task raises is fatal and comes out of here."""
        try:
            while not self._is_stopping:
                self._next_task()()
            self._finish_all()
        except BaseException as error:
            self.runner.report_failure()
            self._end_stream(FatalError(f"the shard failed: {error}"))
            raise
        self._end_stream(FatalError("the shard is shutting down"))

    def _next_task(self) -> Callable[[], None]:
        """The next task; finishing the oldest step if that comes first, or if no more may be launched before.

        Where there has been none for long, collecting garbage.
        """
        if not self._in_flight:
            return self._wait_for_task(IDLE_POLL_S) or self.runner.collect_garbage
        if len(self._in_flight) < MAX_PLANS_IN_FLIGHT:
            _, oldest = self._in_flight[0]
            while not oldest.is_done():
                if task := self._wait_for_task(DEVICE_POLL_S):
                    return task
        return self._finish_oldest

    def _wait_for_task(self, timeout_s: float) -> Callable[[], None] | None:
        try:
            return self._tasks.get(timeout=timeout_s)
        except Empty:
            return None

    def stop(self) -> None:
        """End `run` after the task it is in. Safe in a signal handler."""
        self._is_stopping = True
        self._tasks.put(_do_nothing)

    def call(self, function: Callable[[], T], expected_error: type[Exception]) -> T:
        """Run a function in the loop and wait; `expected_error` is handed to the caller and nothing else is."""
        future: Future[T] = Future()
        self._tasks.put(partial(self._run_call, function, expected_error, future))
        return future.result()

    def _run_call(self, function: Callable[[], T], expected_error: type[Exception], future: Future[T]) -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)
            if not isinstance(error, expected_error):
                raise

    def open(self, stream: PlanStream, timeout_s: float) -> bool:
        """Make `stream` the one that plans come from, with an empty batch; False while another one lives."""
        with self._stream_changes:
            if not self._stream_changes.wait_for(self._has_no_stream, timeout_s):
                return False
            self._stream = stream
        self._tasks.put(self._start_afresh)
        return True

    def close(self, stream: PlanStream) -> None:
        """The stream's client is gone or answered: its plans are dropped.

        Of a stream that breaks off, the ranks of a group may have read different numbers of plans, and one may wait in
        a collective that another never enters. Nothing brings them together again, so the process ends.
        """
        if not stream.is_ended and not self._is_alone:
            self._tasks.put(self._lose_group)
        stream.end()
        with self._stream_changes:
            self._stream_changes.notify_all()

    def _lose_group(self) -> None:
        raise FatalError("the stream of plans broke off, and the other ranks may have read more or less of it")

    def _has_no_stream(self) -> bool:
        return self._stream is None or self._stream.is_ended

    def _end_stream(self, error: FatalError) -> None:
        with self._stream_changes:
            if self._stream is not None:
                self._stream.end(error)

    def submit(self, stream: PlanStream, plan: StepPlan | PlanError | None) -> None:
        """Queue a plan, or the end of the plans and why; waits while two are in flight."""
        stream.slots.acquire()
        self._tasks.put(partial(self._run_plan, stream, plan))

    def _start_afresh(self) -> None:
        """Drop what an earlier stream left behind."""
        self._finish_all()
        self.runner.clear()

    def _run_plan(self, stream: PlanStream, plan: StepPlan | PlanError | None) -> None:
        if stream.is_ended:
            return
        if not isinstance(plan, StepPlan):
            self._finish_all()
            stream.end(plan)
            return
        try:
            if plan.step != stream.last_step + 1:
                raise PlanError(f"step {plan.step} follows step {stream.last_step}")
            stream.last_step = plan.step
            self._in_flight.append((stream, self.runner.launch(plan)))
        except PlanError as error:
            logger.error("Step %d breaks the protocol: %s", plan.step, error)
            self._finish_all()
            stream.end(error)
            return
        if not self.runner.overlaps:
            self._finish_oldest()

    def _finish_all(self) -> None:
        while self._in_flight:
            self._finish_oldest()

    def _finish_oldest(self) -> None:
        stream, step = self._in_flight.popleft()
        result = self.runner.finish(step)
        if self._sends_results and not stream.is_ended:
            stream.put(result)
        self.runner.choose_tokens()  # of the step behind it, which may have waited for these
        if stream.is_ended:
            return
        stream.slots.release()
