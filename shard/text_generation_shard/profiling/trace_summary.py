"""Reduces a profiler's trace to times by kernel, and to the time in which the device did nothing.

Reads the trace as Chrome's format has it: events with a category, a start and a duration in microseconds. A step of
the GPU's begins with the copy of its inputs to the device and ends with the copy of its tokens back.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GPU_CATEGORIES = frozenset({"kernel", "gpu_memcpy", "gpu_memset"})
CPU_CATEGORIES = frozenset({"cpu_op"})  # without a GPU, operations stand for kernels
TO_DEVICE, TO_HOST = "Memcpy HtoD", "Memcpy DtoH"
MAX_NAME = 100


@dataclass(frozen=True)
class Activity:
    """Something that the device did."""

    name: str
    start_us: float
    end_us: float


@dataclass(frozen=True)
class KernelTime:
    """All launches of one name."""

    name: str
    count: int
    mean_us: float
    total_us: float


@dataclass(frozen=True)
class StepTime:
    """One step on the device."""

    duration_us: float  # from its first activity's start to its last one's end
    idle_us: float  # of that
    idle_before_us: float  # since the step ahead of it; of the first: 0


def read_trace(path: Path) -> list[Activity]:
    """What the device did, in order; the CPU's operations if there was no device."""
    events: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
    for categories in (GPU_CATEGORIES, CPU_CATEGORIES):
        found = [
            Activity(event["name"][:MAX_NAME], float(event["ts"]), float(event["ts"]) + float(event["dur"]))
            for event in events
            if event.get("ph") == "X" and event.get("cat") in categories
        ]
        if found:
            return sorted(found, key=lambda activity: activity.start_us)
    return []


def times_by_kernel(activities: Sequence[Activity]) -> list[KernelTime]:
    """The one that took longest in all comes first."""
    durations: dict[str, list[float]] = {}
    for activity in activities:
        durations.setdefault(activity.name, []).append(activity.end_us - activity.start_us)
    times = [KernelTime(name, len(each), sum(each) / len(each), sum(each)) for name, each in durations.items()]
    return sorted(times, key=lambda time: -time.total_us)


def busy_us(activities: Sequence[Activity]) -> float:
    """Time in which at least one of them ran; they are in order of their starts."""
    busy, until = 0.0, float("-inf")
    for activity in activities:
        busy += max(0.0, activity.end_us - max(until, activity.start_us))
        until = max(until, activity.end_us)
    return busy


def split_steps(activities: Sequence[Activity]) -> list[list[Activity]]:
    """Part them into steps: one begins with the first copy to the device after a copy back, or at the start."""
    steps: list[list[Activity]] = []
    is_ended = True
    for activity in activities:
        if is_ended and activity.name.startswith(TO_DEVICE):
            steps.append([])
            is_ended = False
        is_ended = is_ended or activity.name.startswith(TO_HOST)
        if steps:
            steps[-1].append(activity)
    return steps


def step_times(steps: Sequence[Sequence[Activity]]) -> list[StepTime]:
    """How long each step took, and how long nothing ran in it and before it."""
    times: list[StepTime] = []
    last_end_us: float | None = None
    for step in steps:
        start_us, end_us = step[0].start_us, max(activity.end_us for activity in step)
        before_us = 0.0 if last_end_us is None else max(0.0, start_us - last_end_us)
        times.append(StepTime(end_us - start_us, end_us - start_us - busy_us(step), before_us))
        last_end_us = end_us
    return times
