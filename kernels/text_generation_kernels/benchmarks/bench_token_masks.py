"""Grammar masks over Llama-3.1's vocabulary. The floor is one reading of the masks and one writing of the logits."""

from collections.abc import Callable, Iterator

import torch

from text_generation_kernels.benchmarks.harness import Bench, Case
from text_generation_kernels.token_masks import NO_MASK, mask_tokens, num_words


def cases(bench: Bench) -> Iterator[Case]:
    """One row to many."""
    vocab_size = bench.size(128256, 600)
    for num_rows in (1, 64, 256) if not bench.is_tiny else (2,):
        for is_masked in (True, False):
            yield make_case(bench, num_rows, vocab_size, is_masked)


def make_case(bench: Bench, num_rows: int, vocab_size: int, is_masked: bool) -> Case:
    """Masks that allow one token in 32."""
    words = num_words(vocab_size)
    num_bytes = num_rows * (vocab_size * bench.dtype.itemsize + words * 4) if is_masked else num_rows * 4

    def make_run() -> Callable[[], object]:
        logits = bench.random(num_rows, vocab_size)
        masks = torch.ones(num_rows, words, dtype=torch.int32, device=bench.device)
        numbers = torch.arange(num_rows, dtype=torch.int32, device=bench.device)
        mask_rows = numbers if is_masked else torch.full_like(numbers, NO_MASK)
        return lambda: mask_tokens(logits, masks, mask_rows)

    runs = [make_run() for _ in range(bench.num_copies(num_bytes))]
    return Case(f"{num_rows} rows, {'masked' if is_masked else 'free'}", runs, num_bytes)
