"""The search for top-k's and top-p's limits, and typical-p's range.

A search adds up a measure, ones for top-k and weights for top-p, and finds the largest key such that the tokens from it
upwards measure at least the target, sixteen ways at a time.
"""

import triton
import triton.language as tl

from text_generation_kernels.sampling_row import (
    inverse_temperature,
    is_random,
    is_within,
    least_probability,
    load_logits,
    row_maximum,
    row_total,
    sort_key,
    value_of_key,
    weight_of,
)

LOWEST_KEY = tl.constexpr(-(1 << 31))
WAYS = tl.constexpr(16)
CHUNK = tl.constexpr(512)
ALL_TIES = tl.constexpr(1 << 31)


@triton.jit
def _share(fraction, total):
    """The smallest integer that is at least this fraction of the total, at least 1."""
    wanted = tl.ceil(fraction.to(tl.float64) * total.to(tl.float64)).to(tl.int64)
    return tl.minimum(tl.maximum(wanted, 1), total)


@triton.jit
def _descend(prefix, above, target, totals, shift):
    """One step of a search: the digit whose tokens and those above reach the target, and the measure above it."""
    ways = tl.arange(0, WAYS)
    digit = tl.max(tl.where(totals >= target, ways, 0), axis=0)
    next_total = tl.sum(tl.where(ways == digit + 1, totals, 0), axis=0)
    return prefix + (digit << shift), tl.where(digit == WAYS - 1, above, next_total)


@triton.jit
def searched(state, measures, row, shift, NUM_TILES: tl.constexpr, PADDED_TILES: tl.constexpr):
    """The prefix, the measure above it and the target, after the pass that measured at `shift`."""
    ways, tiles = tl.arange(0, WAYS), tl.arange(0, PADDED_TILES)
    places = (row * NUM_TILES + tiles)[:, None] * WAYS + ways[None, :]
    totals = tl.sum(tl.load(measures + places, (tiles < NUM_TILES)[:, None], other=0), axis=0)
    target = tl.load(state + row * 3 + 2)
    prefix, above = _descend(tl.load(state + row * 3).to(tl.int32), tl.load(state + row * 3 + 1), target, totals, shift)
    return prefix, above, target


