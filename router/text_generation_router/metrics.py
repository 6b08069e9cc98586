"""What the server counts: TGI's names, buckets and labels, and names of our own. docs/operations.md lists them."""

from collections.abc import Callable

from text_generation_router.exposition import Registry
from text_generation_router.memory_metrics import MemoryMetrics
from text_generation_router.process_metrics import ProcessMetrics
from text_generation_router.request_metrics import RequestMetrics
from text_generation_router.step_metrics import StepMetrics
from text_generation_router.token_metrics import TokenMetrics


class Metrics:
    """One server's metrics. `set_limits` must be called before the first request."""

    def __init__(self) -> None:
        self._registry = Registry()
        self._refresh: list[Callable[[], None]] = []
        self.requests = RequestMetrics(self._registry)
        self.tokens = TokenMetrics(self._registry)
        self.steps = StepMetrics(self._registry)
        self.memory = MemoryMetrics(self._registry)
        self.processes = ProcessMetrics(self._registry)

    def set_limits(self, max_input_tokens: int, max_total_tokens: int) -> None:
        """Fit the buckets of token counts to the limits, once these are known."""
        self.requests.set_limits(max_input_tokens, max_total_tokens)

    def on_scrape(self, refresh: Callable[[], None]) -> None:
        """Have `refresh` bring values up to date whenever they are asked for."""
        self._refresh.append(refresh)

    def text(self) -> str:
        """The exposition, text format 0.0.4."""
        for refresh in self._refresh:
            refresh()
        self.tokens.balance()
        return self._registry.text()
