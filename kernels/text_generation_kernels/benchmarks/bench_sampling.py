"""Greedy choice, and sampling with filters, over Llama-3.1's vocabulary. The floor is one reading of the logits."""

from collections.abc import Callable, Iterator

import torch

from text_generation_kernels.benchmarks.harness import Bench, Case
from text_generation_kernels.sampling import SamplingParameters, choose_best, sample

CANDIDATES = {"num_warps": [4, 8, 16], "num_stages": [1]}
# temperature, top-k, top-p, min-p, typical-p
FILTERS = {
    "temperature": (1.0, 0, 1.0, 0.0, 1.0),
    "top-k 50": (1.0, 50, 1.0, 0.0, 1.0),
    "top-p 0.9": (1.0, 0, 0.9, 0.0, 1.0),
    "top-k 50, top-p 0.9": (1.0, 50, 0.9, 0.0, 1.0),
    "typical 0.9": (1.0, 0, 1.0, 0.0, 0.9),
}


def cases(bench: Bench) -> Iterator[Case]:
    """One row to many, greedy and filtered; float32 logits too, whose thresholds take twice the passes."""
    vocab_size = bench.size(128256, 600)
    for num_rows in (1, 32, 256) if not bench.is_tiny else (1,):
        yield make_case(bench, f"greedy, {num_rows} rows", num_rows, vocab_size, bench.dtype, None)
        for name, values in FILTERS.items():
            yield make_case(bench, f"{name}, {num_rows} rows", num_rows, vocab_size, bench.dtype, values)
    values = FILTERS["top-k 50, top-p 0.9"]
    yield make_case(bench, "top-k 50, top-p 0.9, float32", bench.size(32, 1), vocab_size, torch.float32, values)


def make_case(
    bench: Bench,
    name: str,
    num_rows: int,
    vocab_size: int,
    dtype: torch.dtype,
    values: tuple[float, int, float, float, float] | None,
) -> Case:
    """Every row with the same filters."""
    num_bytes = num_rows * vocab_size * dtype.itemsize

    def make_run() -> Callable[[], object]:
        logits = (3 * bench.random(num_rows, vocab_size, dtype=torch.float32)).to(dtype)
        if values is None:
            return lambda: choose_best(logits)
        temperature, top_k, top_p, min_p, typical_p = [
            torch.full((num_rows,), value, device=bench.device, dtype=torch.float32) for value in values
        ]
        numbers = torch.arange(num_rows, device=bench.device)
        parameters = SamplingParameters(temperature, top_k.int(), top_p, min_p, typical_p, numbers, numbers)
        return lambda: sample(logits, parameters)

    operation = "sampling_statistics" if values is None else "sampling_search"
    runs = [make_run() for _ in range(bench.num_copies(num_bytes))]
    return Case(name, runs, num_bytes, settings=(operation, ""))
