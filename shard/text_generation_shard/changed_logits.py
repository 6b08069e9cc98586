"""What changes the logits of the batch's rows, beside the rows on their device: biases, watermark, penalties.

A sequence's share is sent when it takes its row, and stays there: no step sends any of it again. What the tokens chosen
since then change is kept up to date on the device.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from text_generation_kernels.green_list import add_to_green_tokens
from text_generation_kernels.logit_bias import LogitBias
from text_generation_kernels.token_records import MAX_COUNT, NO_PENALTIES, TokenRecords

from text_generation_shard.sampling_columns import RowChange
from text_generation_shard.step import LogitsChanges, NewSequence
from text_generation_shard.step_buffers import Array, to_device
from text_generation_shard.step_inputs import BoolArray, Int64Array

DEFAULT_GAMMA, DEFAULT_DELTA = 0.5, 2.0


@dataclass(frozen=True)
class Watermark:
    """Which share of the vocabulary it favours, and how much."""

    gamma: float = DEFAULT_GAMMA
    delta: float = DEFAULT_DELTA

    @classmethod
    def of(cls, gamma: float | None, delta: float | None) -> "Watermark":
        """One whose unset values are the default ones."""
        return cls(DEFAULT_GAMMA if gamma is None else gamma, DEFAULT_DELTA if delta is None else delta)


DEFAULT_WATERMARK = Watermark()


class ChangedLogits:
    """The device's part of `LogitsChanges`, for each row of the batch."""

    def __init__(self, num_rows: int, vocab_size: int, device: torch.device, watermark: Watermark) -> None:
        self._device = device
        self._vocab_size = vocab_size
        self._watermark = watermark
        self._records = TokenRecords(num_rows, vocab_size, device)
        self._biases = LogitBias(num_rows, device)
        # The last row is that of padding.
        self._penalties = torch.tensor(NO_PENALTIES, device=device).repeat(num_rows + 1, 1)
        self._has_penalties = np.zeros(num_rows, np.bool_)
        self._has_biases = np.zeros(num_rows, np.bool_)

    def update(self, row_changes: Sequence[RowChange]) -> None:
        """Take in which sequences took and left rows, in order."""
        for row, sequence in row_changes:
            if sequence is None:
                self._clear(row)
            else:
                self._set(row, sequence)

    def _clear(self, row: int) -> None:
        if self._has_penalties[row]:
            self._penalties[row] = self._penalties[-1]
        if self._has_biases[row]:
            self._biases.clear(row)
        self._has_penalties[row] = self._has_biases[row] = False

    def _set(self, row: int, sequence: NewSequence) -> None:
        changes = sequence.changes
        assert changes is not None
        if changes.has_biases:
            self._has_biases[row] = True
            token_ids, values, bounds = _bias_entries(changes, sequence.num_prompt_tokens)
            self._biases.set(row, *(to_device(column, self._device) for column in (token_ids, values, bounds)))
        if changes.has_penalties:
            self._has_penalties[row] = True
            penalties = (
                changes.repetition_penalty, changes.frequency_penalty, changes.presence_penalty, changes.share_penalty
            )  # fmt: skip
            self._penalties[row] = to_device(np.array(penalties, np.float32), self._device)
            token_ids, values = _seen_tokens(sequence, changes.share_penalty != 0.0, self._vocab_size)
            self._records.start(row, to_device(token_ids, self._device), to_device(values, self._device))

    def apply(
        self,
        logits: torch.Tensor,  # [S, V]; changed where they are float32
        batch_rows: Int64Array,  # rows of the first of them, which are not padding
        has_watermark: BoolArray,  # of those
        rows: torch.Tensor,  # [S] int32
        positions: torch.Tensor,  # [S] int64 of the tokens to be chosen
        previous: torch.Tensor,  # [S] int64 the tokens before those
    ) -> torch.Tensor:
        """The logits to choose from, float32 whatever the model's type: small penalties would vanish in others."""
        logits = logits.float()
        if self._has_biases[batch_rows].any():
            self._biases.add(logits, rows, positions)
        if has_watermark.any():
            samples = to_device(np.flatnonzero(has_watermark), self._device)
            watermark = self._watermark
            add_to_green_tokens(logits, samples, previous[samples], watermark.gamma, watermark.delta)
        if self._has_penalties[batch_rows].any():
            self._records.penalize(logits, rows, positions, self._penalties)
        return logits

    def launch_all(
        self, logits: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor, previous: torch.Tensor
    ) -> torch.Tensor:
        """All that `apply` and `count` may launch, for rows of which none has anything set."""
        logits = logits.float()
        self._biases.add(logits, rows, positions)
        samples = torch.zeros(1, dtype=torch.int64, device=logits.device)
        add_to_green_tokens(logits, samples, previous[samples], self._watermark.gamma, self._watermark.delta)
        self._records.penalize(logits, rows, positions, self._penalties)
        self._records.count(previous, rows, self._penalties)
        return logits

    def count(self, tokens: torch.Tensor, batch_rows: Int64Array, rows: torch.Tensor) -> None:
        """Tokens were chosen for these rows: later steps know of them."""  # [S] int64, [S] int32
        if self._has_penalties[batch_rows].any():
            self._records.count(tokens, rows, self._penalties)


def _bias_entries(changes: LogitsChanges, num_prompt_tokens: int) -> tuple[Array, Array, Array]:
    """The entries of LogitBias: banned tokens first, each token once; and the bounds."""
    biases: dict[int, float] = dict.fromkeys(changes.banned_token_ids.tolist(), 0.0)
    num_banned = len(biases)
    for token_id, value in zip(changes.bias_token_ids.tolist(), changes.bias_values.tolist(), strict=True):
        biases[token_id] = biases.get(token_id, 0.0) + value
    bounds = (len(biases), num_banned, num_prompt_tokens + changes.min_tokens)
    return (
        np.fromiter(biases, np.int32, len(biases)),
        np.fromiter(biases.values(), np.float32, len(biases)),
        np.array(bounds, np.int32),
    )


def _seen_tokens(sequence: NewSequence, counts_prompt: bool, vocab_size: int) -> tuple[Array, Array]:
    """The tokens that a sequence comes with, and their values in its record."""
    prompt, generated = np.split(sequence.token_ids, [sequence.num_prompt_tokens])
    counts = np.bincount(generated, minlength=vocab_size)
    in_prompt = np.bincount(prompt, minlength=vocab_size)
    if counts_prompt:
        counts += in_prompt
    values = 2 * np.minimum(counts, MAX_COUNT) + ((in_prompt > 0) & (not counts_prompt))
    token_ids = np.flatnonzero(values)
    return token_ids, values[token_ids].astype(np.int16)
