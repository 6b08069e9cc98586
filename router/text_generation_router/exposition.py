"""Counters, gauges and histograms, and their Prometheus text (format 0.0.4).

Counters keep their bare names, as TGI's dashboards ask for them: no `_total`, no `_created`. One event loop writes
and reads, so nothing is locked.
"""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import TypeVar

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
DURATION_BOUNDS = [0.00015 * 1.5**i for i in range(35)]  # seconds
_ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})


def label(name: str, value: str) -> str:
    """One label of a sample; any text may be its value."""
    return f'{name}="{value.translate(_ESCAPES)}"'


def _number(value: float) -> str:
    """A sample or bound as text: whole numbers without a fraction, others so that they read back exactly."""
    return str(int(value)) if value == int(value) else repr(value)


class Counter:
    """A number that only grows."""

    kind = "counter"

    def __init__(self) -> None:
        self.value = 0

    def add(self, amount: int = 1) -> None:
        """Count `amount` more."""
        self.value += amount

    def set_total(self, total: int) -> None:
        """Take over a total that is counted elsewhere."""
        self.value = total

    def lines(self, name: str, labels: str) -> Iterable[str]:
        """The sample's line; `labels` are `key="value"`, or empty."""
        yield f"{name}{{{labels}}} {self.value}" if labels else f"{name} {self.value}"


class Gauge:
    """A number that is what it is now."""

    kind = "gauge"

    def __init__(self) -> None:
        self.value: float = 0

    def set(self, value: float) -> None:
        """Replace the value."""
        self.value = value

    def lines(self, name: str, labels: str) -> Iterable[str]:
        """The sample's line; `labels` are `key="value"`, or empty."""
        text = _number(self.value)
        yield f"{name}{{{labels}}} {text}" if labels else f"{name} {text}"


class Histogram:
    """Observations counted by upper bound."""

    kind = "histogram"

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = list(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0
        self._bucket_prefixes: list[str] | None = None

    def set_bounds(self, bounds: Sequence[float]) -> None:
        """Replace the bounds; only before the first observation."""
        assert not any(self._counts), "bounds are set before anything is observed"
        self._bounds = list(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._bucket_prefixes = None

    @property
    def counts(self) -> Sequence[int]:
        """Observations so far in each bucket alone, the last one above all bounds; a copy."""
        return self._counts.copy()

    @property
    def sum(self) -> float:
        """All observed values together."""
        return self._sum

    def observe(self, value: float, count: int = 1) -> None:
        """Count `value`, `count` times."""
        self._counts[bisect_left(self._bounds, value)] += count
        self._sum += value * count

    def lines(self, name: str, labels: str) -> Iterable[str]:
        """The cumulative buckets, the sum and the count; `labels` are `key="value"`, or empty."""
        if self._bucket_prefixes is None:
            start = f"{name}_bucket{{{labels}{',' if labels else ''}le="
            bounds = [_number(bound) for bound in self._bounds] + ["+Inf"]
            self._bucket_prefixes = [f'{start}"{bound}"}} ' for bound in bounds]
        total = 0
        for prefix, count in zip(self._bucket_prefixes, self._counts, strict=True):
            total += count
            yield prefix + str(total)
        braces = f"{{{labels}}}" if labels else ""
        yield f"{name}_sum{braces} {_number(self._sum)}"
        yield f"{name}_count{braces} {total}"


Instrument = Counter | Gauge | Histogram
InstrumentType = TypeVar("InstrumentType", Counter, Gauge, Histogram)


class Registry:
    """All families of one process, in the order in which they were added."""

    def __init__(self) -> None:
        self._families: dict[str, tuple[str, str, list[tuple[str, Instrument]]]] = {}

    def add(self, name: str, help_text: str, instrument: InstrumentType, labels: str = "") -> InstrumentType:
        """Expose `instrument` under `name`; several with one name differ by `labels`, as `label` writes one."""
        _, _, series = self._families.setdefault(name, (instrument.kind, help_text, []))
        series.append((labels, instrument))
        return instrument

    def counter(self, name: str, help_text: str) -> Counter:
        """A counter without labels."""
        return self.add(name, help_text, Counter())

    def counters(self, name: str, help_text: str, key: str, values: Iterable[str]) -> dict[str, Counter]:
        """A counter for each value of a label."""
        return {value: self.add(name, help_text, Counter(), label(key, value)) for value in values}

    def gauge(self, name: str, help_text: str) -> Gauge:
        """A gauge without labels."""
        return self.add(name, help_text, Gauge())

    def gauges(self, name: str, help_text: str, key: str, values: Iterable[str]) -> dict[str, Gauge]:
        """A gauge for each value of a label."""
        return {value: self.add(name, help_text, Gauge(), label(key, value)) for value in values}

    def sizes(self, name: str, help_text: str, bounds: Sequence[float]) -> Histogram:
        """A histogram without labels."""
        return self.add(name, help_text, Histogram(bounds))

    def duration(self, name: str, help_text: str) -> Histogram:
        """A histogram of seconds."""
        return self.sizes(name, help_text, DURATION_BOUNDS)

    def durations(self, name: str, help_text: str, key: str, values: Iterable[str]) -> dict[str, Histogram]:
        """A histogram of seconds for each value of a label."""
        return {value: self.add(name, help_text, Histogram(DURATION_BOUNDS), label(key, value)) for value in values}

    def text(self) -> str:
        """The exposition."""
        lines: list[str] = []
        for name, (kind, help_text, series) in self._families.items():
            lines += (f"# HELP {name} {help_text}", f"# TYPE {name} {kind}")
            for labels, instrument in series:
                lines += instrument.lines(name, labels)
        return "\n".join(lines) + "\n"
