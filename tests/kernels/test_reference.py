"""The forward pass's reference operations against naive float64 arithmetic, at odd shapes."""

import math

import numpy as np
import pytest
import torch
from text_generation_kernels import reference
from text_generation_kernels.rms_norm import add_rms_norm, rms_norm

TOLERANCES = {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
DTYPES = list(TOLERANCES)


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def check(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert actual.dtype == dtype
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(actual.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 7), (5, 96), (3, 4, 33)])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, residual = random(*shape, dtype=dtype), random(*shape, dtype=dtype, seed=1)
    weight = random(shape[-1], dtype=dtype, seed=2)

    def expected(values: torch.Tensor) -> torch.Tensor:
        wide = values.double()
        return wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()

    check(reference.rms_norm(x, weight, 1e-5), expected(x), dtype)
    normed, total = reference.add_rms_norm(x, residual, weight, 1e-5)
    check(total, x.double() + residual.double(), dtype)
    check(normed, expected(total), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_of_a_cpu(dtype: torch.dtype) -> None:
    """The residual stays in float32, so that what later layers add to it is not lost to rounding."""
    x, residual, weight = random(5, 40, dtype=dtype), 100 * random(5, 40, dtype=torch.float32, seed=1), torch.ones(40)
    weight = weight.to(dtype)
    normed, total = add_rms_norm(x, residual, weight, 1e-5)
    exact = x.double() + residual.double()
    check(total, exact, torch.float32)
    assert normed.dtype == dtype
    check(normed, exact / (exact.square().mean(-1, keepdim=True) + 1e-5).sqrt(), dtype)
    check(rms_norm(x, weight, 1e-5), x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt(), dtype)


def test_rms_norm_of_half_precision_does_not_overflow() -> None:
    x = torch.full((1, 8), 60_000.0, dtype=torch.float16)
    assert reference.rms_norm(x, torch.ones(8, dtype=torch.float16), 1e-5).tolist() == [[1.0] * 8]


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_and_mul(dtype: torch.dtype) -> None:
    x = random(5, 26, dtype=dtype)
    gate, up = x.double()[:, :13], x.double()[:, 13:]
    check(reference.silu_and_mul(x), gate / (1 + (-gate).exp()) * up, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotary_embedding_is_a_rotation_of_complex_numbers(dtype: torch.dtype) -> None:
    query, key = random(4, 3, 10, dtype=dtype), random(4, 1, 10, dtype=dtype, seed=1)
    positions = torch.tensor([3, 0, 7, 7])
    frequencies = torch.tensor([1.0, 0.5, 0.1, 0.03, 0.002], dtype=torch.float64)
    angles = torch.arange(8, dtype=torch.float64)[:, None] * frequencies
    cache = torch.cat((angles.cos(), angles.sin()), dim=1).float()

    def expected(x: torch.Tensor) -> torch.Tensor:
        numbers = torch.complex(x.double()[..., :5], x.double()[..., 5:])
        rotated = numbers * torch.polar(torch.ones_like(angles), angles)[positions][:, None]
        return torch.cat((rotated.real, rotated.imag), dim=-1)

    actual_query, actual_key = reference.rotary_embedding(query, key, positions, cache)
    check(actual_query, expected(query), dtype)
    check(actual_key, expected(key), dtype)


def test_write_kv_touches_its_slots_alone() -> None:
    key, value = random(4, 2, 5, dtype=torch.float32), random(4, 2, 5, dtype=torch.float32, seed=1)
    key_cache, value_cache = torch.full((3, 2, 4, 5), 9.0), torch.full((3, 2, 4, 5), 8.0)
    reference.write_kv(key, value, key_cache, value_cache, torch.tensor([11, -1, 0, 6]))
    for written, cache, before in ((key, key_cache, 9.0), (value, value_cache, 8.0)):
        expected = torch.full((3, 2, 4, 5), before)
        expected[2, :, 3], expected[0, :, 0], expected[1, :, 2] = written[0], written[2], written[3]
        assert torch.equal(cache, expected)


class PagedCase:
    """Sequences with (query length, sequence length) each, their keys scattered over blocks in shuffled order."""

    def __init__(self, lengths: list[tuple[int, int]], dtype: torch.dtype, group: int = 3, head_dim: int = 10) -> None:
        self.lengths, self.block_size, self.num_kv_heads = lengths, 4, 2
        num_blocks = [math.ceil(length / self.block_size) for _, length in lengths]
        order = np.random.default_rng(0).permutation(sum(num_blocks) + 2).tolist()
        self.tables = torch.zeros(len(lengths), max(num_blocks) + 1, dtype=torch.int32)
        # What no token was written to may hold anything.
        shape = (len(order), self.num_kv_heads, self.block_size, head_dim)
        self.key_cache, self.value_cache = (torch.full(shape, torch.nan, dtype=dtype) for _ in range(2))
        self.keys, self.values = [], []
        for row, (_, length) in enumerate(lengths):
            blocks = [order.pop() for _ in range(num_blocks[row])]
            self.tables[row, : len(blocks)] = torch.tensor(blocks)
            keys = random(length, self.num_kv_heads, head_dim, dtype=dtype, seed=2 * row)
            values = random(length, self.num_kv_heads, head_dim, dtype=dtype, seed=2 * row + 1)
            for position in range(length):
                block, offset = blocks[position // self.block_size], position % self.block_size
                self.key_cache[block, :, offset] = keys[position]
                self.value_cache[block, :, offset] = values[position]
            self.keys.append(keys.double())
            self.values.append(values.double())
        query_lengths = [query_length for query_length, _ in lengths]
        self.starts = torch.tensor([0, *np.cumsum(query_lengths).tolist()], dtype=torch.int32)
        self.query = random(sum(query_lengths), self.num_kv_heads * group, head_dim, dtype=dtype, seed=99)
        self.group = group

    def run(self, scale: float, window: int | None) -> torch.Tensor:
        return reference.paged_attention(
            self.query,
            self.key_cache,
            self.value_cache,
            self.tables,
            self.starts,
            torch.tensor([length for _, length in self.lengths], dtype=torch.int32),
            scale,
            window,
        )

    def expected(self, scale: float, window: int | None) -> torch.Tensor:
        output = torch.empty(self.query.shape, dtype=torch.float64)
        token = 0
        for row, (query_length, length) in enumerate(self.lengths):
            for position in range(length - query_length, length):
                first = 0 if window is None else max(0, position - window + 1)
                for head in range(self.query.shape[1]):
                    keys = self.keys[row][first : position + 1, head // self.group]
                    values = self.values[row][first : position + 1, head // self.group]
                    weights = (keys @ self.query[token, head].double() * scale).softmax(0)
                    output[token, head] = weights @ values
                token += 1
        return output


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize(
    "lengths",
    [
        [(1, 1)],
        [(1, 9), (1, 1), (1, 16), (1, 5)],
        [(7, 7)],
        [(3, 11)],
        [(1, 6), (5, 5), (1, 13), (4, 10), (2, 2)],
    ],
    ids=["first", "decode", "prefill", "chunk", "mixed"],
)
def test_paged_attention(lengths: list[tuple[int, int]], window: int | None, dtype: torch.dtype) -> None:
    case = PagedCase(lengths, dtype)
    check(case.run(0.3, window), case.expected(0.3, window), dtype)


@pytest.mark.parametrize("group", [1, 4])
def test_paged_attention_with_other_head_groups(group: int) -> None:
    case = PagedCase([(1, 6), (3, 8)], torch.float32, group=group, head_dim=64)
    check(case.run(0.125, None), case.expected(0.125, None), torch.float32)
