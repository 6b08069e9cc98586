"""Rotation and cache write, from the packed projection."""

from collections.abc import Callable, Iterator

import torch

from text_generation_kernels.benchmarks.harness import Bench, Case
from text_generation_kernels.rotary_kv_write import rotary_kv_write

CANDIDATES = {"HEADS": [2, 4, 8, 16], "num_warps": [1, 2, 4], "num_stages": [1]}
BLOCK_SIZE, MAX_POSITIONS = 16, 8192


def cases(bench: Bench) -> Iterator[Case]:
    """Llama-3.1-8B's heads, with and without head norms."""
    num_heads, num_kv_heads, head_dim = (32, 8, 128) if not bench.is_tiny else (4, 2, 16)
    for num_tokens, has_norm in ((1, False), (64, False), (256, False), (4096, False), (256, True), (4096, True)):
        if bench.is_tiny and num_tokens > 1:
            continue
        sizes = num_tokens, num_heads, num_kv_heads, head_dim
        num_bytes = 2 * num_tokens * (num_heads + 2 * num_kv_heads) * head_dim * bench.dtype.itemsize
        yield Case(
            f"{num_tokens} tokens{', head norms' if has_norm else ''}",
            [make_run(bench, *sizes, has_norm) for _ in range(bench.num_copies(num_bytes))],
            num_bytes,
            settings=("rotary_kv_write", ""),
        )


def make_run(
    bench: Bench, num_tokens: int, num_heads: int, num_kv_heads: int, head_dim: int, has_norm: bool
) -> Callable[[], object]:
    """The operation on inputs of its own, tokens scattered over the cache."""
    qkv = bench.random(num_tokens, (num_heads + 2 * num_kv_heads) * head_dim)
    num_blocks = -(-num_tokens // BLOCK_SIZE) + 1
    caches = bench.random(2, num_blocks, num_kv_heads, BLOCK_SIZE, head_dim)
    slots = torch.randperm(num_blocks * BLOCK_SIZE, device=bench.device)[:num_tokens]
    positions = torch.randint(0, MAX_POSITIONS, (num_tokens,), device=bench.device)
    angles = torch.rand(MAX_POSITIONS, head_dim, device=bench.device)
    norms = (bench.random(head_dim), bench.random(head_dim)) if has_norm else (None, None)
    return lambda: rotary_kv_write(qkv, positions, angles, caches[0], caches[1], slots, *norms)
