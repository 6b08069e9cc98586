"""What the fused kernels compute, put together from the operations of reference.py."""

import torch
import torch.nn.functional as F

from text_generation_kernels.reference import rms_norm, rotary_embedding, silu_and_mul, uniform, write_kv
from text_generation_kernels.reference import sample as reference_sample


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
    residual: torch.Tensor | None,  # [M, N]
) -> torch.Tensor:
    """x times the transposed weight, plus the bias; then the residual, added to the rounded product."""
    product = F.linear(x, weight, bias)
    return product if residual is None else product + residual


def gated_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The MLP's first half: weight holds the gate's rows, then those of the values it scales."""  # [M, N / 2]
    return silu_and_mul(F.linear(x, weight))


def sample(
    logits: torch.Tensor,  # [B, V]
    temperatures: torch.Tensor,  # [B]; 0: the best token
    top_k: torch.Tensor,  # [B]; 0: off
    top_p: torch.Tensor,  # [B]; 1: off
    min_p: torch.Tensor,  # [B]; 0: off
    typical_p: torch.Tensor,  # [B]; 1: off
    seeds: torch.Tensor,  # [B]
    positions: torch.Tensor,  # [B]
) -> tuple[torch.Tensor, torch.Tensor]:
    """reference.sample, with min-p and typical-p (which sort the vocabulary) after its filters."""
    tokens, logprobs = reference_sample(logits, temperatures, top_k, top_p, seeds, positions)
    is_filtered = (temperatures > 0) & ((min_p > 0) | (typical_p < 1))
    for row in is_filtered.nonzero().squeeze(1).tolist():
        probabilities = _kept_probabilities(
            logits[row].double() / float(temperatures[row]), int(top_k[row]), float(top_p[row])
        )
        probabilities = _keep_min_p(probabilities, float(min_p[row]))
        probabilities = _keep_typical(probabilities, float(typical_p[row]))
        cumulative = probabilities.cumsum(0)
        number = uniform(seeds[row : row + 1], positions[row : row + 1]) * cumulative[-1]
        token = int(torch.searchsorted(cumulative, number.to(cumulative), right=True).clamp(max=len(cumulative) - 1))
        tokens[row] = token
        logprobs[row] = (probabilities[token] / cumulative[-1]).log().float()
    return tokens, logprobs


def _kept_probabilities(scores: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """Top-k, ties with the last staying, then top-p, where among equals low ids come first."""
    if 0 < top_k < len(scores):
        scores = scores.masked_fill(scores < scores.topk(top_k).values[-1], -torch.inf)
    probabilities = scores.softmax(0)
    if top_p < 1:
        ordered, ids = probabilities.sort(descending=True, stable=True)
        is_dropped = ordered.cumsum(0) - ordered >= top_p
        is_dropped[0] = False
        probabilities = probabilities.index_fill(0, ids[is_dropped], 0)
    return probabilities / probabilities.sum()


def _keep_min_p(probabilities: torch.Tensor, min_p: float) -> torch.Tensor:
    kept = probabilities.masked_fill(probabilities < min_p * probabilities.max(), 0)
    return kept / kept.sum()


def _keep_typical(probabilities: torch.Tensor, typical_p: float) -> torch.Tensor:
    """The tokens whose surprise is nearest to the entropy, until they hold `typical_p`; ties with the last stay."""
    if typical_p >= 1:
        return probabilities
    surprise = -probabilities.log()
    entropy = (probabilities * surprise).nan_to_num(0).sum()
    distance = (surprise - entropy).abs()
    ordered, ids = distance.sort(stable=True)
    num_below = int((probabilities[ids].cumsum(0) < typical_p).sum())
    return probabilities.masked_fill(distance > ordered[min(num_below, len(ids) - 1)], 0)
