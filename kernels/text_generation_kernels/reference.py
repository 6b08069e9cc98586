"""Every operation in plain PyTorch: what the Triton kernels are tested against, and what a CPU runs.

Shapes: T tokens of the step, B sequences, H query heads, KVH key/value heads, D head size, V vocabulary.
"""

import numpy as np
import torch
import torch.nn.functional as F


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Root-mean-square norm over the last dimension, in float32 up to the product with the weight."""
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add the residual, then norm; returns the normed sum and the sum, which is the new residual."""
    total = x + residual
    return rms_norm(total, weight, eps), total


def rotary_embedding(
    query: torch.Tensor,  # [T, H, D]
    key: torch.Tensor,  # [T, KVH, D]
    positions: torch.Tensor,  # [T]
    cos_sin_cache: torch.Tensor,  # [max_positions, D]: cosines of the D/2 angles, then their sines
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate the two halves of each head by the angles of the token's position."""
    assert cos_sin_cache.shape[1] == query.shape[2] == key.shape[2], "rotary embedding covers whole heads"
    cos, sin = cos_sin_cache[positions].unsqueeze(1).chunk(2, dim=-1)
    return _rotate(query, cos, sin), _rotate(key, cos, sin)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def write_kv(
    key: torch.Tensor,  # [T, KVH, D]
    value: torch.Tensor,  # [T, KVH, D]
    key_cache: torch.Tensor,  # [num_blocks, KVH, block_size, D]
    value_cache: torch.Tensor,  # [num_blocks, KVH, block_size, D]
    slot_mapping: torch.Tensor,  # [T]; -1: do not write
) -> None:
    """Store keys and values of the step at their slots."""
    rows = (slot_mapping >= 0).nonzero().squeeze(1)
    slots = slot_mapping[rows]
    blocks, offsets = slots // key_cache.shape[2], slots % key_cache.shape[2]
    key_cache[blocks, :, offsets] = key[rows].to(key_cache.dtype)
    value_cache[blocks, :, offsets] = value[rows].to(value_cache.dtype)


# Up to here sequences of different lengths are decoded in one product, padded to the longest.
_SHORT_LENGTH = 256


def paged_attention(
    query: torch.Tensor,  # [T, H, D]
    key_cache: torch.Tensor,  # [num_blocks, KVH, block_size, D]
    value_cache: torch.Tensor,  # [num_blocks, KVH, block_size, D]
    block_tables: torch.Tensor,  # [B, max_blocks] int32
    query_starts: torch.Tensor,  # [B + 1] int32
    sequence_lengths: torch.Tensor,  # [B] int32
    max_query_length: int,
    max_sequence_length: int,
    scale: float,
    sliding_window: int | None = None,  # positions attended to, the query's own included
) -> torch.Tensor:
    """Causal attention of each sequence's newest tokens over its blocks; the last query is its last token."""
    if max_query_length == 1:
        return _decode_by_length(
            query, key_cache, value_cache, block_tables, sequence_lengths, max_sequence_length, scale, sliding_window
        )
    starts, lengths = query_starts.tolist(), sequence_lengths.tolist()
    output = torch.empty_like(query)
    decode_rows = [row for row in range(len(lengths)) if starts[row + 1] - starts[row] == 1]
    if decode_rows:
        rows = torch.tensor(decode_rows, device=query.device)
        tokens = query_starts[rows].long()
        longest = max(lengths[row] for row in decode_rows)
        output[tokens] = _decode_by_length(
            query[tokens], key_cache, value_cache, block_tables[rows], sequence_lengths[rows], longest, scale,
            sliding_window,
        )  # fmt: skip
    for row, length in enumerate(lengths):
        start, end = starts[row], starts[row + 1]
        if end - start > 1:
            keys = _gather(key_cache, block_tables[row : row + 1], length)
            values = _gather(value_cache, block_tables[row : row + 1], length)
            output[start:end] = _prefill(query[start:end], keys, values, scale, sliding_window)
    return output


def _gather(cache: torch.Tensor, block_tables: torch.Tensor, length: int) -> torch.Tensor:
    """The first `length` positions of each sequence, whole blocks copied."""  # [KVH, B, length, D]
    _, num_kv_heads, block_size, head_dim = cache.shape
    num_blocks = -(-length // block_size)
    blocks = block_tables[:, :num_blocks].reshape(-1).long()
    taken = cache.transpose(0, 1)[:, blocks]
    return taken.view(num_kv_heads, block_tables.shape[0], num_blocks * block_size, head_dim)[:, :, :length]


def _decode_by_length(
    query: torch.Tensor,  # [B, H, D]
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    sequence_lengths: torch.Tensor,
    max_sequence_length: int,
    scale: float,
    sliding_window: int | None,
) -> torch.Tensor:
    """Rows whose lengths are of one power of two are gathered together, so one long sequence costs only itself."""
    if query.is_cuda or max_sequence_length <= _SHORT_LENGTH:
        return _decode(
            query, key_cache, value_cache, block_tables, sequence_lengths, max_sequence_length, scale, sliding_window
        )
    classes = torch.frexp(sequence_lengths.clamp(min=_SHORT_LENGTH).float() - 0.5).exponent
    output = torch.empty_like(query)
    for length_class in classes.unique().tolist():
        rows = (classes == length_class).nonzero().squeeze(1)
        lengths = sequence_lengths[rows]
        tables = block_tables[rows]
        longest = int(lengths.max())
        output[rows] = _decode(query[rows], key_cache, value_cache, tables, lengths, longest, scale, sliding_window)
    return output


def _decode(
    query: torch.Tensor,  # [B, H, D]
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    sequence_lengths: torch.Tensor,
    max_sequence_length: int,
    scale: float,
    sliding_window: int | None,
) -> torch.Tensor:
    """One query a sequence. The heads of a group are the rows of one product, so K and V are read once."""
    batch, num_heads, head_dim = query.shape
    num_kv_heads = key_cache.shape[1]
    keys = _gather(key_cache, block_tables, max_sequence_length)
    values = _gather(value_cache, block_tables, max_sequence_length)
    grouped = query.view(batch, num_kv_heads, num_heads // num_kv_heads, head_dim).transpose(0, 1)
    key_positions = torch.arange(max_sequence_length, device=query.device)
    lengths = sequence_lengths.clamp(min=1).unsqueeze(1)
    mask = key_positions < lengths
    if sliding_window is not None:
        mask &= key_positions >= lengths - sliding_window
    # What a block holds beyond a sequence's end may be anything, NaN included, which no mask makes harmless.
    beyond = ~mask[None, :, :, None]
    keys.masked_fill_(beyond, 0)
    values.masked_fill_(beyond, 0)
    output = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask[None, :, None], scale=scale)
    return output.transpose(0, 1).reshape(batch, num_heads, head_dim)


def _prefill(
    query: torch.Tensor,  # [Q, H, D]
    keys: torch.Tensor,  # [KVH, 1, S, D]
    values: torch.Tensor,  # [KVH, 1, S, D]
    scale: float,
    sliding_window: int | None,
) -> torch.Tensor:
    """Several queries of one sequence, the last at the last key. Keys are expanded over a group, not copied."""
    query_length, num_heads, head_dim = query.shape
    num_kv_heads, _, length, _ = keys.shape
    group = num_heads // num_kv_heads
    grouped = query.view(query_length, num_kv_heads, group, head_dim).permute(1, 2, 0, 3)
    is_whole = query_length == length and (sliding_window is None or sliding_window >= length)
    mask = None if is_whole else _causal_mask(query_length, length, sliding_window, query.device)
    output = F.scaled_dot_product_attention(
        grouped, keys.expand(-1, group, -1, -1), values.expand(-1, group, -1, -1),
        attn_mask=mask, is_causal=is_whole, scale=scale,
    )  # fmt: skip
    return output.permute(2, 0, 1, 3).reshape(query_length, num_heads, head_dim)


def _causal_mask(query_length: int, length: int, sliding_window: int | None, device: torch.device) -> torch.Tensor:
    query_positions = torch.arange(length - query_length, length, device=device).unsqueeze(1)
    key_positions = torch.arange(length, device=device)
    mask = key_positions <= query_positions
    if sliding_window is not None:
        mask &= key_positions > query_positions - sliding_window
    return mask  # [query_length, length]


def soft_capped_paged_attention(
    query: torch.Tensor,  # [T, H, D]
    key_cache: torch.Tensor,  # [num_blocks, KVH, block_size, D]
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,  # [B, max_blocks] int32
    query_starts: torch.Tensor,  # [B + 1] int32
    sequence_lengths: torch.Tensor,  # [B] int32
    scale: float,
    soft_cap: float,  # scores are bent into (-soft_cap, soft_cap) by a hyperbolic tangent
    sliding_window: int | None = None,
) -> torch.Tensor:
    """`paged_attention` with capped scores, one sequence after another."""
    num_kv_heads = key_cache.shape[1]
    starts = query_starts.tolist()
    output = torch.zeros_like(query)
    for row, length in enumerate(sequence_lengths.tolist()):
        start, end = starts[row], starts[row + 1]
        if start == end:
            continue
        keys, values = (_gather(cache, block_tables[row : row + 1], length) for cache in (key_cache, value_cache))
        grouped = query[start:end].unflatten(1, (num_kv_heads, -1)).permute(1, 2, 0, 3)  # [KVH, group, Q, D]
        scores = (grouped.float() @ keys.float().transpose(2, 3)) * scale
        mask = _causal_mask(end - start, length, sliding_window, query.device)
        capped = (soft_cap * (scores / soft_cap).tanh()).masked_fill(~mask, -torch.inf)
        result = capped.softmax(dim=-1) @ values.float()
        output[start:end] = result.permute(2, 0, 1, 3).flatten(1, 2).to(query.dtype)
    return output


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """silu of the first half of the last dimension, times the second half."""  # [T, 2 * I] -> [T, I]
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def mask_tokens(logits: torch.Tensor, masks: torch.Tensor, mask_rows: torch.Tensor) -> None:
    """Set the logits of tokens whose bit is 0 to -inf, in rows that have a mask."""
    # [B, V], [M, ceil(V / 32)] int32, [B] int32; -1: no mask
    rows = (mask_rows >= 0).nonzero().squeeze(1)
    words = masks[mask_rows[rows].long()].cpu().numpy().view(np.uint8)
    bits = np.unpackbits(words, axis=1, count=logits.shape[1], bitorder="little")
    excluded = torch.from_numpy(bits == 0).to(logits.device)
    if len(rows) == len(logits):
        logits.masked_fill_(excluded, float("-inf"))
    else:
        logits[rows] = logits[rows].masked_fill_(excluded, float("-inf"))
