"""Attention on a CPU, from the qkv projection to the heads' outputs, in a form that TorchScript takes.

Keys and values of all heads are gathered a block at a time and written a token at a time. Outputs of keys that
sequences have in common and of each one's own are weighted by their sums of exponentials. A block is zeroed as its
first slot is written: what lies beyond a sequence's end is then masked by what it adds to a score, and no NaN that
another sequence left there can come through.

Shapes: T tokens of the step, B sequences, H query heads, KVH key/value heads, D head size; a layer's cache is
[num_blocks, block_size, 2 * KVH, D]: of each token its keys, then its values.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from text_generation_kernels.rms_norm import rms_norm_on_cpu


class StepTokens(NamedTuple):
    """Where a step's tokens are."""

    written: torch.Tensor  # [T] int64: slots of their keys and values
    begun: torch.Tensor | None  # [n] int64: blocks that are written to for the first time, and not filled
    factor: torch.Tensor  # [T, 1, rotary_dim] float32, of a head
    exchanged_factor: torch.Tensor  # [T, 1, rotary_dim] float32, of the head with its halves exchanged


class Keys(NamedTuple):
    """What sequences attend to, each as many positions."""

    blocks: torch.Tensor  # [sequences * blocks of one] int64
    length: int  # positions of one
    bias: torch.Tensor | None  # 0 or -inf, [sequences, 1, 1, length]; None: every position is attended to


class Prefixes(NamedTuple):
    """What sequences begin with, each prefix with as many rows as the most frequent one has sequences."""

    num_prefixes: int
    keys: Keys
    sequences: torch.Tensor  # [prefixes * rows] int64: which of B each row is of
    rows: torch.Tensor  # [B] int64: a row of each sequence


class Decodes(NamedTuple):
    """Sequences with one query each."""

    tokens: torch.Tensor | None  # [B] int64; None: the step's tokens, one after another
    prefixes: Prefixes | None
    keys: Keys  # behind those


class Prompt(NamedTuple):
    """A sequence with several queries."""

    start: int  # of its tokens
    end: int
    keys: Keys  # bias: [Q, length]; None: causal from the first position on


class StepSequences(NamedTuple):
    """What a step's queries attend to, in layers with one sliding window."""

    decodes: list[Decodes]
    prompts: list[Prompt]


def cpu_attention(
    qkv: torch.Tensor,  # [T, (H + 2 * KVH) * D]; changed
    cache: torch.Tensor,  # [num_blocks, block_size, 2 * KVH, D]; written to
    tokens: StepTokens,
    sequences: StepSequences,
    scale: float,
    query_norm: torch.Tensor | None,  # [D]
    key_norm: torch.Tensor | None,  # [D]
    eps: float,
) -> torch.Tensor:
    """The heads' outputs, [T, H * D]; rotated keys and the values go to the cache. Heads are normed first if asked.

    Attention is causal, of each sequence's newest tokens; the last query is its last token.
    """
    num_kv_heads, head_dim = cache.shape[2] // 2, cache.shape[3]
    heads = qkv.view(qkv.shape[0], -1, head_dim)
    num_heads = heads.shape[1] - 2 * num_kv_heads
    query = heads[:, :num_heads]
    if query_norm is not None and key_norm is not None:
        key = heads[:, num_heads : num_heads + num_kv_heads]
        query.copy_(rms_norm_on_cpu(query, query_norm, eps))
        key.copy_(rms_norm_on_cpu(key, key_norm, eps))
    _rotate(heads[:, : num_heads + num_kv_heads], tokens)
    _write(heads[:, num_heads:], cache, tokens)
    decodes = sequences.decodes
    if len(decodes) == 1 and decodes[0].tokens is None:
        return _decode(query, cache, decodes[0], scale)
    output = torch.empty_like(query)
    for group in decodes:
        places = group.tokens
        assert places is not None
        rows = _decode(query.index_select(0, places), cache, group, scale)
        output.index_copy_(0, places, rows.view(-1, num_heads, head_dim))
    for prompt in sequences.prompts:
        output[prompt.start : prompt.end] = _prefill(query[prompt.start : prompt.end], cache, prompt, scale)
    return output.view(output.shape[0], -1)


