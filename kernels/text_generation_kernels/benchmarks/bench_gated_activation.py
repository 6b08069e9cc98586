"""silu and product, between the MLP's two matrix products."""

import functools
from collections.abc import Iterator

from text_generation_kernels.benchmarks.harness import Bench, Case
from text_generation_kernels.gated_activation import silu_and_mul

CANDIDATES = {"BLOCK": [512, 1024, 2048, 4096], "num_warps": [2, 4, 8], "num_stages": [1]}


def cases(bench: Bench) -> Iterator[Case]:
    """Decode sizes, then a prefill."""
    width = bench.size(14336, 100)
    for num_rows in (1, 16, 64, 256, 4096) if not bench.is_tiny else (2,):
        num_bytes = 3 * num_rows * width * bench.dtype.itemsize
        inputs = [bench.random(num_rows, 2 * width) for _ in range(bench.num_copies(num_bytes))]
        yield Case(
            f"silu, {num_rows} x {width}",
            [functools.partial(silu_and_mul, x) for x in inputs],
            num_bytes,
            settings=("gated_activation", ""),
        )
