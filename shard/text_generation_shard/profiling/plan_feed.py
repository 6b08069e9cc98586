"""Feeds plans to a step loop as the router does, two in flight, and notes when each result was there."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from text_generation_shard.model_runner import ModelRunner, StepInFlight
from text_generation_shard.step import StepPlan, StepResult
from text_generation_shard.step_loop import MAX_PLANS_IN_FLIGHT, PlanStream, StepLoop

OPEN_TIMEOUT_S = 5.0


class StepFailed(Exception):
    """The stream ended, or a sequence failed; the text says why."""


@dataclass(frozen=True)
class TimedResult:
    """A result and the moment at which the router would have had it."""

    result: StepResult
    received_ns: int


class TimedRunner(ModelRunner):
    """Notes how long the host takes to launch each step: longer than the device takes for it, and the device waits."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self.launch_ns: list[int] = []

    def launch(self, plan: StepPlan) -> StepInFlight:
        """See `ModelRunner`."""
        started = time.perf_counter_ns()
        step = super().launch(plan)
        self.launch_ns.append(time.perf_counter_ns() - started)
        return step


@dataclass
class PlanFeed:
    """One stream of plans; used from another thread than the loop's."""

    loop: StepLoop
    stream: PlanStream = field(default_factory=PlanStream)

    def open(self) -> None:
        """Begin with an empty batch."""
        if not self.loop.open(self.stream, OPEN_TIMEOUT_S):
            raise StepFailed("another stream is open")

    def run(self, plans: Iterator[StepPlan]) -> list[TimedResult]:
        """Send all plans, each as soon as two steps before it are answered; returns when nothing is in flight."""
        results: list[TimedResult] = []
        num_sent = 0
        for plan in plans:
            if num_sent - len(results) == MAX_PLANS_IN_FLIGHT:
                results.append(self._receive())
            self.loop.submit(self.stream, plan)
            num_sent += 1
        while len(results) < num_sent:
            results.append(self._receive())
        return results

    def _receive(self) -> TimedResult:
        result = self.stream.next_result()
        received_ns = time.perf_counter_ns()
        if result is None:
            raise StepFailed(str(self.stream.error))
        if result.failures:
            raise StepFailed(f"step {result.step}: {next(iter(result.failures.values()))}")
        return TimedResult(result, received_ns)
