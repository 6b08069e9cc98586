"""Attention on a CPU against float64, over caches in which other sequences left NaN."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from text_generation_kernels import cpu_attention as cpu_attention_module
from text_generation_kernels.cpu_attention import Keys, cpu_attention
from text_generation_kernels.cpu_attention_plan import CpuAttentionPlan
from text_generation_kernels.torch_script import scripted

BLOCK_SIZE, NUM_KV_HEADS, GROUP, HEAD_DIM = 4, 2, 3, 8
NUM_HEADS = NUM_KV_HEADS * GROUP
SCALE = 0.3
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 3e-2}  # absolute and relative


class Sequences:
    """Random qkv projections of sequences that grow over steps, each with blocks of its own in a shuffled cache."""

    def __init__(
        self,
        max_lengths: list[int],
        dtype: torch.dtype,
        rotary_dim: int = HEAD_DIM,
        attend: Callable[..., torch.Tensor] = cpu_attention,
    ) -> None:
        rng = np.random.default_rng(7)
        counts = [math.ceil(length / BLOCK_SIZE) for length in max_lengths]
        order = rng.permutation(sum(counts) + 3).tolist()
        self.tables = rng.integers(0, len(order), (len(counts), max(counts)), dtype=np.int32)
        for row, count in enumerate(counts):
            self.tables[row, :count] = [order.pop() for _ in range(count)]
        shape = (sum(counts) + 3, BLOCK_SIZE, 2 * NUM_KV_HEADS, HEAD_DIM)
        self.cache = torch.full(shape, torch.nan, dtype=dtype)
        generator = torch.Generator().manual_seed(3)
        width = (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM
        self.qkv = [torch.randn(length, width, generator=generator).to(dtype) for length in max_lengths]
        angles = torch.arange(max(max_lengths))[:, None] * torch.logspace(0, -2, rotary_dim // 2, dtype=torch.float64)
        self.angles = angles
        self.table = torch.cat((angles.cos(), angles.sin()), dim=1).float()
        self.norms = [torch.rand(HEAD_DIM, generator=generator).to(dtype) + 0.5 for _ in range(2)]
        self.lengths = [0] * len(max_lengths)
        self.attend = attend

    def step(self, num_tokens: dict[int, int], window: int | None = None, has_norms: bool = False) -> torch.Tensor:
        """Outputs of the next tokens of some rows, [T, H * D]."""
        rows = list(num_tokens)
        before = np.array([self.lengths[row] for row in rows])
        counts = np.array(list(num_tokens.values()))
        for row, count in num_tokens.items():
            self.lengths[row] += count
        positions = np.concatenate([np.arange(start, start + n) for start, n in zip(before, counts, strict=True)])
        owners = np.repeat(rows, counts)
        slots = self.tables[owners, positions // BLOCK_SIZE].astype(np.int64) * BLOCK_SIZE + positions % BLOCK_SIZE
        starts = np.array([0, *np.cumsum(counts)], np.int32)
        lengths = (before + counts).astype(np.int32)
        plan = CpuAttentionPlan(self.tables[rows], starts, lengths, positions, slots, self.cache)
        qkv = torch.cat([self.qkv[row][at : at + n] for row, at, n in zip(rows, before, counts, strict=True)])
        norms = self.norms if has_norms else [None, None]
        return self.attend(qkv, self.cache, plan.tokens(self.table), plan.sequences(window), SCALE, *norms, 1e-5)

    def expected(self, row: int, window: int | None, has_norms: bool) -> torch.Tensor:
        """All outputs of a row in float64, [length, H * D]."""
        length = self.lengths[row]
        heads = self.qkv[row][:length].double().view(length, -1, HEAD_DIM)
        query, key, value = heads.split([NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS], dim=1)
        if has_norms:
            query, key = (
                x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.double()
                for x, norm in zip((query, key), self.norms, strict=True)
            )
        query, key = self._turned(query), self._turned(key)
        key, value = (x.repeat_interleave(GROUP, dim=1) for x in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query, key) * SCALE
        at = torch.arange(length)
        hidden = at[None, :] > at[:, None]
        if window is not None:
            hidden |= at[None, :] <= at[:, None] - window
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        return torch.einsum("hqk,khd->qhd", weights, value).flatten(1)

    def _turned(self, x: torch.Tensor) -> torch.Tensor:
        half = self.angles.shape[1]
        first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        turn = torch.polar(torch.ones_like(self.angles), self.angles)[: len(x), None]
        turned = torch.complex(first, second) * turn
        return torch.cat((turned.real, turned.imag, rest), dim=-1)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("window", "rotary_dim", "has_norms"),
    [(None, HEAD_DIM, False), (3, HEAD_DIM, True), (9, 4, False), (1, HEAD_DIM, False)],
)
@pytest.mark.parametrize("form", [cpu_attention, scripted(cpu_attention)], ids=["python", "torchscript"])
def test_steps_of_every_kind(
    dtype: torch.dtype, window: int | None, rotary_dim: int, has_norms: bool, form: Callable[..., torch.Tensor]
) -> None:
    """Prompts in one piece and in chunks, decodes of like and unlike lengths, both in one step."""
    sequences = Sequences([30, 9, 300, 700], dtype, rotary_dim, form)
    steps = [{0: 7, 2: 257}, {1: 1, 2: 3}, {0: 1}, {3: 513, 0: 4, 2: 1}, {1: 4, 0: 1, 2: 1, 3: 2}]
    steps += [{0: 1, 1: 1, 2: 1, 3: 1}] * 3 + [{2: 1, 0: 1}, {3: 130}]
    outputs: list[list[torch.Tensor]] = [[] for _ in sequences.lengths]
    for step in steps:
        parts = sequences.step(step, window, has_norms).split(list(step.values()))
        for row, part in zip(step, parts, strict=True):
            outputs[row].append(part)
    for row, parts in enumerate(outputs):
        expected = sequences.expected(row, window, has_norms)
        torch.testing.assert_close(
            torch.cat(parts).double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype], msg=f"row {row}"
        )


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("window", [None, 150])
def test_sequences_that_begin_with_the_same_blocks(
    dtype: torch.dtype, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two common beginnings, beside others; decodes with rests of any length behind them, and a prompt that goes on."""
    monkeypatch.setattr("text_generation_kernels.cpu_attention_plan._MIN_KEYS_SAVED", 0)
    prefixes = noted_prefixes(monkeypatch)
    sequences = Sequences([150, 160, 480, 20, 400, 401, 139], dtype, attend=scripted(cpu_attention))
    sequences.step({0: 139, 4: 200, 3: 18})
    for source, length, others in ((0, 136, (1, 2, 6)), (4, 200, (5,))):
        for row in others:
            sequences.tables[row, : length // BLOCK_SIZE] = sequences.tables[source, : length // BLOCK_SIZE]
            sequences.qkv[row][:length] = sequences.qkv[source][:length]
            sequences.lengths[row] = length
    steps = [{0: 1, 1: 1, 6: 1}, {1: 20, 2: 300, 0: 1, 4: 1, 5: 1, 6: 1}] + [dict.fromkeys((2, 0, 4, 3, 1, 5), 1)] * 2
    for step in steps:
        parts = sequences.step(step, window).split(list(step.values()))
        for (row, count), part in zip(step.items(), parts, strict=True):
            expected = sequences.expected(row, window, has_norms=False)[-count:]
            tolerance = TOLERANCE[dtype]
            torch.testing.assert_close(
                part.double(), expected, atol=tolerance, rtol=tolerance, msg=f"{step}, row {row}"
            )
    assert any(prefixes) == (window is None)


def test_a_short_common_beginning_is_read_by_each(monkeypatch: pytest.MonkeyPatch) -> None:
    prefixes = noted_prefixes(monkeypatch)
    sequences = Sequences([150, 160], torch.float32)
    sequences.tables[1, : 136 // BLOCK_SIZE] = sequences.tables[0, : 136 // BLOCK_SIZE]
    sequences.step({0: 140, 1: 140})
    sequences.step({0: 1, 1: 1})
    assert prefixes
    assert not any(prefixes)


@pytest.mark.parametrize(
    ("groups", "num_gathered"),
    [
        ([(8, 608)] * 4, 4 * 608),
        ([(8, 608), (7, 600), (9, 612)] * 2, 6 * 612),
        ([(2, 1600), *[(2, 128)] * 14], 1600 + 14 * 128),
        ([(24, 128), *[(2, 128)] * 12], 128 + 24 * 128),
        ([(2, 900), *[(2, 128)] * 3], 2 * 900 + 6 * 128),
    ],
)
def test_common_beginnings_are_padded_for_no_more_than_they_save(
    groups: list[tuple[int, int]], num_gathered: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`groups`: how many sequences have how many keys in common; `num_gathered`: of these keys."""
    sequences = Sequences([length + 8 for count, length in groups for _ in range(count)], torch.float32)
    needed, row = 0, 0
    for count, length in groups:
        blocks = length // BLOCK_SIZE
        sequences.tables[row : row + count, :blocks] = sequences.tables[row, :blocks]
        sequences.lengths[row : row + count] = [length + 3] * count
        needed += count * length
        row += count
    gathered, attended = noted_work(monkeypatch)
    sequences.step(dict.fromkeys(range(row), 1))
    assert sum(gathered) <= num_gathered + row * BLOCK_SIZE
    assert sum(gathered) + sum(attended) <= 2 * (needed + row * BLOCK_SIZE)


def noted_work(monkeypatch: pytest.MonkeyPatch) -> tuple[list[int], list[int]]:
    """Keys that are gathered from now on, and keys that queries attend to."""
    gathered: list[int] = []
    attended: list[int] = []
    gather, attention = cpu_attention_module._gather, cpu_attention_module._attention_with_sums

    def note_gathered(cache: torch.Tensor, keys: Keys, batch: int) -> torch.Tensor:
        gathered.append(len(keys.blocks) * BLOCK_SIZE)
        return gather(cache, keys, batch)

    def note_attended(query: torch.Tensor, key_and_value: torch.Tensor, *others: Any) -> Any:
        attended.append(len(query) * query.shape[2] // GROUP * key_and_value.shape[2])
        return attention(query, key_and_value, *others)

    monkeypatch.setattr(cpu_attention_module, "_gather", note_gathered)
    monkeypatch.setattr(cpu_attention_module, "_attention_with_sums", note_attended)
    return gathered, attended


def noted_prefixes(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each group of decodes, from now on, reads a common beginning once."""
    prefixes = []
    decodes_together = CpuAttentionPlan._decodes_together

    def note(plan: CpuAttentionPlan, rows: Any, prefix_lengths: Any, *others: Any) -> Any:
        prefixes.append(prefix_lengths.any())
        return decodes_together(plan, rows, prefix_lengths, *others)

    monkeypatch.setattr(CpuAttentionPlan, "_decodes_together", note)
    return prefixes


def test_slots_of_others_stay_as_they_are() -> None:
    sequences = Sequences([9, 5], torch.float32)
    sequences.step({0: 9})
    before = sequences.cache.clone()
    sequences.step({1: 5})
    own = sequences.tables[1, :2].tolist()
    others = sorted({*range(len(before))} - {*own})
    torch.testing.assert_close(sequences.cache[others], before[others], atol=0, rtol=0, equal_nan=True)
    assert sequences.cache[own].isfinite().all()
