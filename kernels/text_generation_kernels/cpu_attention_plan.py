"""The sequences of a step as attention on a CPU takes them: what all layers share, made once.

Sequences with one query are one product, in groups of about the same length. Of those that begin with the same blocks,
these are read once.

Shapes: T tokens of the step, B sequences; a layer's cache is [num_blocks, block_size, 2 * num_kv_heads, head_dim]: of
each token its keys, then its values.
"""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from text_generation_kernels.cpu_attention import Decodes, Keys, Prefixes, Prompt, StepSequences, StepTokens
from text_generation_kernels.shared_prefix import find_shared_prefixes, worth_sharing

# Sequences up to here are decoded in one product, padded to the longest; longer ones, with those up to twice as long.
_SHORT_LENGTH = 256
# Keys that sequences share get a product of their own if so many need not be gathered again. The demo
# model's forward pass, 2 cores of a Xeon, ms: 8 sequences with 608 in common 35.7 and 29.0, 4 with 608 25.0 and 23.0,
# 8 with 256 30.9 and 29.2; 8 with 128 28.5 and 30.1, 2 with 608 16.8 and 17.5.
_MIN_KEYS_SAVED = 1536
_MIN_SHARED_LENGTH = 128


class CpuAttentionPlan:
    """The sequences of one step."""

    def __init__(
        self,
        block_tables: NDArray[np.int32],  # [B, max_blocks]; entries behind a sequence's blocks are not read
        query_starts: NDArray[np.int32],  # [B + 1]
        sequence_lengths: NDArray[np.int32],  # [B]
        positions: NDArray[np.int64],  # [T]
        slot_mapping: NDArray[np.int64],  # [T]
        cache: torch.Tensor,  # any layer's
    ) -> None:
        self._block_size = cache.shape[1]
        self._dtype = cache.dtype
        self._block_tables = block_tables
        self.query_starts = query_starts
        self.sequence_lengths = sequence_lengths
        self._positions = torch.from_numpy(positions)
        self._slot_mapping = slot_mapping

    def tokens(self, cos_sin_cache: torch.Tensor) -> StepTokens:
        """Where the step's tokens are and where their keys and values go.

        The table is [max_positions, rotary_dim] float32: cosines of the angles, then their sines.
        """
        blocks, offsets = np.divmod(self._slot_mapping, self._block_size)
        begun = blocks[offsets == 0]
        partly = begun[~np.isin(begun, blocks[offsets == self._block_size - 1])]
        cos, sin = cos_sin_cache[self._positions].unsqueeze(1).chunk(2, dim=-1)
        return StepTokens(
            torch.from_numpy(self._slot_mapping),
            torch.from_numpy(partly) if len(partly) else None,
            torch.cat((cos, cos), dim=-1),
            torch.cat((-sin, sin), dim=-1),
        )

    def sequences(self, sliding_window: int | None) -> StepSequences:
        """What the layers attend to that have this window."""
        return StepSequences(list(self._decodes(sliding_window)), list(self._prompts(sliding_window)))

    def _keys(
        self,
        rows: NDArray[np.int64],  # [n] of the batch
        starts: NDArray[np.int32],  # [n] multiples of the block size
        ends: NDArray[np.int32],  # [n]
        sliding_window: int | None,
    ) -> Keys:
        """Of each sequence those from start to end; a shorter one's first block stands in for those it lacks."""
        lengths, first = (ends - starts)[:, None], (starts // self._block_size)[:, None]
        places = np.arange(-(-lengths.max() // self._block_size))
        places = first + np.where(places * self._block_size < lengths, places, 0)
        blocks = self._block_tables[rows[:, None], places].astype(np.int64).reshape(-1)
        positions = np.arange(lengths.max())
        is_attended = positions < lengths
        if sliding_window is not None:
            is_attended &= positions >= lengths - sliding_window
        bias = None if is_attended.all() else self._bias(is_attended)[:, None, None]
        return Keys(torch.from_numpy(blocks), len(positions), bias)

    def _bias(self, is_attended: NDArray[np.bool_]) -> torch.Tensor:
        bias = torch.zeros(is_attended.shape, dtype=self._dtype)
        return bias.masked_fill_(torch.from_numpy(~is_attended), -torch.inf)

    def _decodes(self, sliding_window: int | None) -> Iterator[Decodes]:
        query_lengths = np.diff(self.query_starts)
        is_alone = query_lengths == 1
        # Of each sequence that begins as another does: how many keys, and the first sequence that begins so.
        prefix_lengths, owners = np.zeros_like(self.sequence_lengths), np.arange(len(query_lengths))
        if sliding_window is None:
            for prefix in find_shared_prefixes(
                self._block_tables, query_lengths, self.sequence_lengths, self._block_size, _MIN_SHARED_LENGTH
            ):
                prefix_lengths[prefix.sequences] = prefix.length
                owners[prefix.sequences] = prefix.sequences[0]
        shares = np.flatnonzero(prefix_lengths)
        for rows in _of_like_length(shares, self.sequence_lengths[shares] - prefix_lengths[shares]):
            for places in worth_sharing(owners[rows], prefix_lengths[rows], _MIN_KEYS_SAVED):
                group = rows[places]
                is_alone[group] = False
                yield self._decodes_together(group, prefix_lengths[group], owners[group], sliding_window)
        alone = np.flatnonzero(is_alone)
        for group in _of_like_length(alone, self.sequence_lengths[alone]):
            yield self._decodes_together(group, np.zeros_like(prefix_lengths[group]), owners[group], sliding_window)

    def _decodes_together(
        self,
        rows: NDArray[np.int64],
        prefix_lengths: NDArray[np.int32],
        owners: NDArray[np.int64],
        sliding_window: int | None,
    ) -> Decodes:
        """Sequences of about the same length behind their prefixes; all have one, or none has."""
        tokens = None if len(rows) == self.query_starts[-1] else self.query_starts[rows].astype(np.int64)
        return Decodes(
            None if tokens is None else torch.from_numpy(tokens),
            self._prefixes(prefix_lengths, owners) if prefix_lengths.any() else None,
            self._keys(rows, prefix_lengths, self.sequence_lengths[rows], sliding_window),
        )

    def _prefixes(self, prefix_lengths: NDArray[np.int32], owners: NDArray[np.int64]) -> Prefixes:
        first_owners, first, prefix, counts = np.unique(
            owners, return_index=True, return_inverse=True, return_counts=True
        )
        # A row that a prefix has too many is one more of its first sequence.
        sequences = np.repeat(first[:, None], counts.max(), axis=1)
        places = np.zeros_like(prefix)
        for number, count in enumerate(counts):
            members = np.flatnonzero(prefix == number)
            sequences[number, :count] = members
            places[members] = number * counts.max() + np.arange(count)
        lengths = prefix_lengths[first]
        return Prefixes(
            len(first),
            self._keys(first_owners, np.zeros_like(lengths), lengths, None),
            torch.from_numpy(sequences.reshape(-1)),
            torch.from_numpy(places),
        )

    def _prompts(self, sliding_window: int | None) -> Iterator[Prompt]:
        for row in np.flatnonzero(np.diff(self.query_starts) > 1):
            start, end, length = (
                int(number) for number in (*self.query_starts[row : row + 2], self.sequence_lengths[row])
            )
            keys = self._keys(np.array([row]), np.zeros(1, np.int32), self.sequence_lengths[row : row + 1], None)
            if end - start < length or (sliding_window is not None and sliding_window < length):
                key_positions, query_positions = np.arange(length), np.arange(length - (end - start), length)[:, None]
                is_attended = key_positions <= query_positions
                if sliding_window is not None:
                    is_attended &= key_positions > query_positions - sliding_window
                keys = keys._replace(bias=self._bias(is_attended))
            yield Prompt(start, end, keys)


def _of_like_length(rows: NDArray[np.int64], lengths: NDArray[np.int32]) -> Iterator[NDArray[np.int64]]:
    classes = np.ceil(np.log2(np.maximum(lengths, _SHORT_LENGTH)))
    for length_class in np.unique(classes):
        yield rows[classes == length_class]
