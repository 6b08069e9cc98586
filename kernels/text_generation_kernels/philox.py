"""Philox4x32-10 (Salmon et al., 2011): random numbers that depend on a key and a counter alone, in numpy."""

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]  # 32-bit words, held in 64 bits so that products keep their upper half

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEPS = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_NUM_ROUNDS = 10


def philox4x32(counter: Words, key: Words) -> Words:
    """Four random words for each column of `counter` and `key`."""  # [4, n], [2, n] -> [4, n]
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_NUM_ROUNDS):
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (second >> _SHIFT) ^ c1 ^ k0, second & _LOW, (first >> _SHIFT) ^ c3 ^ k1, first & _LOW
        k0, k1 = (k0 + _KEY_STEPS[0]) & _LOW, (k1 + _KEY_STEPS[1]) & _LOW
    return np.stack([c0, c1, c2, c3])


def uniform_numbers(seeds: npt.NDArray[np.int64], positions: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """One number in [0, 1) with 53 random bits for each pair of seed and position."""
    seed_words, position_words = seeds.astype(np.uint64), positions.astype(np.uint64)
    zeros = np.zeros_like(seed_words)
    counter = np.stack([position_words & _LOW, position_words >> _SHIFT, zeros, zeros])
    words = philox4x32(counter, np.stack([seed_words & _LOW, seed_words >> _SHIFT]))
    bits = (words[0] << np.uint64(21)) | (words[1] >> np.uint64(11))
    numbers: npt.NDArray[np.float64] = bits.astype(np.float64) * 2.0**-53
    return numbers
