"""Hopper's own kernel of prompts, against the reference, which is exact to float32. Only such a GPU runs it."""

import itertools
import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from text_generation_kernels import reference
from text_generation_kernels.attention_layout import AttentionLayout, Tile
from text_generation_kernels.attention_settings import AttentionShape, attention_layout, wide_operation
from text_generation_kernels.attention_work import plan_attention
from text_generation_kernels.paged_attention import AttentionWorkspace, paged_attention
from text_generation_kernels.shared_prefix import SharedPrefix

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
    ),
]

TOLERANCES = {torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
STEPS = [(1, 33), (70, 70), (0, 9), (17, 400), (200, 333), (1, 1), (33, 40), (129, 129), (1, 300)]


def tile(keys: int, stages: int, workers: int, min_key_tiles: int = 1) -> Tile:
    return Tile(128, keys, workers, min_key_tiles, num_warps=4, num_stages=stages, is_hopper=True)


TILES = [tile(keys, stages, 3) for keys, stages in ((64, 3), (64, 4), (64, 5))]


@dataclass(frozen=True)
class Case:
    """One step: its sequences, the shape of its heads and the kernel's tile."""

    steps: list[tuple[int, int]]  # query length, sequence length
    wide: Tile = TILES[0]
    num_kv_heads: int = 2
    group_size: int = 4
    head_dim: int = 128
    block_size: int = 16
    dtype: torch.dtype = torch.bfloat16
    sliding_window: int | None = None
    soft_cap: float | None = None
    shared_length: int = 0  # keys that all sequences share


def assert_exact(case: Case) -> None:
    """In a cache full of NaN but for the sequences' own keys, by a table of wild numbers but for their own blocks."""
    device = torch.device("cuda")
    query_lengths, lengths = np.array(case.steps, np.int32).T
    starts = np.concatenate(([0], np.cumsum(query_lengths))).astype(np.int32)
    query, key_cache, value_cache, tables = random_inputs(case, lengths, int(starts[-1]))
    layout = AttentionLayout(
        case.group_size, case.block_size, int(starts[-1]) + 3, len(lengths) + 2, Tile(16, 32, 3), case.wide
    )
    plan = torch.full((layout.size,), 2**30, dtype=torch.int32)
    prefixes = [SharedPrefix(np.arange(len(lengths)), case.shared_length)] if case.shared_length else []
    plan_attention(layout, plan.numpy(), starts, lengths, case.sliding_window, prefixes)
    workspace = AttentionWorkspace(layout, case.num_kv_heads, case.head_dim, device)
    workspace.load(plan)
    workspace.partial_output.fill_(math.nan)
    workspace.partial_weight.fill_(math.nan)
    scale = case.head_dim**-0.5
    output = paged_attention(
        query, key_cache, value_cache, tables, workspace, scale, case.sliding_window, case.soft_cap
    )
    expected = reference.paged_attention(
        query.float(), key_cache, value_cache, tables, torch.from_numpy(starts), torch.from_numpy(lengths), scale,
        case.sliding_window, case.soft_cap,
    )  # fmt: skip
    tolerance = TOLERANCES[case.dtype] * max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(output.float(), expected, atol=tolerance, rtol=0)


def random_inputs(case: Case, lengths: np.ndarray, num_tokens: int) -> tuple[torch.Tensor, ...]:
    """Query, the two caches and the block tables."""
    torch.manual_seed(len(lengths) + case.head_dim)
    size, max_blocks = case.block_size, -(-int(lengths.max()) // case.block_size) + 2
    order = torch.randperm(len(lengths) * max_blocks + 3, dtype=torch.int32)
    tables = torch.full((len(lengths), max_blocks), 2**30, dtype=torch.int32)
    caches = torch.full((2, len(order), case.num_kv_heads, size, case.head_dim), math.nan)
    for row, length in enumerate(lengths.tolist()):
        used = -(-length // size)
        tables[row, :used] = order[row * max_blocks : row * max_blocks + used]
        common = case.shared_length // size
        tables[row, :common] = tables[0, :common]
        positions = torch.arange(length)
        where = (slice(None), tables[row, positions // size].long(), slice(None), positions % size)
        caches[where] = torch.randn(length, 2, case.num_kv_heads, case.head_dim)
    caches[0] *= 2
    query = 2 * torch.randn(num_tokens, case.num_kv_heads * case.group_size, case.head_dim)
    query, keys, values = (tensor.to("cuda", case.dtype) for tensor in (query, caches[0], caches[1]))
    return query, keys, values, tables.to("cuda")


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("wide", TILES, ids=lambda wide: f"{wide.keys}x{wide.num_stages}")
def test_mixed_step(dtype, head_dim, wide):
    assert_exact(Case(STEPS, wide, head_dim=head_dim, dtype=dtype))


@pytest.mark.parametrize("group_size", [1, 3, 7, 16])
def test_group_sizes(group_size):
    assert_exact(Case(STEPS, TILES[1], num_kv_heads=1, group_size=group_size))


@pytest.mark.parametrize("length", [17, 31, 32, 63, 64, 65, 127, 128, 129, 192, 193])
@pytest.mark.parametrize("wide", TILES, ids=lambda wide: f"{wide.keys}x{wide.num_stages}")
def test_lengths_at_edges_of_blocks_and_tiles(length, wide):
    assert_exact(Case([(length, length), (17, length)], wide))


@pytest.mark.parametrize("block_size", [8, 32, 128])
@pytest.mark.parametrize("wide", TILES[1:], ids=lambda wide: f"{wide.keys}x{wide.num_stages}")
def test_block_sizes(block_size, wide):
    assert_exact(Case(STEPS, wide, block_size=block_size))


@pytest.mark.parametrize("sliding_window", [1, 23, 64, 130, 1000])
@pytest.mark.parametrize("wide", TILES[1:], ids=lambda wide: f"{wide.keys}x{wide.num_stages}")
def test_sliding_windows_and_soft_caps(sliding_window, wide):
    case = Case(STEPS, wide, sliding_window=sliding_window)
    assert_exact(case)
    assert_exact(replace(case, soft_cap=5.0))


@pytest.mark.parametrize("workers", [1, 2, 40])
def test_uncut_and_finely_cut(workers):
    for (keys, stages), min_key_tiles in itertools.product(((64, 4), (64, 5)), (1, 2)):
        assert_exact(Case(STEPS, tile(keys, stages, workers, min_key_tiles)))


def test_shared_prefix():
    for wide in TILES:
        assert_exact(Case([(1, 40 + 7 * row + 256) for row in range(40)], wide, shared_length=256))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_launch_table_uses_it(head_dim):
    shape, device = AttentionShape(8, 2, head_dim, 16, torch.bfloat16), torch.device("cuda")
    assert wide_operation(shape, device) == "attention_hopper"
    wide = attention_layout(shape, device, max_tokens=4096, max_sequences=9, has_prompts=True).wide
    assert wide is not None
    for length in (300, 2000):
        assert_exact(Case([*STEPS, (length, length), (length, 2 * length)], wide, head_dim=head_dim))
