"""Records of tokens that ranks must agree on: all have one, or none has."""

import numpy as np
import torch
from text_generation_shard.changed_logits import NO_MEMORY, ChangedLogits, Watermark
from text_generation_shard.step import LogitsChanges, NewSequence


def penalized(sequence_id: int) -> NewSequence:
    tokens = np.array([3, 4], np.int32)
    return NewSequence(sequence_id, tokens, 2, 0, np.array([0], np.int32), changes=LogitsChanges(presence_penalty=1.0))


def test_a_rank_that_alone_has_memory_gives_it_back_and_asks_again() -> None:
    answers, asked = [0, 1], []

    def agree(value: int) -> int:
        asked.append(value)
        return min(value, answers[len(asked) - 1])

    changed = ChangedLogits(4, 10, torch.device("cpu"), Watermark(), agree)
    assert changed.update([(0, penalized(7))]) == {7: NO_MEMORY}
    assert changed.update([(0, None), (0, penalized(8))]) == {}
    assert asked == [1, 1], "each new piece of memory takes all ranks"
    logits = torch.zeros(1, 10)
    rows, positions = torch.tensor([0], dtype=torch.int32), torch.tensor([2])
    changed.count(torch.tensor([5]), np.array([0]), rows)
    done = changed.apply(logits, np.array([0]), np.array([False]), rows, positions, torch.tensor([4]))
    assert done[0].nonzero().flatten().tolist() == [5]
    # The row is there already: nobody asks.
    assert changed.update([(0, None), (1, penalized(9))]) == {}
    assert asked == [1, 1]
