"""What changes logits, on the device: its memory is there from the start, where warm-up counts it."""

import numpy as np
import pytest
import torch
from text_generation_shard.changed_logits import ChangedLogits, Watermark
from text_generation_shard.step import LogitsChanges, NewSequence

NUM_ROWS = 40


def penalized(sequence_id: int) -> NewSequence:
    tokens = np.array([3, 4], np.int32)
    return NewSequence(sequence_id, tokens, 2, 0, np.array([0], np.int32), changes=LogitsChanges(presence_penalty=1.0))


def test_every_row_may_have_penalties_when_no_memory_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    changed = ChangedLogits(NUM_ROWS, 10, torch.device("cpu"), Watermark())
    logits = torch.zeros(NUM_ROWS, 10)

    def take(*shape: int, **options: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("nothing is left")

    for name in ("zeros", "empty"):
        monkeypatch.setattr(torch, name, take)
    changed.update([(row, penalized(row)) for row in range(NUM_ROWS)])
    rows, batch_rows = torch.arange(NUM_ROWS, dtype=torch.int32), np.arange(NUM_ROWS)
    chosen = torch.arange(NUM_ROWS) % 10
    changed.count(chosen, batch_rows, rows)
    positions, previous = torch.full((NUM_ROWS,), 3), torch.full((NUM_ROWS,), 4)
    done = changed.apply(logits, batch_rows, np.zeros(NUM_ROWS, np.bool_), rows, positions, previous)
    # Of what each row has generated, not of its prompt.
    assert [row.nonzero().flatten().tolist() for row in done] == [[token] for token in chosen.tolist()]
