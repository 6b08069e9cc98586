"""Every operation in plain PyTorch: what the Triton kernels are tested against, and what a CPU runs.

Shapes: T tokens of the step, B sequences, H query heads, KVH key/value heads, D head size, V vocabulary.
"""

import numpy as np
import torch
import torch.nn.functional as F

from text_generation_kernels.philox import uniform_numbers

# A nucleus (top-p) is first looked for among this many best tokens; sorting a whole vocabulary is the exception.
NUM_NUCLEUS_CANDIDATES = 512


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


def uniform(seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """A float64 number in [0, 1) for each pair of seed and position, on the seeds' device."""
    numbers = uniform_numbers(seeds.cpu().numpy(), positions.cpu().numpy())
    return torch.from_numpy(numbers).to(seeds.device)


def finite_rows(logits: torch.Tensor) -> torch.Tensor:
    """Which rows can be sampled from: their largest value is a number. A masked (-inf) token is no fault."""  # [B]
    return logits.amax(dim=-1).isfinite()


def sample(
    logits: torch.Tensor,  # [B, V]
    temperatures: torch.Tensor,  # [B]; 0: the best token
    top_k: torch.Tensor,  # [B]; 0: off
    top_p: torch.Tensor,  # [B]; 1: off
    seeds: torch.Tensor,  # [B]
    positions: torch.Tensor,  # [B]
    min_p: torch.Tensor | None = None,  # [B]; 0: off, as for all rows without it
    typical_p: torch.Tensor | None = None,  # [B]; 1: off, as for all rows without it
) -> tuple[torch.Tensor, torch.Tensor]:
    """A token for each row, [B] int64, and its log-probability after all that filtered the row, [B] float32.

    The parameters may stay on the CPU: they decide what is computed, and reading them there waits for no GPU.
    A row without finite logits gets some token of the vocabulary; `finite_rows` tells which those are.
    """
    is_greedy = temperatures <= 0
    if bool(is_greedy.all()):
        return _choose_best(logits)
    tokens = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
    logprobs = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    if bool(is_greedy.any()):
        rows = is_greedy.nonzero().squeeze(1).to(logits.device)
        tokens[rows], logprobs[rows] = _choose_best(logits[rows])
    random = (~is_greedy).nonzero().squeeze(1)
    rows = random.to(logits.device)
    numbers = uniform(seeds[random], positions[random]).to(logits.device)
    tokens[rows], logprobs[rows] = _choose_at_random(
        logits[rows].float(),
        temperatures[random],
        top_k[random],
        top_p[random],
        numbers,
        None if min_p is None else min_p[random],
        None if typical_p is None else typical_p[random],
    )
    return tokens, logprobs


def _choose_best(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    logits = logits.float()
    tokens = logits.argmax(dim=-1)
    return tokens, logits.gather(1, tokens.unsqueeze(1)).squeeze(1) - logits.logsumexp(dim=-1)


def _choose_at_random(
    logits: torch.Tensor,  # [R, V] float32, changed
    temperatures: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    numbers: torch.Tensor,  # [R] float64 in [0, 1)
    min_p: torch.Tensor | None,
    typical_p: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inverse of the cumulative distribution in token-id order."""
    # Relative to the best token, so that no temperature, however small, overflows.
    logits.sub_(logits.amax(dim=-1, keepdim=True)).div_(temperatures.to(logits).unsqueeze(1))
    _keep_top_k(logits, top_k)
    probabilities = logits.softmax(dim=-1)
    _keep_top_p(probabilities, top_p)
    if min_p is not None:
        _keep_min_p(probabilities, min_p)
    if typical_p is not None:
        _keep_typical(probabilities, typical_p)
    cumulative = probabilities.cumsum(dim=-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    # Strictly below the total: the product may round up to it, and no token lies beyond.
    target = torch.minimum(numbers.unsqueeze(1) * total, total.nextafter(torch.zeros_like(total)))
    tokens = torch.searchsorted(cumulative, target, right=True).clamp_(max=logits.shape[1] - 1)
    chosen = probabilities.gather(1, tokens).double() / total
    return tokens.squeeze(1), chosen.log().squeeze(1).float()


def _keep_top_k(logits: torch.Tensor, top_k: torch.Tensor) -> None:
    """Set what is below the k-th best value to -inf; ties with it stay."""
    rows = ((top_k > 0) & (top_k < logits.shape[1])).nonzero().squeeze(1)
    if len(rows) == 0:
        return
    counts, rows = top_k[rows].long(), rows.to(logits.device)
    best = logits[rows].topk(int(counts.max()), dim=-1).values
    least = best.gather(1, (counts - 1).to(logits.device).unsqueeze(1))
    logits[rows] = logits[rows].masked_fill(logits[rows] < least, -torch.inf)


def _keep_top_p(probabilities: torch.Tensor, top_p: torch.Tensor) -> None:
    """Set to 0 what is outside the smallest set of tokens that reaches `top_p`; among equals low ids come first."""
    rows = (top_p < 1).nonzero().squeeze(1)
    if len(rows) == 0:
        return
    wanted, rows = top_p[rows].to(probabilities.device).double().unsqueeze(1), rows.to(probabilities.device)
    candidates = probabilities[rows]
    num_candidates = min(NUM_NUCLEUS_CANDIDATES, candidates.shape[1])
    best = candidates.topk(num_candidates, dim=-1).values
    if bool((best.sum(dim=-1, keepdim=True, dtype=torch.float64) < wanted).any()):
        best = candidates.sort(dim=-1, descending=True).values
    before = best.cumsum(dim=-1, dtype=torch.float64) - best
    num_kept = (before < wanted).sum(dim=-1, keepdim=True).clamp(min=1)
    least = best.gather(1, num_kept - 1)
    num_ties = num_kept - (best > least).sum(dim=-1, keepdim=True)
    is_tie = candidates == least
    is_kept = (candidates > least) | (is_tie & (is_tie.cumsum(dim=-1) <= num_ties))
    probabilities[rows] = candidates.masked_fill(~is_kept, 0)


def _keep_min_p(weights: torch.Tensor, min_p: torch.Tensor) -> None:
    """Set to 0 what is less than `min_p` times as likely as the best token, which always stays."""
    rows = (min_p > 0).nonzero().squeeze(1)
    if len(rows) == 0:
        return
    share, rows = min_p[rows].to(weights).clamp(max=1).unsqueeze(1), rows.to(weights.device)
    candidates = weights[rows]
    weights[rows] = candidates.masked_fill(candidates < share * candidates.amax(dim=-1, keepdim=True), 0)


def _keep_typical(weights: torch.Tensor, typical_p: torch.Tensor) -> None:
    """Keep the tokens whose surprise is nearest to the entropy until they hold `typical_p`; ties with the last stay."""
    rows = (typical_p < 1).nonzero().squeeze(1)
    if len(rows) == 0:
        return
    wanted, rows = typical_p[rows].to(weights.device).double().unsqueeze(1), rows.to(weights.device)
    probabilities = weights[rows].double()
    probabilities /= probabilities.sum(dim=-1, keepdim=True)
    surprise = -probabilities.log()
    entropy = (probabilities * surprise).nan_to_num_(0).sum(dim=-1, keepdim=True)
    # Dropped tokens are infinitely far. Float32: nearly equal distances are ties, as they are to the kernel.
    distance = (surprise - entropy).abs_().float()
    ordered, order = distance.sort(dim=-1, stable=True)
    held = probabilities.gather(1, order).cumsum(dim=-1)
    num_below = (held < wanted).sum(dim=-1, keepdim=True).clamp(max=weights.shape[1] - 1)
    farthest = ordered.gather(1, num_below)
    weights[rows] = weights[rows].masked_fill(distance > farthest, 0)


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
