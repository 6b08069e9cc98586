"""RMSNorm with the residual added."""

import functools
from collections.abc import Iterator

from text_generation_kernels.benchmarks.harness import Bench, Case
from text_generation_kernels.rms_norm import add_rms_norm

CANDIDATES = {"num_warps": [2, 4, 8, 16], "num_stages": [1]}


def cases(bench: Bench) -> Iterator[Case]:
    """Decode sizes, then a prefill."""
    hidden = bench.size(4096, 64)
    for num_rows in (1, 16, 64, 256, 4096) if not bench.is_tiny else (2,):
        num_bytes = 4 * num_rows * hidden * bench.dtype.itemsize
        weight = bench.random(hidden)
        inputs = [
            (bench.random(num_rows, hidden), bench.random(num_rows, hidden)) for _ in range(bench.num_copies(num_bytes))
        ]
        yield Case(
            f"add, {num_rows} x {hidden}",
            [functools.partial(add_rms_norm, x, residual, weight, 1e-5) for x, residual in inputs],
            num_bytes,
            settings=("rms_norm", "few_rows" if num_rows <= 256 else ""),
        )
