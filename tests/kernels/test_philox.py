"""Philox4x32-10 against the test vectors published with Random123."""

import numpy as np
import pytest
from text_generation_kernels.philox import philox4x32, uniform_numbers

ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([ONES] * 4, [ONES] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_published_vectors(counter: list[int], key: list[int], expected: list[int]) -> None:
    columns = [np.array(words, np.uint64)[:, None].repeat(3, axis=1) for words in (counter, key)]
    assert philox4x32(*columns).T.tolist() == [expected] * 3


def test_number_is_the_first_53_bits_of_the_block_at_that_position() -> None:
    seed, position = -2, 2**33 + 7
    key = np.array([[0xFFFFFFFE], [ONES]], np.uint64)
    counter = np.array([[7], [2], [0], [0]], np.uint64)
    first, second = (int(word) for word in philox4x32(counter, key)[:2, 0])
    expected = ((first << 32 | second) >> 11) / 2**53
    assert uniform_numbers(np.array([seed]), np.array([position])).tolist() == [expected]


def test_numbers_are_uniform_over_seeds_and_over_positions() -> None:
    many = np.arange(100_000)
    for seeds, positions in ((many, np.full_like(many, 5)), (np.full_like(many, 5), many)):
        numbers = uniform_numbers(seeds, positions)
        assert numbers.min() >= 0
        assert numbers.max() < 1
        counts = np.histogram(numbers, bins=50, range=(0, 1))[0]
        # Chi-squared with 49 degrees of freedom exceeds 100 with a probability of 2e-5; the numbers are fixed.
        assert ((counts - 2000.0) ** 2 / 2000.0).sum() < 100
