"""The watermark of Kirchenbauer et al. (arXiv 2301.10226): a bias for the tokens of a list that the last token picks.

The list is what detectors expect: the first share of torch.randperm of the vocabulary, drawn on the CPU with a seed of
15485863 times the last token. A CPU calls just that. On a GPU the last token is not known to the host, and a shuffle is
one long chain of swaps; but where each swap's value came from can be searched in the sorted list of all swaps, for all
of them at once.
"""

import torch
import triton
import triton.language as tl

from text_generation_kernels.dispatch import runs_kernel

HASH_KEY = 15485863
# Rows whose swaps are sorted at once: their keys take 64 bits each, thrice while they are sorted.
ROWS_AT_ONCE = 16
_STATE_SIZE = 624  # words of the Mersenne twister's state
_STEP_BITS = 22  # a swap's key: the place it swaps with, then its number
_BLOCK = 512


def add_to_green_tokens(
    logits: torch.Tensor,  # [S, V] float32, changed
    samples: torch.Tensor,  # [W] int64 which of the rows have a watermark
    previous: torch.Tensor,  # [W] int64 the last token of each of those
    share: float,
    delta: float,
) -> None:
    """Add `delta` to the logits of the listed tokens."""
    vocab_size = logits.shape[1]
    num_green = int(vocab_size * share)
    assert logits.dtype == torch.float32
    assert vocab_size <= 1 << _STEP_BITS
    if not num_green:
        return
    if not runs_kernel(logits):
        generator = torch.Generator()
        for sample, token in zip(samples.tolist(), previous.tolist(), strict=True):
            generator.manual_seed(HASH_KEY * token)
            logits[sample, torch.randperm(vocab_size, generator=generator)[:num_green]] += delta
        return
    for start in range(0, len(samples), ROWS_AT_ONCE):
        piece = slice(start, start + ROWS_AT_ONCE)
        _add(logits, samples[piece], previous[piece], num_green, delta)


def _add(logits: torch.Tensor, samples: torch.Tensor, previous: torch.Tensor, num_green: int, delta: float) -> None:
    num_rows, vocab_size = len(samples), logits.shape[1]
    state = torch.empty(num_rows, _STATE_SIZE, dtype=torch.int32, device=logits.device)
    keys = torch.empty(num_rows, num_green, dtype=torch.int64, device=logits.device)
    swaps_kernel[(num_rows,)](
        previous, state, keys, vocab_size, num_green, HASH_KEY=HASH_KEY, STATE_SIZE=_STATE_SIZE,
        STEP_BITS=_STEP_BITS, num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip
    ordered = keys.sort(dim=1).values
    green_kernel[(triton.cdiv(num_green, _BLOCK), num_rows)](
        logits, samples, keys, ordered, logits.stride(0), num_green, delta, num_green.bit_length(),
        STEP_BITS=_STEP_BITS, BLOCK=_BLOCK, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


@triton.jit
def swaps_kernel(
    previous, state, keys, vocab_size, num_green,
    HASH_KEY: tl.constexpr, STATE_SIZE: tl.constexpr, STEP_BITS: tl.constexpr,
):  # fmt: skip
    """Which place each of a row's swaps swaps with: the Mersenne twister's numbers, as torch.randperm takes them."""
    row = tl.program_id(0).to(tl.int64)
    state += row * STATE_SIZE
    word = ((tl.load(previous + row) * HASH_KEY) & 0xFFFFFFFF).to(tl.uint32)
    tl.store(state, word.to(tl.int32, bitcast=True))
    for index in range(1, STATE_SIZE):
        word = ((word ^ (word >> 30)) * 1812433253 + index).to(tl.uint32)
        tl.store(state + index, word.to(tl.int32, bitcast=True))
    lanes = tl.arange(0, 256)
    for start in range(0, num_green, STATE_SIZE):
        # 227 words of a new state depend on old words alone, the next 227 on those too, and so do the rest.
        for first in tl.static_range(0, STATE_SIZE, 227):
            places = first + lanes
            mask = (lanes < 227) & (places < STATE_SIZE)
            tl.debug_barrier()
            own = _load_word(state + places, mask)
            after = _load_word(state + (places + 1) % STATE_SIZE, mask)
            far = _load_word(state + (places + 397) % STATE_SIZE, mask)
            tl.debug_barrier()
            mixed = (own & 0x80000000) | (after & 0x7FFFFFFF)
            new = far ^ (mixed >> 1) ^ tl.where((mixed & 1) != 0, 0x9908B0DF, 0).to(tl.uint32)
            tl.store(state + places, new.to(tl.int32, bitcast=True), mask)
            number = start + places
            mask = mask & (number < num_green)
            partner = number + (_temper(new) % tl.maximum(vocab_size - number, 1).to(tl.uint32)).to(tl.int32)
            key = (partner.to(tl.int64) << STEP_BITS) | number.to(tl.int64)
            tl.store(keys + row * num_green + number, key, mask)


@triton.jit
def _load_word(pointer, mask):
    return tl.load(pointer, mask, other=0).to(tl.uint32, bitcast=True)


@triton.jit
def _temper(word):
    word ^= word >> 11
    word ^= (word << 7) & 0x9D2C5680
    word ^= (word << 15) & 0xEFC60000
    return word ^ (word >> 18)


@triton.jit(do_not_specialize=["num_halvings"])
def green_kernel(
    logits, samples, keys, ordered, row_stride, num_green, delta, num_halvings,
    STEP_BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The tokens that a block of swaps brings to the front. A place holds its own number until a swap touches it; the
    last one before brought what then lay at that swap's own place, and so on back."""
    row = tl.program_id(1).to(tl.int64)
    numbers = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_swap = numbers < num_green
    # What is asked of each swap: the largest key below this one, if it is of the same place.
    asked = tl.load(keys + row * num_green + numbers, is_swap, other=0)
    is_open = is_swap
    while tl.max(is_open.to(tl.int32), axis=0) > 0:
        low = tl.zeros((BLOCK,), tl.int32)
        high = tl.zeros((BLOCK,), tl.int32) + num_green
        for _ in range(num_halvings):
            middle = (low + high) >> 1
            is_wide = low < high
            is_less = tl.load(ordered + row * num_green + middle, is_wide & is_open, other=0) < asked
            low = tl.where(is_wide & is_less, middle + 1, low)
            high = tl.where(is_wide & ~is_less, middle, high)
        found = tl.load(ordered + row * num_green + low - 1, is_open & (low > 0), other=-1)
        is_open = is_open & (found >= 0) & ((found >> STEP_BITS) == (asked >> STEP_BITS))
        number = found & ((1 << STEP_BITS) - 1)
        asked = tl.where(is_open, (number << STEP_BITS) | number, asked)
    places = logits + tl.load(samples + row) * row_stride + (asked >> STEP_BITS)
    tl.store(places, tl.load(places, is_swap, other=0.0) + delta, is_swap)
