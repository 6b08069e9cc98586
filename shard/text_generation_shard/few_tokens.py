"""Rows whose masks allow few tokens: on a CPU they are sampled from these alone, most of JSON's marks among them.

A step of 64 rows over 49 152 tokens spends 10 ms on sampling, and as good as nothing on rows such as these.
"""

from dataclasses import dataclass

import numpy as np
import torch
from text_generation_proto.columns import Int32Array

from text_generation_shard.step_inputs import Int64Array

# A fixed width, so that no row depends on what others allow.
MAX_FEW_TOKENS = 512
_WORD_BITS = 32


@dataclass(frozen=True)
class FewTokens:
    """What some rows of a step allow, at most MAX_FEW_TOKENS of each."""

    samples: Int64Array  # [F] which of the step's rows these are
    # Of each allowed token: its row among these, its place there, in the order of ids, and its id.
    rows: Int64Array
    places: Int64Array
    allowed_ids: Int64Array

    @classmethod
    def find(cls, masks: Int32Array, mask_rows: Int32Array, vocab_size: int) -> "FewTokens":
        """`masks` is [M, words], `mask_rows` [num_samples] as in StepMasks."""
        counts = np.bitwise_count(masks.view(np.uint32)).sum(axis=1, dtype=np.int64)
        samples = np.flatnonzero((mask_rows >= 0) & (counts[mask_rows] <= MAX_FEW_TOKENS))
        words = masks[mask_rows[samples]]
        rows, columns = np.nonzero(words)
        octets = words[rows, columns].view(np.uint8).reshape(-1, _WORD_BITS // 8)
        which, bits = np.nonzero(np.unpackbits(octets, axis=1, bitorder="little"))
        rows, token_ids = rows[which], columns[which] * _WORD_BITS + bits
        is_token = token_ids < vocab_size
        rows, token_ids = rows[is_token], token_ids[is_token]
        return cls(samples, rows, np.arange(len(rows)) - np.searchsorted(rows, rows), token_ids)

    def logits(self, logits: torch.Tensor) -> torch.Tensor:
        """Those of the allowed tokens, -inf behind them."""  # [num_samples, V] -> [F, MAX_FEW_TOKENS]
        few = logits.new_full((len(self.samples), MAX_FEW_TOKENS), -torch.inf)
        rows, places = torch.from_numpy(self.rows), torch.from_numpy(self.places)
        few[rows, places] = logits[torch.from_numpy(self.samples[self.rows]), torch.from_numpy(self.allowed_ids)]
        return few

    def token_ids(self, places: Int64Array) -> Int64Array:
        """The tokens at a place of each row."""  # [F] -> [F]
        ids = np.zeros((len(self.samples), MAX_FEW_TOKENS), np.int64)
        ids[self.rows, self.places] = self.allowed_ids
        return np.take_along_axis(ids, places[:, None], axis=1)[:, 0]
