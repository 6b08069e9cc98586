"""From the qkv projection to attention in one kernel: head norms (optional), rotation, and the write to the KV cache.

Each program takes a few heads of one token: queries go to a tensor of their own, keys and values to the token's slot.
"""

import torch
import triton
import triton.language as tl

from text_generation_kernels import reference_fused
from text_generation_kernels.dispatch import early_launch, runs_kernel, wait_for_inputs
from text_generation_kernels.launch_settings import launch_settings


def rotary_kv_write(
    qkv: torch.Tensor,  # [T, (H + 2 * KVH) * D]
    positions: torch.Tensor,  # [T]
    cos_sin_cache: torch.Tensor,  # [max_positions, rotary_dim] float32: cosines of the angles, then their sines
    key_cache: torch.Tensor,  # [num_blocks, KVH, block_size, D]
    value_cache: torch.Tensor,  # [num_blocks, KVH, block_size, D]
    slot_mapping: torch.Tensor,  # [T]; -1: nothing is written
    query_norm: torch.Tensor | None = None,  # [D]
    key_norm: torch.Tensor | None = None,  # [D]
    eps: float = 1e-6,
) -> torch.Tensor:
    """Rotated queries, [T, H, D]; rotated keys and the values go to the caches. Heads are normed first if asked."""
    num_tokens = qkv.shape[0]
    _, num_kv_heads, block_size, head_dim = key_cache.shape
    num_heads = qkv.shape[1] // head_dim - 2 * num_kv_heads
    rotary_dim = cos_sin_cache.shape[1]
    assert qkv.shape[1] == (num_heads + 2 * num_kv_heads) * head_dim
    assert num_heads > 0
    assert rotary_dim % 2 == 0
    assert rotary_dim <= head_dim
    assert key_cache.shape == value_cache.shape
    assert positions.shape == slot_mapping.shape == (num_tokens,)
    assert (query_norm is None) == (key_norm is None)
    if not runs_kernel(qkv):
        return reference_fused.rotary_kv_write(
            qkv, positions, cos_sin_cache, key_cache, value_cache, slot_mapping, query_norm, key_norm, eps
        )
    assert qkv.stride(1) == 1
    assert key_cache.is_contiguous()
    assert value_cache.is_contiguous()
    assert cos_sin_cache.is_contiguous()
    assert cos_sin_cache.dtype == torch.float32
    query = torch.empty(num_tokens, num_heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    settings = launch_settings("rotary_kv_write", qkv.device)
    num_programs = triton.cdiv(num_heads, settings["HEADS"]) + 2 * triton.cdiv(num_kv_heads, settings["HEADS"])
    if num_tokens:
        rotary_kv_write_kernel[(num_tokens, num_programs)](
            qkv, positions, cos_sin_cache, key_cache, value_cache, slot_mapping, query, query_norm, key_norm,
            qkv.stride(0), eps, NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads, HEAD_DIM=head_dim,
            ROTARY_DIM=rotary_dim, BLOCK_SIZE=block_size, **early_launch(qkv.device), **settings,
        )  # fmt: skip
    return query


@triton.jit
def rotary_kv_write_kernel(
    qkv, positions, cos_sin_cache, key_cache, value_cache, slot_mapping, query, query_norm, key_norm,
    qkv_stride, eps, NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEADS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(EARLY)
    QUERY_PROGRAMS: tl.constexpr = (NUM_HEADS + HEADS - 1) // HEADS
    KV_PROGRAMS: tl.constexpr = (NUM_KV_HEADS + HEADS - 1) // HEADS
    token = tl.program_id(0).to(tl.int64)
    program = tl.program_id(1)
    source = qkv + token * qkv_stride
    if program < QUERY_PROGRAMS:
        heads = program * HEADS + tl.arange(0, HEADS)
        angles = cos_sin_cache + tl.load(positions + token).to(tl.int64) * ROTARY_DIM
        target = query + token * NUM_HEADS * HEAD_DIM
        _rotate_heads(source, target, heads, NUM_HEADS, HEAD_DIM, angles, query_norm, eps, HEAD_DIM, ROTARY_DIM)
        return
    slot = tl.load(slot_mapping + token).to(tl.int64)
    if slot < 0:
        return
    first_kv = (slot // BLOCK_SIZE) * (NUM_KV_HEADS * BLOCK_SIZE * HEAD_DIM) + (slot % BLOCK_SIZE) * HEAD_DIM
    if program < QUERY_PROGRAMS + KV_PROGRAMS:
        heads = (program - QUERY_PROGRAMS) * HEADS + tl.arange(0, HEADS)
        angles = cos_sin_cache + tl.load(positions + token).to(tl.int64) * ROTARY_DIM
        _rotate_heads(
            source + NUM_HEADS * HEAD_DIM, key_cache + first_kv, heads, NUM_KV_HEADS, BLOCK_SIZE * HEAD_DIM,
            angles, key_norm, eps, HEAD_DIM, ROTARY_DIM,
        )  # fmt: skip
    else:
        heads = (program - QUERY_PROGRAMS - KV_PROGRAMS) * HEADS + tl.arange(0, HEADS)
        _copy_heads(
            source + (NUM_HEADS + NUM_KV_HEADS) * HEAD_DIM, value_cache + first_kv, heads, NUM_KV_HEADS,
            BLOCK_SIZE * HEAD_DIM, HEAD_DIM,
        )  # fmt: skip


@triton.jit
def _rotate_heads(
    source, target, heads, num_heads, target_stride, angles, norm, eps,
    HEAD_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr,
):  # fmt: skip
    """Norm (if there is a weight) and rotate the heads of one token, each from its place to its place."""
    HALF: tl.constexpr = ROTARY_DIM // 2
    REST: tl.constexpr = HEAD_DIM - ROTARY_DIM
    columns = tl.arange(0, triton.next_power_of_2(HALF))
    is_column = columns < HALF
    mask = (heads < num_heads)[:, None] & is_column[None, :]
    sources = source + heads[:, None] * HEAD_DIM + columns[None, :]
    targets = target + heads[:, None] * target_stride + columns[None, :]
    first = tl.load(sources, mask, other=0.0)
    second = tl.load(sources + HALF, mask, other=0.0)
    cos = tl.load(angles + columns, is_column, other=0.0)[None, :]
    sin = tl.load(angles + HALF + columns, is_column, other=0.0)[None, :]
    if REST > 0:
        rest_columns = tl.arange(0, triton.next_power_of_2(REST))
        is_rest = rest_columns < REST
        rest_mask = (heads < num_heads)[:, None] & is_rest[None, :]
        rest_offset = ROTARY_DIM + rest_columns[None, :]
        rest = tl.load(source + heads[:, None] * HEAD_DIM + rest_offset, rest_mask, other=0.0)
    if norm is not None:
        squares = _sum_of_squares(first) + _sum_of_squares(second)
        if REST > 0:
            squares += _sum_of_squares(rest)
        scale = tl.rsqrt(squares / HEAD_DIM + eps)[:, None]
        first = _scaled(first, scale, tl.load(norm + columns, is_column, other=0.0))
        second = _scaled(second, scale, tl.load(norm + HALF + columns, is_column, other=0.0))
        if REST > 0:
            rest = _scaled(rest, scale, tl.load(norm + ROTARY_DIM + rest_columns, is_rest, other=0.0))
    x, y = first.to(tl.float32), second.to(tl.float32)
    tl.store(targets, (x * cos - y * sin).to(target.dtype.element_ty), mask)
    tl.store(targets + HALF, (y * cos + x * sin).to(target.dtype.element_ty), mask)
    if REST > 0:
        rest_targets = target + heads[:, None] * target_stride + rest_offset
        tl.store(rest_targets, rest.to(target.dtype.element_ty), rest_mask)


@triton.jit
def _sum_of_squares(x):
    wide = x.to(tl.float32)
    return tl.sum(wide * wide, axis=1)


@triton.jit
def _scaled(x, scale, weight):
    """The normed heads, rounded before and after the product with the weight."""
    normed = (x.to(tl.float32) * scale).to(x.dtype)
    return (normed.to(tl.float32) * weight[None, :].to(tl.float32)).to(x.dtype)


@triton.jit
def _copy_heads(source, target, heads, num_heads, target_stride, HEAD_DIM: tl.constexpr):
    columns = tl.arange(0, triton.next_power_of_2(HEAD_DIM))
    mask = (heads < num_heads)[:, None] & (columns < HEAD_DIM)[None, :]
    values = tl.load(source + heads[:, None] * HEAD_DIM + columns[None, :], mask, other=0.0)
    tl.store(target + heads[:, None] * target_stride + columns[None, :], values.to(target.dtype.element_ty), mask)
