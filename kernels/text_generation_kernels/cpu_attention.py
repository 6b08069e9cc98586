"""Attention on a CPU, from the qkv projection to the heads' outputs; what all layers of a step share is made once.

Keys and values of all heads are gathered a block at a time and written a token at a time. Sequences with one query are
one product, in groups of about the same length. Of those that begin with the same blocks, these are read once: outputs
of the common keys and of each one's own are then weighted by their sums of exponentials. A block is zeroed as its first
slot is written: what lies beyond a sequence's end is then masked by what it adds to a score, and no NaN that another
sequence left there can come through.

Shapes: T tokens of the step, B sequences, H query heads, KVH key/value heads, D head size; a layer's cache is
[num_blocks, block_size, 2 * KVH, D]: of each token its keys, then its values.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from text_generation_kernels.rms_norm import rms_norm_on_cpu
from text_generation_kernels.shared_prefix import find_shared_prefixes, worth_sharing

# Sequences up to here are decoded in one product, padded to the longest; longer ones, with those up to twice as long.
_SHORT_LENGTH = 256
# Keys that sequences share get a product of their own if so many need not be gathered again. The demo
# model's forward pass, 2 cores of a Xeon, ms: 8 sequences with 608 in common 35.7 and 29.0, 4 with 608 25.0 and 23.0,
# 8 with 256 30.9 and 29.2; 8 with 128 28.5 and 30.1, 2 with 608 16.8 and 17.5.
_MIN_KEYS_SAVED = 1536
_MIN_SHARED_LENGTH = 128

# What F.scaled_dot_product_attention chooses, at a few microseconds' cost, without what it tells of the sums.
_flash_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


@dataclass(frozen=True)
class _Prefixes:
    """What sequences begin with, each prefix with as many rows as the most frequent one has sequences."""

    count: int
    blocks: torch.Tensor  # [prefixes * blocks of the longest] int64
    bias: torch.Tensor | None  # [prefixes, 1, 1, S]: 0 or -inf; None: every position in those blocks is attended to
    sequences: torch.Tensor  # [prefixes * rows] int64: which of B each row is of
    rows: torch.Tensor  # [B] int64: a row of each sequence


@dataclass(frozen=True)
class _Decodes:
    """Sequences with one query each."""

    tokens: torch.Tensor | None  # [B] int64; None: the step's tokens, one after another
    prefixes: _Prefixes | None
    blocks: torch.Tensor  # [B * blocks of the longest] int64: what follows
    bias: torch.Tensor | None  # [B, 1, 1, S]: 0 or -inf; None: every position in those blocks is attended to


@dataclass(frozen=True)
class _Prompt:
    """A sequence with several queries."""

    tokens: slice
    blocks: torch.Tensor  # [blocks] int64
    length: int
    bias: torch.Tensor | None  # [Q, length]: 0 or -inf; None: causal from the first position on


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
        self._block_size, self._num_kv_heads = cache.shape[1], cache.shape[2] // 2
        self._dtype = cache.dtype
        self._block_tables = block_tables
        self.query_starts = query_starts
        self.sequence_lengths = sequence_lengths
        self._positions = torch.from_numpy(positions)
        self._rotation: tuple[torch.Tensor, torch.Tensor] | None = None
        self._sequences: dict[int | None, tuple[list[_Decodes], list[_Prompt]]] = {}
        blocks, offsets = np.divmod(slot_mapping, self._block_size)
        self._written = torch.from_numpy(slot_mapping)
        begun = blocks[offsets == 0]
        partly = begun[~np.isin(begun, blocks[offsets == self._block_size - 1])]
        self._begun = torch.from_numpy(partly)
        self._begins_blocks = len(partly) > 0

    def rotation(self, cos_sin_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Factors, [T, 1, rotary_dim], of a head and of the head with its halves exchanged; all layers' are the same.

        The table is [max_positions, rotary_dim] float32: cosines of the angles, then their sines.
        """
        if self._rotation is None:
            cos, sin = cos_sin_cache[self._positions].unsqueeze(1).chunk(2, dim=-1)
            self._rotation = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
        return self._rotation

    def write(self, heads: torch.Tensor, cache: torch.Tensor) -> None:
        """Store the step's keys and values, which are a token's heads: first its keys, then its values."""
        # [T, 2 * KVH, D]
        if self._begins_blocks:
            cache.index_fill_(0, self._begun, 0)
        cache.view(-1, *heads.shape[1:]).index_copy_(0, self._written, heads)

    def attend(
        self,
        query: torch.Tensor,  # [T, H, D]
        cache: torch.Tensor,
        scale: float,
        sliding_window: int | None,
    ) -> torch.Tensor:
        """Causal attention, [T, H, D], of each sequence's newest tokens; the last query is its last token."""
        if sliding_window not in self._sequences:
            self._sequences[sliding_window] = list(self._decodes(sliding_window)), list(self._prompts(sliding_window))
        decodes, prompts = self._sequences[sliding_window]
        if len(decodes) == 1 and decodes[0].tokens is None:
            return self._decode(query, cache, decodes[0], scale)
        output = torch.empty_like(query)
        for group in decodes:
            assert group.tokens is not None
            output[group.tokens] = self._decode(query[group.tokens], cache, group, scale)
        for prompt in prompts:
            output[prompt.tokens] = self._prefill(query[prompt.tokens], cache, prompt, scale)
        return output

    def _gather(self, cache: torch.Tensor, blocks: torch.Tensor, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values in these blocks, which are as many for each of the sequences; both [batch, KVH, S, D]."""
        heads = cache.index_select(0, blocks).view(batch, -1, *cache.shape[2:]).transpose(1, 2)
        return heads[:, : self._num_kv_heads], heads[:, self._num_kv_heads :]

    def _blocks(self, rows: NDArray[np.int64], ends: NDArray[np.int32], starts: NDArray[np.int32]) -> torch.Tensor:
        """The blocks of each sequence with these keys, from `starts` on, [B * blocks of the longest] int64.

        A shorter sequence's first block stands in for those it lacks.
        """
        first, num_blocks = starts // self._block_size, -(-(ends - starts) // self._block_size)
        places = np.arange(num_blocks.max())
        places = np.where(places < num_blocks[:, None], first[:, None] + places, first[:, None])
        return torch.from_numpy(self._block_tables[rows[:, None], places].astype(np.int64).reshape(-1))

    def _bias(self, is_attended: NDArray[np.bool_]) -> torch.Tensor:
        bias = torch.zeros(is_attended.shape, dtype=self._dtype)
        return bias.masked_fill_(torch.from_numpy(~is_attended), -torch.inf)

    def _decodes(self, sliding_window: int | None) -> Iterator[_Decodes]:
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
    ) -> _Decodes:
        """Sequences of about the same length behind their prefixes; all have one, or none has."""
        lengths = self.sequence_lengths[rows]
        ends = (lengths - prefix_lengths)[:, None]
        blocks = self._blocks(rows, lengths, prefix_lengths)
        key_positions = np.arange(len(blocks) // len(rows) * self._block_size)
        is_attended = key_positions < ends
        if sliding_window is not None:
            is_attended &= key_positions >= ends - sliding_window
        tokens = None if len(rows) == self.query_starts[-1] else self.query_starts[rows].astype(np.int64)
        return _Decodes(
            None if tokens is None else torch.from_numpy(tokens),
            self._prefixes(prefix_lengths, owners) if prefix_lengths.any() else None,
            blocks,
            None if is_attended.all() else self._bias(is_attended)[:, None, None],
        )

    def _prefixes(self, prefix_lengths: NDArray[np.int32], owners: NDArray[np.int64]) -> _Prefixes:
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
        blocks = self._blocks(first_owners, lengths, np.zeros_like(lengths))
        is_attended = np.arange(len(blocks) // len(first) * self._block_size) < lengths[:, None]
        return _Prefixes(
            len(first),
            blocks,
            None if is_attended.all() else self._bias(is_attended)[:, None, None],
            torch.from_numpy(sequences.reshape(-1)),
            torch.from_numpy(places),
        )

    def _prompts(self, sliding_window: int | None) -> Iterator[_Prompt]:
        for row in np.flatnonzero(np.diff(self.query_starts) > 1):
            start, end, length = (
                int(number) for number in (*self.query_starts[row : row + 2], self.sequence_lengths[row])
            )
            bias = None
            if end - start < length or (sliding_window is not None and sliding_window < length):
                key_positions, query_positions = np.arange(length), np.arange(length - (end - start), length)[:, None]
                is_attended = key_positions <= query_positions
                if sliding_window is not None:
                    is_attended &= key_positions > query_positions - sliding_window
                bias = self._bias(is_attended)
            blocks = self._blocks(np.array([row]), self.sequence_lengths[row : row + 1], np.zeros(1, np.int32))
            yield _Prompt(slice(start, end), blocks, length, bias)

    def _decode(self, query: torch.Tensor, cache: torch.Tensor, group: _Decodes, scale: float) -> torch.Tensor:
        """The query heads that share a key head are the rows of one product, so K and V are read once."""
        batch, num_heads, head_dim = query.shape
        shape = (batch, self._num_kv_heads, -1, head_dim)
        query = query.view(shape)
        key, value = self._gather(cache, group.blocks, batch)
        output, own_sums = _attention_with_sums(query, key, value, group.bias, scale)
        if group.prefixes is not None:
            # The queries of all sequences that begin with the same keys are rows of one product, too.
            prefixes = group.prefixes
            key, value = self._gather(cache, prefixes.blocks, prefixes.count)
            rows = query.index_select(0, prefixes.sequences).view(prefixes.count, -1, *query.shape[1:])
            shared = rows.transpose(1, 2)  # [prefixes, KVH, rows, group, D]
            of_prefix, sums = _attention_with_sums(shared.flatten(2, 3), key, value, prefixes.bias, scale)
            of_prefix = of_prefix.view_as(shared).transpose(1, 2).flatten(0, 1).index_select(0, prefixes.rows)
            sums = sums.view(shared.shape[:4]).transpose(1, 2).flatten(0, 1).index_select(0, prefixes.rows)
            share = sums.sub(own_sums).sigmoid_().unsqueeze(3).to(output.dtype)
            output = torch.lerp(output, of_prefix, share)
        return output.reshape(batch, num_heads, head_dim)

    def _prefill(self, query: torch.Tensor, cache: torch.Tensor, prompt: _Prompt, scale: float) -> torch.Tensor:
        """Keys are expanded over the query heads that share them, not copied."""
        query_length, num_heads, head_dim = query.shape
        group = num_heads // self._num_kv_heads
        key, value = (
            heads[:, :, : prompt.length].transpose(0, 1).expand(-1, group, -1, -1)
            for heads in self._gather(cache, prompt.blocks, 1)
        )
        output = F.scaled_dot_product_attention(
            query.view(query_length, self._num_kv_heads, group, head_dim).permute(1, 2, 0, 3), key, value,
            attn_mask=prompt.bias, is_causal=prompt.bias is None, scale=scale,
        )  # fmt: skip
        return output.permute(2, 0, 1, 3).reshape(query_length, num_heads, head_dim)


def cpu_attention(
    qkv: torch.Tensor,  # [T, (H + 2 * KVH) * D]; changed
    cache: torch.Tensor,  # [num_blocks, block_size, 2 * KVH, D]; written to
    plan: CpuAttentionPlan,
    cos_sin_cache: torch.Tensor,  # [max_positions, rotary_dim] float32: cosines of the angles, then their sines
    scale: float,
    sliding_window: int | None = None,  # positions attended to, the query's own included
    query_norm: torch.Tensor | None = None,  # [D]
    key_norm: torch.Tensor | None = None,  # [D]
    eps: float = 1e-6,
) -> torch.Tensor:
    """The heads' outputs, [T, H * D]; rotated keys and the values go to the cache. Heads are normed first if asked."""
    num_kv_heads, head_dim = cache.shape[2] // 2, cache.shape[3]
    num_tokens, width = qkv.shape
    num_heads = width // head_dim - 2 * num_kv_heads
    query, key_and_value = qkv.view(num_tokens, -1, head_dim).split((num_heads, 2 * num_kv_heads), dim=1)
    if query_norm is not None and key_norm is not None:
        key = key_and_value[:, :num_kv_heads]
        query.copy_(rms_norm_on_cpu(query, query_norm, eps))
        key.copy_(rms_norm_on_cpu(key, key_norm, eps))
    _rotate(qkv.view(num_tokens, -1, head_dim)[:, : num_heads + num_kv_heads], *plan.rotation(cos_sin_cache))
    plan.write(key_and_value, cache)
    return plan.attend(query, cache, scale, sliding_window).view(num_tokens, -1)


def _of_like_length(rows: NDArray[np.int64], lengths: NDArray[np.int32]) -> Iterator[NDArray[np.int64]]:
    classes = np.ceil(np.log2(np.maximum(lengths, _SHORT_LENGTH)))
    for length_class in np.unique(classes):
        yield rows[classes == length_class]


def _attention_with_sums(
    query: torch.Tensor,  # [B, KVH, Q, D]
    key: torch.Tensor,  # [B, KVH, S, D]
    value: torch.Tensor,  # [B, KVH, S, D]
    bias: torch.Tensor | None,  # [B, 1, 1, S]
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs, [B, KVH, Q, D], and the logarithms of their sums of exponentials, [B, KVH, Q]."""
    outputs: tuple[torch.Tensor, torch.Tensor] = _flash_attention(query, key, value, attn_mask=bias, scale=scale)
    return outputs


def _rotate(heads: torch.Tensor, factor: torch.Tensor, exchanged_factor: torch.Tensor) -> None:
    """Rotate, in place and by halves, each head's first dimensions, as many as there are factors."""
    rotary_dim = factor.shape[2]
    if rotary_dim < heads.shape[2]:
        heads = heads[..., :rotary_dim]
    exchanged = heads.roll(rotary_dim // 2, dims=-1)
    heads.copy_(torch.addcmul(heads * factor, exchanged, exchanged_factor))
