"""Runs the router with nothing recorded: `silent_router.py ROUTER_ARGUMENTS`. What metrics cost is the difference.

Every call that tells the metrics anything does nothing; only the publisher still counts the gaps between tokens.
"""

from text_generation_router.__main__ import main
from text_generation_router.api.open_requests import OpenRequests
from text_generation_router.memory_metrics import MemoryMetrics
from text_generation_router.request_metrics import RequestMetrics
from text_generation_router.step_metrics import StepMetrics
from text_generation_router.step_report import StepReport
from text_generation_router.token_metrics import TokenMetrics

RECORDING = (RequestMetrics, TokenMetrics, StepMetrics, MemoryMetrics, StepReport, OpenRequests)


def do_nothing(*arguments: object, **named: object) -> None:
    """In the place of what records."""


def silence() -> None:
    """Take everything out that records."""
    for owner in RECORDING:
        for name, function in list(vars(owner).items()):
            if callable(function) and not name.startswith("_"):
                setattr(owner, name, do_nothing)


if __name__ == "__main__":
    silence()
    main()
