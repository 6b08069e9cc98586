"""Attention on a CPU, from the qkv projection to the heads' outputs; what all layers of a step share is made once.

A cache is read and written as a matrix: keys and values are gathered a block and head at a time, and written a token
and head at a time. Sequences with one query are one product, in groups of about the same length. Of those that begin
with the same blocks, these are read once: outputs of the common keys and of each one's own are then weighted by their
sums of exponentials. A block is zeroed as its first slot is written: what lies beyond a sequence's end is then masked
by what it adds to a score, and no NaN that another sequence left there can come through.

Shapes: T tokens of the step, B sequences, H query heads, KVH key/value heads, D head size.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from text_generation_kernels.rms_norm import rms_norm_on_cpu
from text_generation_kernels.shared_prefix import find_shared_prefixes

# Sequences up to here are decoded in one product, padded to the longest; longer ones, with those up to twice as long.
_SHORT_LENGTH = 256
# Keys that sequences share get a product of their own from so many on that need not be gathered again. The demo
# model's forward pass, 2 cores of a Xeon, ms: 8 sequences with 608 in common 35.7 and 29.0, 4 with 608 25.0 and 23.0,
# 8 with 256 30.9 and 29.2; 8 with 128 28.5 and 30.1, 2 with 608 16.8 and 17.5.
_MIN_KEYS_SAVED = 1536
_MIN_SHARED_LENGTH = 128

# As F.scaled_dot_product_attention, which does not tell the logarithms of the sums of exponentials.
_attention_with_sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


@dataclass(frozen=True)
class _Decodes:
    """Sequences with one query each."""

    tokens: torch.Tensor | None  # [B] int64; None: the step's tokens, one after another
    prefix: torch.Tensor | None  # [KVH * blocks] int64: rows of a cache with what all of them begin with
    blocks: torch.Tensor  # [B * KVH * blocks of the longest] int64: rows of a cache with what follows
    bias: torch.Tensor | None  # [B, 1, 1, S]: 0 or -inf; None: every position in those blocks is attended to


@dataclass(frozen=True)
class _Prompt:
    """A sequence with several queries."""

    tokens: slice
    blocks: torch.Tensor  # [KVH * blocks] int64: rows of a cache
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
        cache: torch.Tensor,  # [num_blocks, KVH, block_size, D]; any layer's
    ) -> None:
        _, self._num_kv_heads, self._block_size, _ = cache.shape
        self._dtype = cache.dtype
        self._block_tables = block_tables
        self.query_starts = query_starts
        self.sequence_lengths = sequence_lengths
        self._positions = torch.from_numpy(positions)
        self._rotation: tuple[torch.Tensor, torch.Tensor] | None = None
        self._sequences: dict[int | None, tuple[list[_Decodes], list[_Prompt]]] = {}
        heads = np.arange(self._num_kv_heads)
        blocks, offsets = np.divmod(slot_mapping.astype(np.int64), self._block_size)
        rows = (blocks[:, None] * self._num_kv_heads + heads) * self._block_size + offsets[:, None]
        self._written = torch.from_numpy(rows.reshape(-1))
        begun = blocks[offsets == 0]
        partly = begun[~np.isin(begun, blocks[offsets == self._block_size - 1])]
        self._begun = torch.from_numpy((partly[:, None] * self._num_kv_heads + heads).reshape(-1))
        self._begins_blocks = len(partly) > 0

    def rotation(self, cos_sin_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Factors, [T, 1, rotary_dim], of a head and of the head with its halves exchanged; all layers' are the same.

        The table is [max_positions, rotary_dim] float32: cosines of the angles, then their sines.
        """
        if self._rotation is None:
            cos, sin = cos_sin_cache[self._positions].unsqueeze(1).chunk(2, dim=-1)
            self._rotation = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
        return self._rotation

    def write(self, key: torch.Tensor, value: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor) -> None:
        """Store the step's keys and values, both [T, KVH, D]."""
        for new, cache in ((key, key_cache), (value, value_cache)):
            if self._begins_blocks:
                self._by_block(cache).index_fill_(0, self._begun, 0)
            rows = cache.view(-1, cache.shape[3])
            rows.index_copy_(0, self._written, new.reshape(-1, rows.shape[1]))

    def attend(
        self,
        query: torch.Tensor,  # [T, H, D]
        key_cache: torch.Tensor,  # [num_blocks, KVH, block_size, D]
        value_cache: torch.Tensor,
        scale: float,
        sliding_window: int | None,
    ) -> torch.Tensor:
        """Causal attention, [T, H, D], of each sequence's newest tokens; the last query is its last token."""
        if sliding_window not in self._sequences:
            self._sequences[sliding_window] = list(self._decodes(sliding_window)), list(self._prompts(sliding_window))
        decodes, prompts = self._sequences[sliding_window]
        caches = self._by_block(key_cache), self._by_block(value_cache)
        if len(decodes) == 1 and decodes[0].tokens is None:
            return self._decode(query, *caches, decodes[0], scale)
        output = torch.empty_like(query)
        for group in decodes:
            assert group.tokens is not None
            output[group.tokens] = self._decode(query[group.tokens], *caches, group, scale)
        for prompt in prompts:
            output[prompt.tokens] = self._prefill(query[prompt.tokens], *caches, prompt, scale)
        return output

    def _by_block(self, cache: torch.Tensor) -> torch.Tensor:
        return cache.view(cache.shape[0] * self._num_kv_heads, -1)

    def _blocks(self, rows: NDArray[np.int64], lengths: NDArray[np.int32], first: int = 0) -> torch.Tensor:
        """Rows of a cache for each sequence, head and block from the first one on, up to so many keys.

        A shorter sequence's first block stands in for those it lacks.
        """
        num_blocks = -(-lengths // self._block_size)
        tables = self._block_tables[rows, first : first + num_blocks.max()].astype(np.int64)
        tables = np.where(np.arange(tables.shape[1]) < num_blocks[:, None], tables, tables[:, :1])
        heads = np.arange(self._num_kv_heads)[:, None]
        return torch.from_numpy((tables[:, None] * self._num_kv_heads + heads).reshape(-1))

    def _bias(self, is_attended: NDArray[np.bool_]) -> torch.Tensor:
        bias = torch.zeros(is_attended.shape, dtype=self._dtype)
        return bias.masked_fill_(torch.from_numpy(~is_attended), -torch.inf)

    def _decodes(self, sliding_window: int | None) -> Iterator[_Decodes]:
        query_lengths = np.diff(self.query_starts)
        is_alone = query_lengths == 1
        if sliding_window is None:
            for shared in find_shared_prefixes(
                self._block_tables, query_lengths, self.sequence_lengths, self._block_size, _MIN_SHARED_LENGTH
            ):
                if shared.length * (len(shared.sequences) - 1) >= _MIN_KEYS_SAVED:
                    is_alone[shared.sequences] = False
                    yield from self._decodes_behind(shared.length, shared.sequences, sliding_window)
        yield from self._decodes_behind(0, np.flatnonzero(is_alone), sliding_window)

    def _decodes_behind(
        self, prefix_length: int, rows: NDArray[np.int64], sliding_window: int | None
    ) -> Iterator[_Decodes]:
        """Groups of sequences that all begin with the same keys, so many."""
        own_lengths = self.sequence_lengths[rows] - prefix_length
        classes = np.ceil(np.log2(np.maximum(own_lengths, _SHORT_LENGTH)))
        for length_class in np.unique(classes):
            group, lengths = rows[classes == length_class], own_lengths[classes == length_class]
            blocks = self._blocks(group, lengths, prefix_length // self._block_size)
            ends = lengths[:, None]
            key_positions = np.arange(len(blocks) // (self._num_kv_heads * len(group)) * self._block_size)
            is_attended = key_positions < ends
            if sliding_window is not None:
                is_attended &= key_positions >= ends - sliding_window
            tokens = None if len(group) == self.query_starts[-1] else self.query_starts[group].astype(np.int64)
            yield _Decodes(
                None if tokens is None else torch.from_numpy(tokens),
                self._blocks(group[:1], np.array([prefix_length])) if prefix_length else None,
                blocks,
                None if is_attended.all() else self._bias(is_attended)[:, None, None],
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
            blocks = self._blocks(np.array([row]), self.sequence_lengths[row : row + 1])
            yield _Prompt(slice(start, end), blocks, length, bias)

    def _decode(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, group: _Decodes, scale: float
    ) -> torch.Tensor:
        """The query heads that share a key head are the rows of one product, so K and V are read once."""
        batch, num_heads, head_dim = query.shape
        shape = (batch, self._num_kv_heads, -1, head_dim)
        query = query.view(shape)
        key, value = (cache.index_select(0, group.blocks).view(shape) for cache in (keys, values))
        if group.prefix is None:
            output = F.scaled_dot_product_attention(query, key, value, attn_mask=group.bias, scale=scale)
        else:
            output, own_sums = _attention_with_sums(query, key, value, attn_mask=group.bias, scale=scale)
            # The queries of all sequences are rows of one product, too.
            key, value = (cache.index_select(0, group.prefix).view(1, *shape[1:]) for cache in (keys, values))
            query = query.transpose(0, 1).reshape(1, *shape[1:])
            of_prefix, sums = _attention_with_sums(query, key, value, scale=scale)
            sums = sums.view(self._num_kv_heads, batch, -1).transpose(0, 1)
            share = sums.sub(own_sums).sigmoid_().unsqueeze(3).to(output.dtype)
            of_prefix = of_prefix.reshape(self._num_kv_heads, batch, -1, head_dim).transpose(0, 1)
            output = torch.lerp(output, of_prefix, share)
        return output.reshape(batch, num_heads, head_dim)

    def _prefill(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, prompt: _Prompt, scale: float
    ) -> torch.Tensor:
        """Keys are expanded over the query heads that share them, not copied."""
        query_length, num_heads, head_dim = query.shape
        shape, group = (self._num_kv_heads, 1, -1, head_dim), num_heads // self._num_kv_heads
        key, value = (
            cache.index_select(0, prompt.blocks).view(shape)[:, :, : prompt.length].expand(-1, group, -1, -1)
            for cache in (keys, values)
        )
        output = F.scaled_dot_product_attention(
            query.view(query_length, self._num_kv_heads, group, head_dim).permute(1, 2, 0, 3), key, value,
            attn_mask=prompt.bias, is_causal=prompt.bias is None, scale=scale,
        )  # fmt: skip
        return output.permute(2, 0, 1, 3).reshape(query_length, num_heads, head_dim)


def cpu_attention(
    qkv: torch.Tensor,  # [T, (H + 2 * KVH) * D]
    key_cache: torch.Tensor,  # [num_blocks, KVH, block_size, D]
    value_cache: torch.Tensor,  # [num_blocks, KVH, block_size, D]
    plan: CpuAttentionPlan,
    cos_sin_cache: torch.Tensor,  # [max_positions, rotary_dim] float32: cosines of the angles, then their sines
    scale: float,
    sliding_window: int | None = None,  # positions attended to, the query's own included
    query_norm: torch.Tensor | None = None,  # [D]
    key_norm: torch.Tensor | None = None,  # [D]
    eps: float = 1e-6,
) -> torch.Tensor:
    """The heads' outputs, [T, H * D]; rotated keys and the values go to the caches. Heads are normed first if asked."""
    num_kv_heads, head_dim = key_cache.shape[1], key_cache.shape[3]
    num_tokens, width = qkv.shape
    num_rotated = width // head_dim - num_kv_heads
    num_heads = num_rotated - num_kv_heads
    rotated, value = qkv.view(num_tokens, -1, head_dim).split((num_rotated, num_kv_heads), dim=1)
    if query_norm is not None and key_norm is not None:
        query, key = rotated.split((num_heads, num_kv_heads), dim=1)
        rotated = torch.cat((rms_norm_on_cpu(query, query_norm, eps), rms_norm_on_cpu(key, key_norm, eps)), dim=1)
    query, key = _rotate(rotated, *plan.rotation(cos_sin_cache)).split((num_heads, num_kv_heads), dim=1)
    plan.write(key, value, key_cache, value_cache)
    return plan.attend(query, key_cache, value_cache, scale, sliding_window).view(num_tokens, -1)


def _rotate(heads: torch.Tensor, factor: torch.Tensor, exchanged_factor: torch.Tensor) -> torch.Tensor:
    """Each head's first dimensions, as many as there are factors, rotated by halves."""
    rotary_dim = factor.shape[2]
    if rotary_dim < heads.shape[2]:
        turned = _rotate(heads[..., :rotary_dim], factor, exchanged_factor)
        return torch.cat((turned, heads[..., rotary_dim:]), dim=-1)
    wide = heads.float()
    return torch.addcmul(wide * factor, wide.roll(rotary_dim // 2, dims=-1), exchanged_factor).to(heads.dtype)
