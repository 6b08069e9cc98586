"""Operations in plain PyTorch: what the Triton kernels are tested against.

Shapes: T tokens of the step, B sequences, H query heads, KVH key/value heads, D head size, V vocabulary.
"""

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


def paged_attention(
    query: torch.Tensor,  # [T, H, D]
    key_cache: torch.Tensor,  # [num_blocks, KVH, block_size, D]
    value_cache: torch.Tensor,  # [num_blocks, KVH, block_size, D]
    block_tables: torch.Tensor,  # [B, max_blocks] int32
    query_starts: torch.Tensor,  # [B + 1] int32
    sequence_lengths: torch.Tensor,  # [B] int32
    scale: float,
    sliding_window: int | None = None,  # positions attended to, the query's own included
    soft_cap: float | None = None,  # scores are bent into (-soft_cap, soft_cap) by a hyperbolic tangent
) -> torch.Tensor:
    """Causal attention of each sequence's newest tokens over its blocks; the last query is its last token."""
    num_kv_heads = key_cache.shape[1]
    starts = query_starts.tolist()
    output = torch.zeros_like(query)
    for row, length in enumerate(sequence_lengths.tolist()):
        start, end = starts[row], starts[row + 1]
        if start == end:
            continue
        keys, values = (_gather(cache, block_tables[row], length).float() for cache in (key_cache, value_cache))
        grouped = query[start:end].unflatten(1, (num_kv_heads, -1)).permute(1, 2, 0, 3)  # [KVH, group, Q, D]
        scores = (grouped.float() @ keys.transpose(2, 3)) * scale
        if soft_cap is not None:
            scores = soft_cap * (scores / soft_cap).tanh()
        mask = _causal_mask(end - start, length, sliding_window, query.device)
        weights = scores.masked_fill(~mask, -torch.inf).softmax(dim=-1)
        output[start:end] = (weights @ values).permute(2, 0, 1, 3).flatten(1, 2).to(query.dtype)
    return output


def _gather(cache: torch.Tensor, block_table: torch.Tensor, length: int) -> torch.Tensor:
    """The first `length` positions of a sequence."""  # [KVH, 1, length, D]
    num_blocks = -(-length // cache.shape[2])
    taken = cache[block_table[:num_blocks].long()]
    return taken.transpose(0, 1).flatten(1, 2)[:, None, :length]


def _causal_mask(query_length: int, length: int, sliding_window: int | None, device: torch.device) -> torch.Tensor:
    query_positions = torch.arange(length - query_length, length, device=device).unsqueeze(1)
    key_positions = torch.arange(length, device=device)
    mask = key_positions <= query_positions
    if sliding_window is not None:
        mask &= key_positions > query_positions - sliding_window
    return mask  # [query_length, length]


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """silu of the first half of the last dimension, times the second half."""  # [T, 2 * I] -> [T, I]
    half = x.shape[-1] // 2
    return F.silu(x[..., :half]).mul_(x[..., half:])


# Of the eight tokens of each byte of a mask: the largest logit that they may have.
_LARGEST_LOGITS = torch.where(torch.arange(256)[:, None] >> torch.arange(8) & 1 == 1, torch.inf, -torch.inf)


def mask_tokens(logits: torch.Tensor, masks: torch.Tensor, mask_rows: torch.Tensor) -> None:
    """Set the logits of tokens whose bit is 0 to -inf, in rows that have a mask.

    A CPU looks bytes up and takes the smaller numbers in a fifth of the time of a choice by booleans.
    """  # [B, V], [M, ceil(V / 32)] int32, [B] int32; -1: no mask
    rows = (mask_rows >= 0).nonzero().squeeze(1)
    octets = masks[mask_rows[rows].long()].view(torch.uint8).int()
    largest = F.embedding(octets, _LARGEST_LOGITS.to(logits)).flatten(1)[:, : logits.shape[1]]
    if len(rows) == len(logits):
        torch.minimum(logits, largest, out=logits)
    else:
        logits[rows] = torch.minimum(logits[rows], largest)