@triton.jit(do_not_specialize=["shift"])
def search_kernel(
    logits, temperatures, top_k, top_p, tile_max, tile_mass, state, measures, next_state, next_measures,
    row_stride, vocab_size, shift, IS_FIRST: tl.constexpr, AFTER_TOP_K: tl.constexpr,
    NUM_TILES: tl.constexpr, PADDED_TILES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One pass of the search for top-k's smallest key, or top-p's: each tile's measures from sixteen keys upwards."""
    tile, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    temperature, k, p = tl.load(temperatures + row), tl.load(top_k + row), tl.load(top_p + row)
    maximum = row_maximum(tile_max, row, NUM_TILES, PADDED_TILES)
    has_top_k = (k > 0) & (k < vocab_size)
    is_wanted = (has_top_k & (p < 1.0)) if AFTER_TOP_K else (has_top_k | (p < 1.0))
    if not (is_wanted & is_random(temperature, maximum)):
        return
    is_count = has_top_k & (not AFTER_TOP_K)
    prefix = tl.full((), LOWEST_KEY, tl.int32)
    above = tl.full((), 0, tl.int64)
    if IS_FIRST:
        # Without top-p nobody wrote the masses; the share is then unused.
        share = _share(p, row_total(tile_mass, row, NUM_TILES, PADDED_TILES))
        target = tl.where(is_count, k.to(tl.int64), share)
    else:
        prefix, above, target = searched(state, measures, row, shift + 4, NUM_TILES, PADDED_TILES)
    if tile == 0:
        tl.store(next_state + row * 3, prefix.to(tl.int64))
        tl.store(next_state + row * 3 + 1, above)
        tl.store(next_state + row * 3 + 2, target)
    ways = tl.arange(0, WAYS)
    pivots = (prefix + (ways << shift))[:, None]
    scale = inverse_temperature(temperature)
    sums = tl.zeros((WAYS, CHUNK), tl.int64)
    for chunk in tl.static_range(0, TILE, CHUNK):
        columns = tile * TILE + chunk + tl.arange(0, CHUNK)[None, :]
        x = load_logits(logits + row * row_stride, columns, vocab_size)
        ones = tl.where(columns < vocab_size, 1, 0).to(tl.int64)
        measure = tl.where(is_count, ones, weight_of(x, maximum, scale, 0.0, 0.0, float("inf")))
        sums += tl.where(sort_key(x) >= pivots, measure, 0)
    tl.store(next_measures + (row * NUM_TILES + tile) * WAYS + ways, tl.sum(sums, axis=1))


@triton.jit
def settle_kernel(
    logits, temperatures, top_k, top_p, min_p, typical_p, tile_max, state, measures, limits, typical, row_stride,
    vocab_size, LOW_BITS: tl.constexpr, NUM_TILES: tl.constexpr, PADDED_TILES: tl.constexpr,
):  # fmt: skip
    """Random rows: the limits that top-k and top-p leave, then typical-p's range among what they and min-p keep."""
    row = tl.program_id(0).to(tl.int64)
    temperature, k, p = tl.load(temperatures + row), tl.load(top_k + row), tl.load(top_p + row)
    maximum = row_maximum(tile_max, row, NUM_TILES, PADDED_TILES)
    if not is_random(temperature, maximum):
        return
    scale = inverse_temperature(temperature)
    least = tl.full((), LOWEST_KEY, tl.int32)
    quota = tl.full((), ALL_TIES, tl.int64)
    if (p < 1.0) | ((k > 0) & (k < vocab_size)):
        least, above, target = searched(state, measures, row, LOW_BITS, NUM_TILES, PADDED_TILES)
        if p < 1.0:
            tie_weight = tl.maximum(weight_of(value_of_key(least, LOW_BITS), maximum, scale, 0.0, 0.0, float("inf")), 1)
            quota = _num_ties_for(target - above, tie_weight)
    tl.store(limits + row * 2, least.to(tl.int64))
    tl.store(limits + row * 2 + 1, quota)
    center = tl.full((), 0.0, tl.float32)
    width = tl.full((), float("inf"), tl.float32)
    fraction = tl.load(typical_p + row)
    if fraction < 1.0:
        center, width = _typical_range(
            logits + row * row_stride,
            vocab_size,
            maximum,
            scale,
            least,
            quota,
            least_probability(min_p, row),
            fraction,
            LOW_BITS,
        )
    tl.store(typical + row * 2, center)
    tl.store(typical + row * 2 + 1, width)


@triton.jit
def _num_ties_for(wanted, tie_weight):
    """How many ties reach the wanted weight. A float32 quotient up to 2**22 is at most one off; products decide."""
    estimate = (wanted.to(tl.float32) / tie_weight.to(tl.float32)).to(tl.int64) - 2
    near = estimate + tl.arange(0, 8)
    return estimate + tl.sum((near * tie_weight < wanted).to(tl.int64), axis=0)


@triton.jit
def _typical_range(row_logits, vocab_size, maximum, scale, least, quota, floor, fraction, LOW_BITS: tl.constexpr):
    """The mean log-probability of the kept tokens, which is minus their entropy, relative to the best token's; and how
    far from it tokens must be taken, the nearest first, to hold this fraction of the probability."""
    total = tl.full((), 0, tl.int64)
    moment = tl.full((), 0.0, tl.float64)
    num_ties = tl.full((), 0, tl.int32)
    for start in range(0, vocab_size, CHUNK * 4):
        columns = start + tl.arange(0, CHUNK * 4)
        x = load_logits(row_logits, columns, vocab_size)
        is_kept, ties = is_within(x, columns, vocab_size, least, quota, num_ties, LOW_BITS)
        weights = tl.where(is_kept, weight_of(x, maximum, scale, floor, 0.0, float("inf")), 0)
        relative = tl.where(weights > 0, (x - maximum) * scale, 0.0)
        total += tl.sum(weights, axis=0)
        moment += tl.sum(weights.to(tl.float64) * relative.to(tl.float64), axis=0)
        num_ties += ties
    center = moment.to(tl.float32) / total.to(tl.float32)
    # Tokens nearer than the width must hold the share: the farther ones less than what remains.
    target = total - _share(fraction, total) + 1
    prefix = tl.full((), 0, tl.int32)
    above = tl.full((), 0, tl.int64)
    ways = tl.arange(0, WAYS)
    for step in range(8):
        shift = 28 - 4 * step
        # Distances have no sign bit: the first digit has eight ways, the others stay empty.
        pivots = (prefix + (ways << shift))[:, None]
        is_way = ((ways < 8) | (step > 0))[:, None]
        sums = tl.zeros((WAYS,), tl.int64)
        num_ties = tl.full((), 0, tl.int32)
        for start in range(0, vocab_size, CHUNK):
            columns = start + tl.arange(0, CHUNK)
            x = load_logits(row_logits, columns, vocab_size)
            is_kept, ties = is_within(x, columns, vocab_size, least, quota, num_ties, LOW_BITS)
            weights = tl.where(is_kept, weight_of(x, maximum, scale, floor, 0.0, float("inf")), 0)
            distance = tl.abs(center - (x - maximum) * scale).to(tl.int32, bitcast=True)
            sums += tl.sum(tl.where((distance[None, :] >= pivots) & is_way, weights[None, :], 0), axis=1)
            num_ties += ties
        prefix, above = _descend(prefix, above, target, sums, shift)
    return center, prefix.to(tl.float32, bitcast=True)
