"""What the sampling kernels know of a row of logits: keys, weights, and what is kept.

A row is cut into tiles, each a program's; a row's totals are summed again by every program that needs them, in tile
order, so no result depends on which program ran first.

- key: an int32 that sorts as the logits do. Its LOW_BITS lowest bits say nothing (bfloat16 has 16 bits).
- weight: a token's probability relative to the best token's, as an integer in units of 2**-40. Integer sums are exact,
  so sums over parts of a row always agree with each other.
- limits: the smallest kept key and how many of the tokens with that very key are kept, in id order.
"""

import triton
import triton.language as tl

WEIGHT_ONE = tl.constexpr(1 << 40)


@triton.jit
def load_logits(logits, columns, vocab_size):
    """Float32 logits; NaN counts as the largest value, so that it shows in the row's maximum."""
    x = tl.load(logits + columns, columns < vocab_size, other=float("-inf")).to(tl.float32)
    return tl.where(x != x, float("inf"), x)


@triton.jit
def sort_key(x):
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def value_of_key(key, LOW_BITS: tl.constexpr):
    """The logit of a key whose low bits are zero."""
    whole = tl.where(key < 0, key | ((1 << LOW_BITS) - 1), key)
    return (whole ^ ((whole >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def weight_of(x, maximum, scale, min_p, center, width):
    """Integer weights; nothing for a token that min-p or typical-p excludes."""
    relative = (x - maximum) * scale
    probability = tl.exp(relative)
    is_kept = (probability >= min_p) & ~(tl.abs(center - relative) > width)
    return tl.where(is_kept, probability * WEIGHT_ONE, 0.0).to(tl.int64)


@triton.jit
def row_maximum(tile_max, row, NUM_TILES: tl.constexpr, PADDED_TILES: tl.constexpr):
    tiles = tl.arange(0, PADDED_TILES)
    return tl.max(tl.load(tile_max + row * NUM_TILES + tiles, tiles < NUM_TILES, other=float("-inf")), axis=0)


@triton.jit
def row_total(tile_mass, row, NUM_TILES: tl.constexpr, PADDED_TILES: tl.constexpr):
    tiles = tl.arange(0, PADDED_TILES)
    return tl.sum(tl.load(tile_mass + row * NUM_TILES + tiles, tiles < NUM_TILES, other=0), axis=0)


@triton.jit
def is_random(temperature, maximum):
    return (temperature > 0.0) & (tl.abs(maximum) < float("inf"))


@triton.jit
def inverse_temperature(temperature):
    """1 / temperature, bounded so that the best token's 0 stays 0."""
    return tl.minimum(1.0 / temperature, 1e30)


@triton.jit
def least_probability(min_p, row):
    """Min-p's least probability relative to the best token's; the best token itself always stays."""
    return tl.minimum(tl.load(min_p + row), 1.0)


@triton.jit
def is_within(x, columns, vocab_size, least, quota, num_ties, LOW_BITS: tl.constexpr):
    """Which tokens of a piece of the row the limits keep, after `num_ties` ties before it; and its own ties."""
    key, last = sort_key(x) >> LOW_BITS, least >> LOW_BITS
    is_tie = ((key == last) & (columns < vocab_size)).to(tl.int32)
    rank = num_ties + tl.cumsum(is_tie, axis=0)
    return (key > last) | ((is_tie == 1) & (rank <= quota)), tl.sum(is_tie, axis=0)
