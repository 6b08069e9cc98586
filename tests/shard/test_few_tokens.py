"""Rows sampled from the few tokens that they allow, against the same rows in their whole width."""

from typing import Any, cast

import numpy as np
import torch
from text_generation_kernels import reference, reference_sampling
from text_generation_shard.changed_logits import DEFAULT_WATERMARK, ChangedLogits
from text_generation_shard.cpu_execution import sequences_in_one_block
from text_generation_shard.few_tokens import MAX_FEW_TOKENS, FewTokens
from text_generation_shard.grammar_masks import StepMasks
from text_generation_shard.input_batch import InputBatch
from text_generation_shard.sampler import sample_tokens
from text_generation_shard.step import LogitsChanges, NewSequence
from text_generation_shard.step_inputs import BatchLimits

VOCAB_SIZE = 3001  # the last word of a mask has bits for tokens that do not exist
# How many tokens each mask allows.
COUNTS = (0, 1, 2, 40, MAX_FEW_TOKENS, MAX_FEW_TOKENS + 1, VOCAB_SIZE)
# temperature, top-k, top-p, min-p, typical-p
FILTERS = [
    (0.0, 0, 1.0, 0.0, 1.0),
    (1.0, 0, 1.0, 0.0, 1.0),
    (0.7, 5, 1.0, 0.0, 1.0),
    (1.5, 0, 0.8, 0.0, 1.0),
    (1.0, 0, 1.0, 0.2, 1.0),
    (2.0, 0, 0.95, 0.0, 0.7),
]


def masks_of(counts: tuple[int, ...], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """What each allows, [M, V], and the masks."""
    allowed = np.zeros((len(counts), VOCAB_SIZE), np.bool_)
    for row, count in enumerate(counts):
        allowed[row, rng.choice(VOCAB_SIZE, count, replace=False)] = True
    padded = np.zeros((len(counts), 94 * 32), np.uint8)
    padded[:, :VOCAB_SIZE] = allowed
    return allowed, np.packbits(padded, axis=1, bitorder="little").view(np.int32)


def test_the_same_tokens_as_of_the_whole_row() -> None:
    rng = np.random.default_rng(1)
    allowed, masks = masks_of(COUNTS, rng)
    masks[0, -1] = -1 << 31  # allows nothing but a token that does not exist
    mask_rows = rng.permutation(np.repeat(np.arange(-1, len(COUNTS)), 30)).astype(np.int32)
    batch = len(mask_rows)
    logits = torch.from_numpy(rng.normal(0, 4, (batch, VOCAB_SIZE)).astype(np.float32)).round(decimals=1)  # with ties
    columns = torch.tensor([FILTERS[number % len(FILTERS)] for number in range(batch)]).unbind(1)
    seeds, positions = torch.arange(batch), torch.arange(batch) * 7
    few = FewTokens.find(masks, mask_rows, VOCAB_SIZE)
    assert set(mask_rows[few.samples].tolist()) == {0, 1, 2, 3, 4}
    assert len(few.samples) == 5 * 30
    found = few.logits(logits)
    whole = logits[few.samples]
    reference.mask_tokens(whole, torch.from_numpy(masks), torch.from_numpy(mask_rows[few.samples]))
    chosen = [
        reference_sampling.sample(
            rows, *(column[few.samples] for column in columns), seeds[few.samples], positions[few.samples]
        )
        for rows in (found, whole)
    ]
    is_possible = mask_rows[few.samples] > 0
    assert reference_sampling.finite_rows(found).tolist() == is_possible.tolist()
    tokens = few.token_ids(chosen[0][0].numpy())
    assert np.array_equal(tokens[is_possible], chosen[1][0].numpy()[is_possible])
    assert allowed[mask_rows[few.samples], tokens][is_possible].all()
    torch.testing.assert_close(chosen[0][1][is_possible], chosen[1][1][is_possible], atol=1e-6, rtol=1e-6)


def test_rows_do_not_depend_on_others() -> None:
    """Bit for bit, however much the others allow."""
    rng = np.random.default_rng(2)
    _, masks = masks_of((3, 100, MAX_FEW_TOKENS), rng)
    logits = torch.from_numpy(rng.normal(0, 3, (3, VOCAB_SIZE)).astype(np.float32))
    together = FewTokens.find(masks, np.array([2, 0, 1], np.int32), VOCAB_SIZE).logits(logits)
    for row, mask_row in enumerate((2, 0, 1)):
        alone = FewTokens.find(masks, np.array([mask_row], np.int32), VOCAB_SIZE).logits(logits[row : row + 1])
        assert torch.equal(alone[0], together[row])


class Masks:
    """A step's masks that are there: one for each row."""

    def __init__(self, words: np.ndarray) -> None:
        self._words = words
        self.mask_rows = np.arange(len(words), dtype=np.int32)

    def __len__(self) -> int:
        return len(self._words)

    def wait(self, masks: np.ndarray) -> None:
        masks[:] = self._words


def test_a_neighbour_of_another_kind_changes_no_bit() -> None:
    """One row more that wants to know its most likely tokens, or has a penalty: the others take the same way."""
    rng, count = np.random.default_rng(4), 24
    allowed, words = masks_of((300, 2000) * (count // 2) + (VOCAB_SIZE,), rng)
    logits = torch.from_numpy(rng.normal(0, 3, (count + 1, VOCAB_SIZE)).astype(np.float32))
    limits, ones = BatchLimits(VOCAB_SIZE, 16, 4, count + 1, count + 1, 64), np.ones(count + 1, np.int32)
    inputs = sequences_in_one_block(ones, ones, limits.block_size)
    sampled = []
    for neighbour in ({}, {"top_n_tokens": 3}, {"changes": LogitsChanges(presence_penalty=1.0)}):
        batch = InputBatch(limits)
        changed = ChangedLogits(count + 1, VOCAB_SIZE, torch.device("cpu"), DEFAULT_WATERMARK)
        for row in range(count):
            top_n_tokens = 2 if neighbour and row < 2 else 0
            settings = {"temperature": row % 4 / 2, "top_p": 0.9, "seed": row, "top_n_tokens": top_n_tokens}
            batch.sampling.set(row, sequence(row, **settings))
        batch.sampling.set(count, sequence(count, **neighbour))
        changed.update(batch.sampling.take_row_changes())
        assert batch.sampling.has_special == bool(neighbour)
        sampled.append(sample_tokens(logits.clone(), batch, inputs, changed, cast(StepMasks, Masks(words))))
    for one in sampled[1:]:
        assert np.array_equal(one.token_ids[:count], sampled[0].token_ids[:count])
        assert np.array_equal(one.logprobs[:count], sampled[0].logprobs[:count])
        assert one.top_tokens is not None
        assert one.top_tokens.num_tokens[:3].tolist() == [2, 2, 0]
        assert allowed[[0, 0, 1, 1], one.top_tokens.token_ids[:4]].all()


def sequence(number: int, **settings: Any) -> NewSequence:
    return NewSequence(number, np.zeros(1, np.int32), 1, 0, np.zeros(1, np.int32), **settings)


def test_no_row_allows_few() -> None:
    _, masks = masks_of((VOCAB_SIZE,), np.random.default_rng(3))
    few = FewTokens.find(masks, np.array([-1, 0], np.int32), VOCAB_SIZE)
    assert len(few.samples) == 0
    assert few.logits(torch.zeros(2, VOCAB_SIZE)).shape == (0, MAX_FEW_TOKENS)
