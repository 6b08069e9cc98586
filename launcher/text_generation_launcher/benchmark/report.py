"""The figures: percentiles of TTFT, TPOT, ITL and end-to-end latency, throughput, goodput, and the knee of a sweep.

TTFT: request sent -> first token. ITL: gaps between the events of one stream that brought tokens. End to end:
request sent -> last token. TPOT: (end to end - TTFT) / (tokens - 1), of each request with more than one token.
Failed and short requests are counted and left out of everything else.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from text_generation_launcher.benchmark.client import Record
from text_generation_launcher.benchmark.load import LoadResult, Pace

PERCENTILES = (50, 95, 99)
LATENCIES = ("ttft", "tpot", "itl", "e2e")
ITL_PERCENTILE_OF_SLO = 99


@dataclass(frozen=True)
class Targets:
    """What a request must meet to count as goodput; None: no demand."""

    ttft_ms: float | None = None
    itl_ms: float | None = None

    @property
    def are_set(self) -> bool:
        """Whether there is any demand."""
        return self.ttft_ms is not None or self.itl_ms is not None

    def are_met(self, record: Record) -> bool:
        """Whether one good request met them: its TTFT, and the 99th percentile of its own gaps."""
        if self.ttft_ms is not None and ttft_ms(record) > self.ttft_ms:
            return False
        gaps = sorted(itl_ms(record))
        return self.itl_ms is None or not gaps or percentile(gaps, ITL_PERCENTILE_OF_SLO) <= self.itl_ms


@dataclass(frozen=True)
class Summary:
    """One load's figures. `latencies_ms` by name and percentile; NaN where nothing was measured."""

    name: str
    pace: Pace
    num_requests: int
    num_failed: int
    num_short: int
    wall_s: float
    requests_per_s: float
    prompt_tokens_per_s: float
    output_tokens_per_s: float
    mean_e2e_ms: float
    latencies_ms: dict[str, dict[int, float]]
    goodput_requests_per_s: float | None
    client_cpu_us_per_token: float
    first_error: str | None

    @property
    def is_clean(self) -> bool:
        """Whether every request brought what it was asked for."""
        return not self.num_failed and not self.num_short

    def as_json(self) -> dict[str, Any]:
        """Flat names with units; null where nothing was measured."""
        flat = {
            f"{name}_p{percent}_ms": value
            for name, by_percent in self.latencies_ms.items()
            for percent, value in by_percent.items()
        }
        values = {
            "name": self.name,
            "load": self.pace.label,
            "concurrency": self.pace.concurrency,
            "rate": self.pace.rate,
            "requests": self.num_requests,
            "failed": self.num_failed,
            "short": self.num_short,
            "wall_s": self.wall_s,
            "req_s": self.requests_per_s,
            "prompt_tok_s": self.prompt_tokens_per_s,
            "out_tok_s": self.output_tokens_per_s,
            "goodput_req_s": self.goodput_requests_per_s,
            **flat,
            "e2e_mean_ms": self.mean_e2e_ms,
            "client_cpu_us_per_token": self.client_cpu_us_per_token,
            "first_error": self.first_error,
        }
        return {key: _rounded(value) for key, value in values.items()}

    def as_text(self) -> str:
        """A few lines for people."""
        counts = f"{self.num_requests} requests, {self.num_failed} failed, {self.num_short} short"
        goodput = self.goodput_requests_per_s
        lines = [
            f"{self.name} ({self.pace.label}): {counts}, {self.wall_s:.2f} s",
            f"  throughput  {self.requests_per_s:.2f} req/s, {self.output_tokens_per_s:.1f} tok/s out, "
            f"{self.prompt_tokens_per_s:.1f} tok/s in" + ("" if goodput is None else f", goodput {goodput:.2f} req/s"),
        ]
        for name, by_percent in self.latencies_ms.items():
            figures = ", ".join(f"p{percent} {value:.2f}" for percent, value in by_percent.items())
            lines.append(f"  {name.upper():<10}  {figures} ms")
        lines.append(f"  this client took {self.client_cpu_us_per_token:.1f} us of CPU a token")
        if self.first_error is not None:
            lines.append(f"  first error: {self.first_error}")
        return "\n".join(lines)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 4) if math.isfinite(value) else None
    return value


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The percentile of an ordered list, interpolated between neighbours; NaN for an empty one."""
    if not ordered:
        return math.nan
    place = (len(ordered) - 1) * percent / 100
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def ttft_ms(record: Record) -> float:
    """Time to first token."""
    return (record.times_ns[0] - record.start_ns) / 1e6


def e2e_ms(record: Record) -> float:
    """Time to last token."""
    return (record.times_ns[-1] - record.start_ns) / 1e6


def tpot_ms(record: Record) -> float:
    """Time per output token after the first; there must be more than one."""
    return (e2e_ms(record) - ttft_ms(record)) / (record.num_tokens - 1)


def itl_ms(record: Record) -> list[float]:
    """The gaps of one stream."""
    times = record.times_ns
    return [(times[index] - times[index - 1]) / 1e6 for index in range(1, len(times))]


def summarize(name: str, pace: Pace, result: LoadResult, targets: Targets) -> Summary:
    """Compute the figures of one load."""
    records = result.records
    good = [record for record in records if record.is_good]
    errors = [record.error for record in records if record.error is not None]
    errors += [f"{r.num_tokens} tokens came instead of {r.num_wanted}" for r in records if r.is_short]
    wall_s = (max(record.end_ns for record in records) - min(record.start_ns for record in records)) / 1e9
    num_tokens = sum(record.num_tokens for record in good)
    samples = {
        "ttft": [ttft_ms(record) for record in good],
        "tpot": [tpot_ms(record) for record in good if record.num_tokens > 1],
        "itl": [gap for record in good for gap in itl_ms(record)],
        "e2e": [e2e_ms(record) for record in good],
    }
    latencies = {}
    for kind in LATENCIES:
        ordered = sorted(samples[kind])
        latencies[kind] = {percent: percentile(ordered, percent) for percent in PERCENTILES}
    return Summary(
        name=name,
        pace=pace,
        num_requests=len(records),
        num_failed=sum(record.error is not None for record in records),
        num_short=sum(record.is_short for record in records),
        wall_s=wall_s,
        requests_per_s=len(good) / wall_s,
        prompt_tokens_per_s=sum(record.num_prompt_tokens for record in good) / wall_s,
        output_tokens_per_s=num_tokens / wall_s,
        mean_e2e_ms=sum(samples["e2e"]) / len(good) if good else math.nan,
        latencies_ms=latencies,
        goodput_requests_per_s=sum(map(targets.are_met, good)) / wall_s if targets.are_set else None,
        client_cpu_us_per_token=result.cpu_s * 1e6 / num_tokens if num_tokens else math.nan,
        first_error=errors[0] if errors else None,
    )


def find_knee(summaries: Sequence[Summary]) -> Summary | None:
    """The load beyond which latency grows faster than throughput: where throughput / mean latency is largest.

    That ratio is Kleinrock's "power"; up to its maximum, more load brings more than it costs.
    """
    measured = [summary for summary in summaries if summary.is_clean]
    return max(measured, key=lambda summary: summary.output_tokens_per_s / summary.mean_e2e_ms, default=None)
