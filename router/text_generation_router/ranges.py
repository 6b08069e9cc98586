"""The ranges of a request's numbers: the one table that validation checks and that the API's document shows."""

from dataclasses import dataclass
from typing import Any, Protocol

from text_generation_router.config import RouterConfig

MAX_SEED = 2**64 - 1


class InputLimit(Protocol):
    """The part of the limits that a parameter may reach."""

    @property
    def max_input_tokens(self) -> int:
        """Longest prompt."""


@dataclass(frozen=True)
class Range:
    """The numbers a parameter may have. `flag` is what sets the maximum of a server."""

    minimum: float | None = None
    maximum: float | None = None
    excludes_bounds: bool = False
    flag: str | None = None

    def refusal(self, value: float) -> str | None:
        """What to tell a client whose value is outside; None when it is inside."""
        is_low = self.minimum is not None and not self._is_above(value, self.minimum)
        is_high = self.maximum is not None and not self._is_above(self.maximum, value)
        return f"must be {self}. Given: {value}" if is_low or is_high else None

    def _is_above(self, value: float, bound: float) -> bool:
        return value > bound if self.excludes_bounds else value >= bound

    def __str__(self) -> str:
        if (self.minimum, self.maximum) == (0, None) and self.excludes_bounds:
            return "strictly positive"
        mark = "" if self.excludes_bounds else "="
        bounds = []
        if self.minimum is not None:
            bounds.append(f">{mark} {self.minimum}")
        if self.maximum is not None:
            bounds.append(f"<{mark} {self.maximum}")
        return " and ".join(bounds)

    def json_schema(self) -> dict[str, Any]:
        """The same as keywords of JSON Schema."""
        names = ("exclusiveMinimum", "exclusiveMaximum") if self.excludes_bounds else ("minimum", "maximum")
        bounds = dict(zip(names, (self.minimum, self.maximum), strict=True))
        return {name: bound for name, bound in bounds.items() if bound is not None}


def request_ranges(config: RouterConfig, limits: InputLimit) -> dict[str, Range]:
    """The range of each number of GenerationOptions, in the order in which they are checked."""
    positive = Range(0, excludes_bounds=True)
    open_unit = Range(0.0, 1.0, excludes_bounds=True)
    penalty = Range(-2.0, 2.0)
    # Each run counts as a request.
    runs = Range(1, min(config.max_best_of, config.max_concurrent_requests), flag="--max-best-of")
    return {
        "temperature": positive,
        "repetition_penalty": positive,
        "frequency_penalty": penalty,
        "presence_penalty": penalty,
        "share_penalty": penalty,
        "top_p": open_unit,
        "typical_p": open_unit,
        "min_p": Range(0.0, 1.0),
        "top_k": positive,
        "max_new_tokens": positive,
        "min_tokens": Range(0),
        "best_of": runs,
        "n": runs,
        "top_n_tokens": Range(0, config.max_top_n_tokens, flag="--max-top-n-tokens"),
        "truncate": Range(1, limits.max_input_tokens, flag="--max-input-tokens"),
        "seed": Range(0, MAX_SEED),
        "priority": Range(-100, 100),
    }
