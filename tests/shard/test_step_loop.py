"""The order in which the step loop does things, with a runner that only notes what it is told."""

import pytest
from text_generation_shard import step_loop
from text_generation_shard.model_runner import StepInFlight
from text_generation_shard.step import StepPlan, StepResult
from text_generation_shard.step_loop import PlanStream, StepLoop


class NotingRunner:
    """Launches nothing, and every step has ended at once."""

    overlaps = True

    def __init__(self) -> None:
        self.notes: list[str] = []

    def launch(self, plan: StepPlan) -> StepInFlight:
        self.notes.append(f"launch {plan.step}")
        return StepInFlight(plan.step, {}, 0)

    def finish(self, step: StepInFlight) -> StepResult:
        self.notes.append(f"finish {step.step}")
        return StepResult(step.step)

    def choose_tokens(self) -> None:
        pass

    def clear(self) -> None:
        pass

    def collect_garbage(self) -> None:
        self.notes.append("collect")


def test_garbage_is_collected_only_when_nothing_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_loop, "IDLE_POLL_S", 0.0)
    monkeypatch.setattr(step_loop, "DEVICE_POLL_S", 0.0)
    runner, stream = NotingRunner(), PlanStream()
    loop = StepLoop(runner, rank=0, world_size=1)  # type: ignore[arg-type]
    loop.open(stream, timeout_s=0.0)
    loop._next_task()()  # a fresh batch
    for step in (1, 2):
        loop.submit(stream, StepPlan(step))
        for _ in range(2):
            loop._next_task()()
    assert runner.notes == ["launch 1", "finish 1", "launch 2", "finish 2"]
    loop._next_task()()
    assert runner.notes[4:] == ["collect"]