def _rotate(heads: torch.Tensor, tokens: StepTokens) -> None:
    """Rotate, in place and by halves, each head's first dimensions, as many as there are factors."""
    rotary_dim = tokens.factor.shape[2]
    if rotary_dim < heads.shape[2]:
        heads = heads[..., :rotary_dim]
    exchanged = heads.roll(rotary_dim // 2, dims=-1)
    heads.copy_(torch.addcmul(heads * tokens.factor, exchanged, tokens.exchanged_factor))


def _write(heads: torch.Tensor, cache: torch.Tensor, tokens: StepTokens) -> None:
    """Store keys and values, which are a token's heads: first its keys, then its values."""  # [T, 2 * KVH, D]
    begun = tokens.begun
    if begun is not None:
        cache.index_fill_(0, begun, 0)
    cache.view(-1, cache.shape[2], cache.shape[3]).index_copy_(0, tokens.written, heads)


def _gather(cache: torch.Tensor, keys: Keys, batch: int) -> torch.Tensor:
    """Of the sequences, which are so many, keys and behind them values, [batch, 2 * KVH, length, D]."""
    # As rows of a matrix: with more dimensions torch copies shorter pieces.
    heads = cache.view(cache.shape[0], -1).index_select(0, keys.blocks).view(batch, -1, cache.shape[2], cache.shape[3])
    return heads[:, : keys.length].transpose(1, 2)


def _decode(query: torch.Tensor, cache: torch.Tensor, group: Decodes, scale: float) -> torch.Tensor:
    """The query heads that share a key head are the rows of one product, so K and V are read once."""
    # [B, H, D] -> [B, H * D]
    batch, num_kv_heads = query.shape[0], cache.shape[2] // 2
    query = query.view(batch, num_kv_heads, -1, query.shape[2])
    output, own_sums = _attention_with_sums(query, _gather(cache, group.keys, batch), group.keys.bias, scale)
    prefixes = group.prefixes
    if prefixes is not None:
        # The queries of all sequences that begin with the same keys are rows of one product, too.
        of_prefix, sums = _attend_prefixes(query, cache, prefixes, scale)
        share = sums.sub(own_sums).sigmoid_().unsqueeze(3).to(output.dtype)
        output = torch.lerp(output, of_prefix, share)
    return output.reshape(batch, -1)


def _attend_prefixes(
    query: torch.Tensor, cache: torch.Tensor, prefixes: Prefixes, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs, [B, KVH, G, D], of each sequence's queries for its prefix, and the logarithms of their sums."""
    rows = query.index_select(0, prefixes.sequences).view(
        prefixes.num_prefixes, -1, query.shape[1], query.shape[2], query.shape[3]
    )
    rows = rows.transpose(1, 2)  # [prefixes, KVH, rows, group, D]
    output, sums = _attention_with_sums(
        rows.flatten(2, 3), _gather(cache, prefixes.keys, prefixes.num_prefixes), prefixes.keys.bias, scale
    )
    output = output.view_as(rows).transpose(1, 2).flatten(0, 1).index_select(0, prefixes.rows)
    sums = sums.view(rows.shape[:4]).transpose(1, 2).flatten(0, 1).index_select(0, prefixes.rows)
    return output, sums


def _attention_with_sums(
    query: torch.Tensor,  # [B, KVH, Q, D]
    key_and_value: torch.Tensor,  # [B, 2 * KVH, S, D]
    bias: torch.Tensor | None,  # [B, 1, 1, S] or [Q, S]
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs, [B, KVH, Q, D], and the logarithms of their sums of exponentials, [B, KVH, Q]."""
    num_kv_heads = query.shape[1]
    # What F.scaled_dot_product_attention chooses; that does not hand out the sums.
    output, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key_and_value[:, :num_kv_heads], key_and_value[:, num_kv_heads:], attn_mask=bias, scale=scale
    )
    return output, sums


def _prefill(query: torch.Tensor, cache: torch.Tensor, prompt: Prompt, scale: float) -> torch.Tensor:
    """Attention of a prompt's newest tokens."""  # [Q, H, D] -> [Q, H, D]
    num_tokens, num_heads, head_dim = query.shape
    num_kv_heads = cache.shape[2] // 2
    group = num_heads // num_kv_heads
    query = query.view(num_tokens, num_kv_heads, group, head_dim).permute(1, 2, 0, 3)
    key_and_value, bias = _gather(cache, prompt.keys, 1), prompt.keys.bias
    if bias is not None and group > 1 and num_tokens <= 64:
        # One product as in `_decode`: a forward pass of the demo model with 40 tokens behind 600 takes 39.6 ms for 41.2
        # (2 cores of a Xeon with AMX). With 128 tokens it is no faster.
        rows = query.reshape(1, num_kv_heads, -1, head_dim)
        output, _ = _attention_with_sums(rows, key_and_value, bias.repeat(group, 1), scale)
        output = output.view_as(query)
    else:
        # Keys are expanded over the query heads that share them, not copied.
        key_and_value = key_and_value.transpose(0, 1).expand(-1, group, -1, -1)
        output = F.scaled_dot_product_attention(
            query, key_and_value[:num_kv_heads], key_and_value[num_kv_heads:], attn_mask=bias, is_causal=bias is None,
            scale=scale,
        )  # fmt: skip
    return output.permute(2, 0, 1, 3).reshape(num_tokens, num_heads, head_dim)
