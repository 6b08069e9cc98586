"""The passes over whole rows before and after the search: statistics, masses, and the choice of a token."""

import triton
import triton.language as tl

from text_generation_kernels.sampling_row import (
    WEIGHT_ONE,
    inverse_temperature,
    is_random,
    is_within,
    least_probability,
    load_logits,
    row_maximum,
    sort_key,
    value_of_key,
    weight_of,
)
from text_generation_kernels.sampling_search import searched


@triton.jit
def statistics_kernel(
    logits, tile_max, tile_best, tile_sum, row_stride, vocab_size, NUM_TILES: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Every row: each tile's maximum, where it is, and the sum of exponentials relative to it."""
    tile, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    x = load_logits(logits + row * row_stride, tile * TILE + tl.arange(0, TILE), vocab_size)
    largest, lane = tl.max(x, axis=0, return_indices=True)
    origin = tl.where(largest == float("-inf"), 0.0, largest)
    place = row * NUM_TILES + tile
    tl.store(tile_max + place, largest)
    tl.store(tile_best + place, tile * TILE + lane)
    tl.store(tile_sum + place, tl.sum(tl.exp(x - origin), axis=0))


@triton.jit
def mass_kernel(
    logits, temperatures, top_k, top_p, tile_max, tile_mass, state, measures, row_stride, vocab_size,
    AFTER_TOP_K: tl.constexpr, LOW_BITS: tl.constexpr,
    NUM_TILES: tl.constexpr, PADDED_TILES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Random rows: each tile's weight, of all its tokens or of those that top-k left where top-p comes after it."""
    tile, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    temperature, k = tl.load(temperatures + row), tl.load(top_k + row)
    maximum = row_maximum(tile_max, row, NUM_TILES, PADDED_TILES)
    is_wanted = is_random(temperature, maximum) & (tl.load(top_p + row) < 1.0)
    if AFTER_TOP_K:
        is_wanted = is_wanted & (k > 0) & (k < vocab_size)
    if not is_wanted:
        return
    columns = tile * TILE + tl.arange(0, TILE)
    x = load_logits(logits + row * row_stride, columns, vocab_size)
    weights = weight_of(x, maximum, inverse_temperature(temperature), 0.0, 0.0, float("inf"))
    if AFTER_TOP_K:
        least, _, _ = searched(state, measures, row, LOW_BITS, NUM_TILES, PADDED_TILES)
        weights = tl.where(sort_key(x) >= least, weights, 0)
    tl.store(tile_mass + row * NUM_TILES + tile, tl.sum(weights, axis=0))


@triton.jit
def kept_mass_kernel(
    logits, temperatures, min_p, tile_max, limits, typical, tile_mass, tile_ties, row_stride, vocab_size,
    LOW_BITS: tl.constexpr, NUM_TILES: tl.constexpr, PADDED_TILES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Random rows: each tile's weight above the smallest kept key, and its number of ties with that key."""
    tile, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    temperature = tl.load(temperatures + row)
    maximum = row_maximum(tile_max, row, NUM_TILES, PADDED_TILES)
    if not is_random(temperature, maximum):
        return
    columns = tile * TILE + tl.arange(0, TILE)
    x = load_logits(logits + row * row_stride, columns, vocab_size)
    key, last = sort_key(x) >> LOW_BITS, tl.load(limits + row * 2).to(tl.int32) >> LOW_BITS
    center, width = tl.load(typical + row * 2), tl.load(typical + row * 2 + 1)
    weights = weight_of(x, maximum, inverse_temperature(temperature), least_probability(min_p, row), center, width)
    place = row * NUM_TILES + tile
    tl.store(tile_mass + place, tl.sum(tl.where(key > last, weights, 0), axis=0))
    tl.store(tile_ties + place, tl.sum(((key == last) & (columns < vocab_size)).to(tl.int32), axis=0))


@triton.jit
def choice_kernel(
    logits, temperatures, min_p, seeds, positions, tile_max, tile_best, tile_sum, limits, typical, tile_mass,
    tile_ties, tokens, logprobs, is_finite, row_stride, vocab_size, HAS_RANDOM: tl.constexpr,
    LOW_BITS: tl.constexpr, NUM_TILES: tl.constexpr, PADDED_TILES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The best token of greedy rows; for random rows the inverse of the cumulative weights, in token-id order."""
    row = tl.program_id(0).to(tl.int64)
    tiles = tl.arange(0, PADDED_TILES)
    is_tile = tiles < NUM_TILES
    places = row * NUM_TILES + tiles
    largest = tl.load(tile_max + places, is_tile, other=float("-inf"))
    maximum = tl.max(largest, axis=0)
    finite = tl.abs(maximum) < float("inf")
    tl.store(is_finite + row, finite)
    is_greedy = True
    if HAS_RANDOM:
        is_greedy = not is_random(tl.load(temperatures + row), maximum)
    if is_greedy:
        # The first tile with the maximum: the lowest id among equals.
        tile = tl.min(tl.where((largest == maximum) & is_tile, tiles, NUM_TILES - 1), axis=0)
        origin = tl.where(finite, maximum, 0.0)
        sums = tl.load(tile_sum + places, is_tile, other=0.0)
        total = tl.sum(tl.where(largest == float("-inf"), 0.0, sums * tl.exp(largest - origin)), axis=0)
        tl.store(tokens + row, tl.load(tile_best + row * NUM_TILES + tile).to(tl.int64))
        tl.store(logprobs + row, -tl.log(total))
        return
    if HAS_RANDOM:
        scale = inverse_temperature(tl.load(temperatures + row))
        floor, center, width = least_probability(min_p, row), tl.load(typical + row * 2), tl.load(typical + row * 2 + 1)
        least, quota = tl.load(limits + row * 2).to(tl.int32), tl.load(limits + row * 2 + 1)
        tie_weight = weight_of(value_of_key(least, LOW_BITS), maximum, scale, floor, center, width)
        mass, ties = _kept_mass(tile_mass, tile_ties, row, quota, tie_weight, NUM_TILES, PADDED_TILES)
        cumulative = tl.cumsum(mass, axis=0)
        total = tl.sum(mass, axis=0)
        wanted = _below(total, tl.load(seeds + row), tl.load(positions + row))
        tile = tl.sum((cumulative <= wanted).to(tl.int32), axis=0)
        before = tl.sum(tl.where(tiles < tile, mass, 0), axis=0)
        num_ties = tl.sum(tl.where(tiles < tile, ties, 0), axis=0)
        columns = tile * TILE + tl.arange(0, TILE)
        x = load_logits(logits + row * row_stride, columns, vocab_size)
        is_kept, _ = is_within(x, columns, vocab_size, least, quota, num_ties, LOW_BITS)
        weights = tl.where(is_kept, weight_of(x, maximum, scale, floor, center, width), 0)
        lane = tl.sum((before + tl.cumsum(weights, axis=0) <= wanted).to(tl.int32), axis=0)
        chosen = tl.sum(tl.where(columns == tile * TILE + lane, (x - maximum) * scale, 0.0), axis=0)
        tl.store(tokens + row, (tile * TILE + lane).to(tl.int64))
        tl.store(logprobs + row, chosen - tl.log(total.to(tl.float64) / WEIGHT_ONE).to(tl.float32))


@triton.jit
def distribution_kernel(
    logits, temperatures, min_p, tile_max, tile_sum, limits, typical, tile_mass, tile_ties, result, row_stride,
    vocab_size, LOW_BITS: tl.constexpr, NUM_TILES: tl.constexpr, PADDED_TILES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Every row: each token's log-probability as choice_kernel would report it, -inf for what it never chooses."""
    tile, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    temperature = tl.load(temperatures + row)
    maximum = row_maximum(tile_max, row, NUM_TILES, PADDED_TILES)
    columns = tile * TILE + tl.arange(0, TILE)
    x = load_logits(logits + row * row_stride, columns, vocab_size)
    out = result + row * vocab_size + columns
    tiles = tl.arange(0, PADDED_TILES)
    if is_random(temperature, maximum):
        scale = inverse_temperature(temperature)
        floor, center, width = least_probability(min_p, row), tl.load(typical + row * 2), tl.load(typical + row * 2 + 1)
        least, quota = tl.load(limits + row * 2).to(tl.int32), tl.load(limits + row * 2 + 1)
        tie_weight = weight_of(value_of_key(least, LOW_BITS), maximum, scale, floor, center, width)
        mass, ties = _kept_mass(tile_mass, tile_ties, row, quota, tie_weight, NUM_TILES, PADDED_TILES)
        num_ties = tl.sum(tl.where(tiles < tile, ties, 0), axis=0)
        is_kept, _ = is_within(x, columns, vocab_size, least, quota, num_ties, LOW_BITS)
        relative = (x - maximum) * scale
        is_kept = is_kept & (tl.exp(relative) >= floor) & ~(tl.abs(center - relative) > width)
        total = tl.log(tl.sum(mass, axis=0).to(tl.float64) / WEIGHT_ONE).to(tl.float32)
        tl.store(out, tl.where(is_kept, relative - total, float("-inf")), columns < vocab_size)
    else:
        places = row * NUM_TILES + tiles
        largest = tl.load(tile_max + places, tiles < NUM_TILES, other=float("-inf"))
        sums = tl.load(tile_sum + places, tiles < NUM_TILES, other=0.0)
        total = tl.sum(tl.where(largest == float("-inf"), 0.0, sums * tl.exp(largest - maximum)), axis=0)
        tl.store(out, x - maximum - tl.log(total), columns < vocab_size)


@triton.jit
def _kept_mass(tile_mass, tile_ties, row, quota, tie_weight, NUM_TILES: tl.constexpr, PADDED_TILES: tl.constexpr):
    """Each tile's weight, with its kept ties of the smallest kept key; and its number of ties, kept or not."""
    tiles = tl.arange(0, PADDED_TILES)
    places = row * NUM_TILES + tiles
    ties = tl.load(tile_ties + places, tiles < NUM_TILES, other=0).to(tl.int64)
    ties_before = tl.cumsum(ties, axis=0) - ties
    kept_ties = tl.minimum(tl.maximum(quota - ties_before, 0), ties)
    return tl.load(tile_mass + places, tiles < NUM_TILES, other=0) + kept_ties * tie_weight, ties


@triton.jit
def _below(total, seed, position):
    """A random integer in [0, total): 53 bits of Philox4x32-10, keyed by the seed, at the position."""
    low = (position & 0xFFFFFFFF).to(tl.uint32)
    high = ((position >> 32) & 0xFFFFFFFF).to(tl.uint32)
    zero = tl.full((), 0, tl.uint32)
    first, second, _, _ = tl.philox(seed, low, high, zero, zero)
    bits = (first.to(tl.uint64) << 32) | ((second.to(tl.uint64) >> 11) << 11)
    return tl.umulhi(bits, total.to(tl.uint64)).to(tl.int64)
