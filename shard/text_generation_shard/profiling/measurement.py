"""One case: steady steps without a profiler, whose times count, and then some with one, which say where time went."""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from text_generation_shard.profiling.plan_feed import PlanFeed, TimedResult, TimedRunner
from text_generation_shard.profiling.scripted_router import ScriptedRouter
from text_generation_shard.profiling.trace_summary import (
    Activity,
    busy_us,
    read_trace,
    split_steps,
    step_times,
    times_by_kernel,
)
from text_generation_shard.step import StepPlan

# The first steps of a kind compile, and the pipeline fills.
NUM_WARM_UP_STEPS = 8
NUM_FIRST_LEFT_OUT = 2


@dataclass(frozen=True)
class Case:
    """A steady load: so many sequences decode, and each step a whole prompt joins if `prompt_length` is not 0."""

    num_sequences: int
    prompt_length: int = 0

    @property
    def name(self) -> str:
        """As it is printed."""
        decode = f"decode {self.num_sequences}"
        return f"{decode} + prompt {self.prompt_length}" if self.prompt_length else decode


@dataclass(frozen=True)
class Extent:
    """How long to measure."""

    context: int  # tokens of each sequence, about
    num_steps: int
    num_traced_steps: int


class Measurement:
    """Runs cases one after the other; a case keeps the sequences of the one before that it can use."""

    def __init__(self, runner: TimedRunner, feed: PlanFeed, router: ScriptedRouter, is_gpu: bool) -> None:
        self._runner = runner
        self._feed = feed
        self._router = router
        self._activities = [ProfilerActivity.CUDA if is_gpu else ProfilerActivity.CPU]

    def run(self, case: Case, extent: Extent, trace_path: Path | None = None) -> dict[str, Any]:
        """The case's figures, ready for JSON; the profiler's trace is kept at `trace_path`."""
        self._feed.run(self._router.bring_to(case.num_sequences, extent.context))
        self._feed.run(self._plans(case, NUM_WARM_UP_STEPS))
        del self._runner.launch_ns[:]
        results = self._feed.run(self._plans(case, extent.num_steps))
        untraced = untraced_figures(results, self._runner.launch_ns)
        activities = self._trace(lambda: self._feed.run(self._plans(case, extent.num_traced_steps)), trace_path)
        traced = traced_figures(activities, extent.num_traced_steps)
        return {"name": case.name, **asdict(case), "untraced": untraced, "traced": traced}

    def _plans(self, case: Case, count: int) -> Iterator[StepPlan]:
        if case.prompt_length:
            yield from self._router.mixed(count, case.prompt_length)
        else:
            for _ in range(count):
                yield self._router.plan()

    def _trace(self, run: Callable[[], object], trace_path: Path | None) -> list[Activity]:
        """What the device did during `run`; the profiler is turned on and off in the loop's thread."""
        profiler = profile(activities=self._activities)
        self._feed.loop.call(profiler.start, RuntimeError)
        run()
        self._feed.loop.call(_synchronize, RuntimeError)
        self._feed.loop.call(profiler.stop, RuntimeError)
        with tempfile.TemporaryDirectory() as name:
            path = trace_path or Path(name, "trace.json")
            profiler.export_chrome_trace(str(path))
            return read_trace(path)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def untraced_figures(results: list[TimedResult], launch_ns: list[int]) -> dict[str, Any]:
    """Times of steps as the router and the device's own events saw them, in microseconds."""
    received = [timed.received_ns for timed in results]
    intervals = [(after - before) / 1e3 for before, after in pairwise(received)][NUM_FIRST_LEFT_OUT:]
    device = [(timed.result.forward_ns + timed.result.sample_ns) / 1e3 for timed in results]
    return {
        "num_steps": len(results),
        "num_tokens": int(np.median([timed.result.num_tokens for timed in results])),
        "interval_us": spread(intervals),
        "device_us": spread(device[NUM_FIRST_LEFT_OUT:]),
        "layers_us": spread([timed.result.forward_ns / 1e3 for timed in results]),
        "head_us": spread([timed.result.sample_ns / 1e3 for timed in results]),
        "host_launch_us": spread([duration / 1e3 for duration in launch_ns]),
    }


def traced_figures(activities: list[Activity], num_steps: int) -> dict[str, Any]:
    """Times by kernel and idle times of the device, in microseconds.

    `steps` is null where the copies by which steps are told apart are not those of so many steps.
    """
    figures: dict[str, Any] = {"num_steps": num_steps, "steps": None}
    if activities:
        span = max(activity.end_us for activity in activities) - activities[0].start_us
        figures |= {"span_us": span, "idle_us": span - busy_us(activities)}
    steps = split_steps(activities)
    if len(steps) == num_steps:
        times = step_times(steps)[NUM_FIRST_LEFT_OUT:]
        figures["steps"] = {
            "duration_us": spread([time.duration_us for time in times]),
            "idle_inside_us": spread([time.idle_us for time in times]),
            "idle_between_us": spread([time.idle_before_us for time in times]),
        }
    figures["kernels"] = [
        {**asdict(kernel), "us_per_step": kernel.total_us / num_steps} for kernel in times_by_kernel(activities)
    ]
    return figures


def spread(values: list[float]) -> dict[str, float] | None:
    """Median, 99th percentile and largest; None of nothing."""
    if not values:
        return None
    p50, p99 = np.percentile(values, [50, 99])
    return {"p50": round(float(p50), 2), "p99": round(float(p99), 2), "max": round(max(values), 2)}
