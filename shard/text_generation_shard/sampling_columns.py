"""How each row of the batch chooses its tokens, in columns; and what is wrong with a sequence's parameters.

What filters a distribution goes to the device with every step. What changes logits is rare: it goes there once, when a
sequence takes its row, so the columns only say which rows have any.
"""

import math

import numpy as np
from text_generation_kernels.logit_bias import MAX_ENTRIES
from text_generation_proto.columns import Int32Array

from text_generation_shard.step import LogitsChanges, NewSequence

MAX_TOP_N_TOKENS = 256

# A row, and the sequence that took it; None: it left, and what it had set is no more.
RowChange = tuple[int, NewSequence | None]


class SamplingColumns:
    """One entry a row."""

    def __init__(self, capacity: int, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self.temperatures = np.zeros(capacity, np.float32)
        self.top_k = np.zeros(capacity, np.int64)
        self.top_p = np.ones(capacity, np.float32)
        self.min_p = np.zeros(capacity, np.float32)
        self.typical_p = np.ones(capacity, np.float32)
        self.seeds = np.zeros(capacity, np.uint64)
        self.top_n_tokens = np.zeros(capacity, np.int32)
        self.has_changes = np.zeros(capacity, np.bool_)  # of the logits
        self.has_watermark = np.zeros(capacity, np.bool_)
        self._num_special = 0  # rows that need more than filters
        self._row_changes: list[RowChange] = []

    @property
    def has_special(self) -> bool:
        """Whether any row of the batch changes logits or wants to know the most likely tokens."""
        return self._num_special > 0

    @property
    def has_row_changes(self) -> bool:
        """Whether `take_row_changes` has any."""
        return bool(self._row_changes)

    def take_row_changes(self) -> list[RowChange]:
        """What happened to the rows since the last call: of those that change logits, or did."""
        changes, self._row_changes = self._row_changes, []
        return changes

    def set(self, row: int, sequence: NewSequence) -> None:
        """A sequence takes a row."""
        self.temperatures[row] = sequence.temperature
        self.top_k[row] = min(sequence.top_k, self._vocab_size)
        self.top_p[row] = sequence.top_p
        self.min_p[row] = sequence.min_p
        self.typical_p[row] = sequence.typical_p
        self.seeds[row] = sequence.seed
        if sequence.top_n_tokens or sequence.changes is not None:
            self.top_n_tokens[row] = sequence.top_n_tokens
            self._num_special += 1
        if sequence.changes is not None:
            self.has_changes[row] = True
            self.has_watermark[row] = sequence.changes.has_watermark
            self._row_changes.append((row, sequence))

    def clear(self, row: int) -> None:
        """The sequence leaves its row."""
        if not self._num_special or not (self.has_changes[row] or self.top_n_tokens[row]):
            return
        if self.has_changes[row]:
            self._row_changes.append((row, None))
        self.has_changes[row] = self.has_watermark[row] = False
        self.top_n_tokens[row] = 0
        self._num_special -= 1


def reason_to_refuse(sequence: NewSequence, vocab_size: int) -> str | None:
    """What is wrong with how a sequence wants its tokens chosen."""
    if not 0.0 <= sequence.temperature < math.inf:
        return f"temperature is {sequence.temperature}"
    if sequence.temperature > 0.0:
        if not 0.0 < sequence.top_p <= 1.0:
            return f"top_p is {sequence.top_p}"
        if not 0.0 <= sequence.min_p <= 1.0:
            return f"min_p is {sequence.min_p}"
        if not 0.0 < sequence.typical_p <= 1.0:
            return f"typical_p is {sequence.typical_p}"
    most = max(sequence.top_n_tokens, sequence.prompt_top_n_tokens)
    if most > MAX_TOP_N_TOKENS:
        return f"{most} most likely tokens are asked for, but at most {MAX_TOP_N_TOKENS} are told"
    return None if sequence.changes is None else _reason_to_refuse_changes(sequence.changes, vocab_size)


def _reason_to_refuse_changes(changes: LogitsChanges, vocab_size: int) -> str | None:
    if not 0.0 < changes.repetition_penalty < math.inf:
        return f"repetition_penalty is {changes.repetition_penalty}"
    penalties = (changes.share_penalty, changes.frequency_penalty, changes.presence_penalty)
    if not all(map(math.isfinite, penalties)) or not np.isfinite(changes.bias_values).all():
        return "a penalty or a bias is not a finite number"
    if len(changes.bias_values) != len(changes.bias_token_ids):
        return f"{len(changes.bias_token_ids)} tokens have {len(changes.bias_values)} biases"
    for token_ids in (changes.bias_token_ids, changes.banned_token_ids):
        if not _are_tokens(token_ids, vocab_size):
            return f"a token id of a bias or a ban is outside the vocabulary of {vocab_size}"
    num_named = len(changes.bias_token_ids) + len(changes.banned_token_ids)
    if num_named > MAX_ENTRIES:
        return f"{num_named} tokens have a bias or a ban, but at most {MAX_ENTRIES} may"
    return None


def _are_tokens(token_ids: Int32Array, vocab_size: int) -> bool:
    return not len(token_ids) or (int(token_ids.min()) >= 0 and int(token_ids.max()) < vocab_size)
