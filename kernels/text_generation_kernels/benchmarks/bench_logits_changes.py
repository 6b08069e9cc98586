"""What changes logits over Llama-3.1's vocabulary, in rows that ask for it and in rows that do not.

The floor is one reading and one writing of what is changed: of penalties the whole row and its record, of biases the
named tokens, of a watermark half of the row.
"""

from collections.abc import Callable, Iterator

import torch

from text_generation_kernels.benchmarks.harness import Bench, Case
from text_generation_kernels.green_list import add_to_green_tokens
from text_generation_kernels.logit_bias import LogitBias
from text_generation_kernels.token_records import NO_PENALTIES, TokenRecords

NUM_BIASES = 300


def cases(bench: Bench) -> Iterator[Case]:
    """One row to as many as are changed at once."""
    vocab_size = bench.size(128256, 600)
    for num_rows in (1, 32, 128) if not bench.is_tiny else (2,):
        for is_changed in (True, False):
            yield penalties_case(bench, num_rows, vocab_size, is_changed)
            yield biases_case(bench, num_rows, vocab_size, is_changed)
    yield watermark_case(bench, 1 if bench.is_tiny else 16, vocab_size)


def _logits(bench: Bench, num_rows: int, vocab_size: int) -> torch.Tensor:
    return bench.random(num_rows, vocab_size).float()


def _rows(bench: Bench, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows = torch.arange(num_rows, dtype=torch.int32, device=bench.device)
    return rows, torch.full((num_rows,), 500, dtype=torch.int64, device=bench.device)


def penalties_case(bench: Bench, num_rows: int, vocab_size: int, is_changed: bool) -> Case:
    """Rows that have seen 200 tokens."""
    num_bytes = num_rows * (vocab_size * (4 + 4 + 2) if is_changed else 16)

    def make_run() -> Callable[[], object]:
        logits, (rows, positions) = _logits(bench, num_rows, vocab_size), _rows(bench, num_rows)
        records = TokenRecords(num_rows, vocab_size, bench.device)
        values = (1.2, 0.1, 0.1, 0.0) if is_changed else NO_PENALTIES
        penalties = torch.tensor(values, device=bench.device).repeat(num_rows + 1, 1)
        seen = torch.arange(0, 400, 2, device=bench.device)
        for row in range(num_rows):
            records.start(row, seen, torch.full_like(seen, 2, dtype=torch.int16))
        return lambda: records.penalize(logits, rows, positions, penalties)

    runs = [make_run() for _ in range(bench.num_copies(num_bytes))]
    return Case(f"penalties, {num_rows} rows, {'changed' if is_changed else 'free'}", runs, num_bytes)


def biases_case(bench: Bench, num_rows: int, vocab_size: int, is_changed: bool) -> Case:
    """Rows that name 300 tokens each."""
    num_bytes = num_rows * (NUM_BIASES * (4 + 4 + 4 + 4) if is_changed else 12)

    def make_run() -> Callable[[], object]:
        logits, (rows, positions) = _logits(bench, num_rows, vocab_size), _rows(bench, num_rows)
        biases = LogitBias(num_rows, bench.device)
        token_ids = torch.arange(NUM_BIASES, dtype=torch.int32, device=bench.device)
        bounds = torch.tensor([NUM_BIASES, 0, 0], dtype=torch.int32, device=bench.device)
        for row in range(num_rows if is_changed else 0):
            biases.set(row, token_ids, torch.ones(NUM_BIASES, device=bench.device), bounds)
        return lambda: biases.add(logits, rows, positions)

    runs = [make_run() for _ in range(bench.num_copies(num_bytes))]
    return Case(f"biases, {num_rows} rows, {'changed' if is_changed else 'free'}", runs, num_bytes)


def watermark_case(bench: Bench, num_rows: int, vocab_size: int) -> Case:
    """Half of the vocabulary in every row."""
    num_bytes = num_rows * vocab_size * 4

    def make_run() -> Callable[[], object]:
        logits = _logits(bench, num_rows, vocab_size)
        samples = torch.arange(num_rows, device=bench.device)
        previous = samples + 1000
        return lambda: add_to_green_tokens(logits, samples, previous, 0.5, 2.0)

    runs = [make_run() for _ in range(bench.num_copies(num_bytes))]
    return Case(f"watermark, {num_rows} rows", runs, num_bytes)
