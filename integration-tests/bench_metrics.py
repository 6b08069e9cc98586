"""Measures what recording costs.

    python integration-tests/bench_metrics.py [--steps 2000]

Prints JSON lines: what one more token of a step costs, and a step without tokens, a request, and a look at all metrics.
Steps are measured on the engine's own path from a plan to the last token handed out, to outputs that do nothing: an
upper bound, for it has the publisher's own loop in it. Runs in this process alone.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from text_generation_router.block_manager import BlockManager
from text_generation_router.metrics import Metrics
from text_generation_router.publisher import Publisher
from text_generation_router.scheduler import Progress, Scheduler, SchedulerLimits
from text_generation_router.sequence import Sequence
from text_generation_router.step import PlanInFlight, StepPlan, StepResult
from text_generation_router.step_report import StepReport
from text_generation_router.token_stream import Timings
from text_generation_router.valid_request import ValidRequest

FEW_SEQUENCES, MANY_SEQUENCES = 1, 256
ROUNDS = 5


class SilentOutput:
    """Takes tokens and does nothing: what is left is the publisher and what it records."""

    finish_reason = None

    def __init__(self, sequence: Sequence) -> None:
        self.sequence = sequence
        self.stream = SimpleNamespace(num_unread_bytes=0)
        self.last_token_ns = 0

    def push(self, token_id: int, logprob: float, reason: object, top_tokens: object) -> None:
        pass

    def publish(self) -> None:
        pass


def step_ns(num_sequences: int, num_steps: int) -> float:
    """The mean duration of handing out one step."""
    metrics = Metrics()
    metrics.set_limits(100, 100)
    scheduler = Scheduler(SchedulerLimits(1024, 512), BlockManager(64, 16), frozenset())
    report = StepReport(metrics, scheduler)
    publisher = Publisher(scheduler, report)
    sequences = [Sequence(number, ValidRequest([1], 1)) for number in range(num_sequences)]
    for sequence in sequences:
        publisher.add(SilentOutput(sequence))  # type: ignore[arg-type]
    progress = [Progress(sequence, 1, -0.5, None) for sequence in sequences]
    ids = [sequence.sequence_id for sequence in sequences]
    plan = StepPlan(1, num_decode_tokens=num_sequences)
    result = StepResult(1, ids, ids, [0.0] * num_sequences, forward_ns=5_000_000, sample_ns=100_000)
    started_ns = time.perf_counter_ns()
    for step in range(num_steps):
        result_ns = step * 6_000_000
        report.sent(plan)
        report.received(result)
        publisher.put(PlanInFlight(plan, result_ns - 5_000_000), result, result_ns, progress)
        publisher.publish_slice()
    return (time.perf_counter_ns() - started_ns) / num_steps


def median_ns(function: Callable[[], Any], count: int) -> float:
    """The median over rounds of the mean duration of a call."""
    rounds = []
    for _ in range(ROUNDS):
        started_ns = time.perf_counter_ns()
        for _ in range(count):
            function()
        rounds.append((time.perf_counter_ns() - started_ns) / count)
    return statistics.median(rounds)


def request_cost(metrics: Metrics) -> Callable[[], None]:
    """All that is recorded of one request."""
    timings = Timings(1, 1_000_000, 2_000_000, 3_000_000, 20_000_000, 900_000_000)

    def record() -> None:
        metrics.requests.arrived()
        metrics.requests.validated(50, 60)
        metrics.requests.first_token_read(0.02)
        metrics.requests.succeeded()
        metrics.requests.generated(timings, 60)

    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    num_steps = parser.parse_args().steps
    few_ns, many_ns = (
        statistics.median(step_ns(count, num_steps) for _ in range(ROUNDS)) for count in (FEW_SEQUENCES, MANY_SEQUENCES)
    )
    token_ns = (many_ns - few_ns) / (MANY_SEQUENCES - FEW_SEQUENCES)
    print(json.dumps({"name": "token", "ns": round(token_ns)}))
    print(json.dumps({"name": "step", "ns": round(few_ns - FEW_SEQUENCES * token_ns)}))
    metrics = Metrics()
    metrics.set_limits(100, 100)
    print(json.dumps({"name": "request", "ns": round(median_ns(request_cost(metrics), 10_000))}))
    print(json.dumps({"name": "scrape", "ns": round(median_ns(metrics.text, 100))}))


if __name__ == "__main__":
    main()
