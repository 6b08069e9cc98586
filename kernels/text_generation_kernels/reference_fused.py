"""What the fused kernels compute, put together from the operations of reference.py."""

import torch
import torch.nn.functional as F

from text_generation_kernels.reference import rms_norm, rotary_embedding, silu_and_mul, write_kv


def rotary_kv_write(
    qkv: torch.Tensor,  # [T, (H + 2 * KVH) * D]
    positions: torch.Tensor,  # [T]
    cos_sin_cache: torch.Tensor,  # [max_positions, rotary_dim] float32
    key_cache: torch.Tensor,  # [num_blocks, KVH, block_size, D]
    value_cache: torch.Tensor,  # [num_blocks, KVH, block_size, D]
    slot_mapping: torch.Tensor,  # [T]
    query_norm: torch.Tensor | None,  # [D]
    key_norm: torch.Tensor | None,  # [D]
    eps: float,
) -> torch.Tensor:
    """Rotated queries, [T, H, D]; rotated keys and the values go to the caches. Heads are normed first if asked."""
    _, num_kv_heads, _, head_dim = key_cache.shape
    rotary_dim = cos_sin_cache.shape[1]
    heads = qkv.view(qkv.shape[0], -1, head_dim)
    num_heads = heads.shape[1] - 2 * num_kv_heads
    query, key, value = heads.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    if query_norm is not None and key_norm is not None:
        query, key = rms_norm(query, query_norm, eps), rms_norm(key, key_norm, eps)
    rotated = rotary_embedding(query[..., :rotary_dim], key[..., :rotary_dim], positions, cos_sin_cache)
    if rotary_dim < head_dim:
        rotated = (
            torch.cat((rotated[0], query[..., rotary_dim:]), dim=-1),
            torch.cat((rotated[1], key[..., rotary_dim:]), dim=-1),
        )
    query, key = rotated
    write_kv(key, value, key_cache, value_cache, slot_mapping)
    return query


def gelu_and_mul(x: torch.Tensor, approximate: str) -> torch.Tensor:
    """gelu ("none": exact, or "tanh") of the first half of the last dimension, times the second half."""
    gate, up = x.chunk(2, dim=-1)
    return F.gelu(gate, approximate=approximate) * up


def linear(
    x: torch.Tensor,  # [M, K]
    weight: torch.Tensor,  # [N, K]
    bias: torch.Tensor | None,  # [N]
    factor: torch.Tensor | None = None,  # [M, 1]
) -> torch.Tensor:
    """x times the transposed weight, each row times its factor, plus the bias."""
    if factor is None:
        return F.linear(x, weight, bias)
    product = (F.linear(x, weight) * factor).to(x.dtype)
    return product if bias is None else product + bias


def gated_linear(x: torch.Tensor, weight: torch.Tensor, factor: torch.Tensor | None = None) -> torch.Tensor:
    """The MLP's first half: weight holds the gate's rows, then those of the values it scales."""  # [M, N / 2]
    return silu_and_mul(linear(x, weight, None, factor))


def linear_add_norm(
    x: torch.Tensor,  # [M, K]
    weight: torch.Tensor,  # [N, K]
    bias: torch.Tensor | None,  # [N]
    residual: torch.Tensor,  # [M, N]
    norm_weight: torch.Tensor,  # [N]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The sum of product and residual: times the norm's weight, its rows' sums of squares [M, 1], and itself."""
    total = F.linear(x, weight, bias) + residual
    return total * norm_weight, total.float().square().sum(1, keepdim=True), total
