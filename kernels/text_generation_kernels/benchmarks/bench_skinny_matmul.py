"""The products of a decode step of Llama-3.1-8B with few rows, beside torch's own."""

import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from text_generation_kernels.benchmarks.harness import Bench, Case
from text_generation_kernels.skinny_matmul import LEAST_ROWS, settings_shape, skinny_gated_linear, skinny_linear

CANDIDATES = {
    "BLOCK_N": [16, 32, 64, 128], "BLOCK_K": [64, 128, 256], "num_warps": [4], "num_stages": [4, 6],
}  # fmt: skip
# output width, depth
WEIGHTS = {
    "qkv": (6144, 4096),
    "o": (4096, 4096),
    "gate_up": (28672, 4096),
    "down": (4096, 14336),
    "lm_head": (128256, 4096),
}


def cases(bench: Bench) -> Iterator[Case]:
    """Each weight with 1 to 64 rows: ours, then torch's; for gate_up with the activation fused."""
    for name, (width, depth) in WEIGHTS.items():
        width, depth = bench.size(width, 64), bench.size(depth, 96)
        for num_rows in (1, 16, 32, 64) if not bench.is_tiny else (2,):
            num_bytes = (width * depth + num_rows * (width + depth)) * bench.dtype.itemsize
            num_flops = 2 * num_rows * width * depth
            weights = [bench.random(width, depth) for _ in range(bench.num_copies(num_bytes))]
            x = bench.random(num_rows, depth)
            is_gated = name == "gate_up"
            operation = "skinny_matmul_gated" if is_gated else "skinny_matmul"
            product = skinny_gated_linear if is_gated else skinny_linear
            yield Case(
                f"{name}, {num_rows} rows", make_runs(product, x, weights), num_bytes, num_flops,
                settings=(operation, settings_shape(max(LEAST_ROWS, num_rows), width // (1 + is_gated))),
            )  # fmt: skip
            yield Case(f"{name}, {num_rows} rows, torch", make_runs(F.linear, x, weights), num_bytes, num_flops)


def make_runs(
    product: Callable[..., torch.Tensor], x: torch.Tensor, weights: list[torch.Tensor]
) -> list[Callable[[], object]]:
    """One run for each copy of the weight."""
    return [functools.partial(product, x, weight) for weight in weights]
