"""Paged attention over a work plan, against a dense computation in float64."""

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from text_generation_kernels import reference
from text_generation_kernels.attention_layout import (
    FEW_PIECES,
    NUM_ITEM_COLUMNS,
    NUM_PIECES,
    PIECE,
    AttentionLayout,
    Tile,
)
from text_generation_kernels.attention_settings import AttentionShape, attention_layout
from text_generation_kernels.attention_work import plan_attention
from text_generation_kernels.paged_attention import AttentionWorkspace, paged_attention
from text_generation_kernels.shared_prefix import SharedPrefix

pytestmark = pytest.mark.interpreted

# Relative to the largest value: a product of 16-bit probabilities and values, summed in float32.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
MIXED = [(1, 33), (20, 20), (0, 9), (1, 1), (7, 40), (1, 48)]  # (query length, sequence length)


@dataclass(frozen=True)
class Case:
    """One step: its sequences and the shape of its heads."""

    steps: list[tuple[int, int]]
    num_kv_heads: int = 2
    group_size: int = 2
    head_dim: int = 64
    block_size: int = 16
    dtype: torch.dtype = torch.float32
    sliding_window: int | None = None
    soft_cap: float | None = None
    workers: int = 3
    min_key_tiles: int = 1
    wide: bool = True
    shared: tuple[list[int], int] | None = None  # sequences with the same first blocks, and how many keys those hold

    @property
    def scale(self) -> float:
        """The usual one."""
        return 1 / math.sqrt(self.head_dim)

    @property
    def extents(self) -> tuple[np.ndarray, np.ndarray]:
        """Where each sequence's queries start, and behind the last end; the sequences' lengths."""
        query_lengths, lengths = np.array(self.steps, np.int32).T
        return np.concatenate(([0], np.cumsum(query_lengths))).astype(np.int32), lengths


def some(*values: object, slow: tuple[object, ...]) -> list[object]:
    """Parameters of a test; some only for its longer form, for the interpreter takes a second for each."""
    return [*values, *(pytest.param(value, marks=pytest.mark.slow) for value in slow)]


def run(case: Case, device: torch.device, padding: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernels' output and the exact one, both of the step's own tokens."""
    inputs = random_inputs(case, device, padding)
    query = inputs[0]
    layout = AttentionLayout(
        group_size=case.group_size,
        block_size=case.block_size,
        max_tokens=query.shape[0] + 3,
        max_sequences=len(case.steps) + 2,
        narrow=Tile(16 if case.group_size <= 16 else 32, 32, case.workers, case.min_key_tiles, merged_slots=8),
        wide=Tile(32, 16, case.workers, case.min_key_tiles) if case.wide else None,
    )
    plan = torch.full((layout.size,), 2**30, dtype=torch.int32)
    prefixes = [] if case.shared is None else [SharedPrefix(np.array(case.shared[0]), case.shared[1])]
    plan_attention(layout, plan.numpy(), *case.extents, case.sliding_window, prefixes)
    workspace = AttentionWorkspace(layout, case.num_kv_heads, case.head_dim, device)
    workspace.load(plan)
    workspace.partial_output.fill_(math.nan)
    workspace.partial_weight.fill_(math.nan)
    output = torch.full_like(query, math.nan)
    options = (case.scale, case.sliding_window, case.soft_cap)
    result = paged_attention(*inputs, workspace, *options, output)
    assert result is output
    num_tokens = query.shape[0] - padding
    assert output[num_tokens:].isnan().all(), "padding is not written"
    return output[:num_tokens].double().cpu(), exact(case, *inputs).cpu()


def random_inputs(
    case: Case, device: torch.device, padding: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Caches full of NaN but for the sequences' own keys; tables of wild numbers but for their own blocks."""
    torch.manual_seed(len(case.steps) + case.head_dim)
    query_lengths, lengths = (list(column) for column in zip(*case.steps, strict=True))
    num_tokens, size = sum(query_lengths), case.block_size
    max_blocks = max(-(-length // size) for length in lengths) + 2
    order = torch.randperm(len(lengths) * max_blocks + 3)
    tables = torch.full((len(lengths), max_blocks), 2**30, dtype=torch.int32)
    shape = (len(order), case.num_kv_heads, size, case.head_dim)
    key_cache, value_cache = torch.full((2, *shape), math.nan)
    for row, length in enumerate(lengths):
        used = -(-length // size)
        tables[row, :used] = order[row * max_blocks : row * max_blocks + used]
        if case.shared is not None and row in case.shared[0][1:]:
            common = case.shared[1] // size
            tables[row, :common] = tables[case.shared[0][0], :common]
        positions = torch.arange(length)
        where = (tables[row, positions // size].long(), slice(None), positions % size)
        key_cache[where] = 2 * torch.randn(length, case.num_kv_heads, case.head_dim)
        value_cache[where] = torch.randn(length, case.num_kv_heads, case.head_dim)
    query = 2 * torch.randn(num_tokens + padding, case.num_kv_heads * case.group_size, case.head_dim)
    caches = [cache.to(device, case.dtype).contiguous() for cache in (key_cache, value_cache)]
    return query.to(device, case.dtype), caches[0], caches[1], tables.to(device)


def exact(
    case: Case, query: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, tables: torch.Tensor
) -> torch.Tensor:
    """Token by token, head by head, in float64."""
    results = []
    for row, (query_length, length) in enumerate(case.steps):
        start = int(case.extents[0][row])
        for i in range(query_length):
            position = length - query_length + i
            first = 0 if case.sliding_window is None else max(0, position - case.sliding_window + 1)
            seen = torch.arange(first, position + 1, device=query.device)
            where = (tables[row, seen // case.block_size].long(), slice(None), seen % case.block_size)
            keys, values = key_cache[where].double(), value_cache[where].double()
            for head in range(query.shape[1]):
                of = head // case.group_size
                scores = keys[:, of] @ query[start + i, head].double() * case.scale
                if case.soft_cap is not None:
                    scores = case.soft_cap * (scores / case.soft_cap).tanh()
                results.append(scores.softmax(0) @ values[:, of])
    return torch.stack(results).view(-1, query.shape[1], case.head_dim)


def assert_exact(case: Case, device: torch.device, padding: int = 0) -> None:
    output, expected = run(case, device, padding)
    tolerance = TOLERANCES[case.dtype] * max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(output, expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("dtype", some(torch.float32, torch.bfloat16, slow=(torch.float16,)))
def test_mixed_step(dtype, device):
    assert_exact(Case(MIXED, dtype=dtype), device, padding=2)


@pytest.mark.parametrize("dtype", some(torch.float32, torch.bfloat16, slow=(torch.float16,)))
def test_decode_step(dtype, device):
    assert_exact(Case([(1, 70), (1, 1), (1, 16), (1, 17)], dtype=dtype, wide=False), device)


@pytest.mark.parametrize("head_dim", some(80, 256, slow=(96, 128)))
def test_head_sizes(head_dim, device):
    assert_exact(Case([(1, 35), (18, 35)], num_kv_heads=1, head_dim=head_dim), device)


@pytest.mark.parametrize("group_size", some(1, 7, 17, slow=(3,)))
def test_group_sizes(group_size, device):
    assert_exact(Case([(1, 35), (2, 20)], group_size=group_size, num_kv_heads=1), device)


@pytest.mark.parametrize("length", some(15, 16, 17, 33, slow=(31, 32, 64)))
def test_lengths_at_edges_of_blocks_and_tiles(length, device):
    assert_exact(Case([(1, length), (min(length, 18), length)], num_kv_heads=1, workers=2), device)


@pytest.mark.parametrize("block_size", some(32, slow=(64, 128)))
def test_block_sizes(block_size, device):
    assert_exact(Case(MIXED, num_kv_heads=1, block_size=block_size), device)


@pytest.mark.parametrize("sliding_window", some(1, 5, 23, slow=(16, 1000)))
def test_sliding_windows(sliding_window, device):
    assert_exact(Case([(1, 60), (20, 50), (1, 4)], num_kv_heads=1, sliding_window=sliding_window), device)


@pytest.mark.parametrize("workers", [1, 40])
def test_uncut_and_finely_cut(workers, device):
    assert_exact(Case([(1, 150), (25, 60)], num_kv_heads=1, workers=workers), device)


def test_coarse_cuts(device):
    assert_exact(Case([(1, 150), (25, 60)], num_kv_heads=1, workers=40, min_key_tiles=3), device)


@pytest.mark.parametrize("soft_cap", [0.5, 30.0])
def test_soft_cap(soft_cap, device):
    case = Case(MIXED, num_kv_heads=1, soft_cap=soft_cap)
    assert_exact(case, device)
    assert_exact(replace(case, sliding_window=5), device)


@pytest.mark.parametrize("head_dim", some(128, slow=(64, 256)))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_launch_tables_tiles(head_dim, dtype, device):
    case = Case([(1, 300), (70, 150), (1, 40)], num_kv_heads=1, group_size=4, head_dim=head_dim, dtype=dtype)
    shape = AttentionShape(case.group_size, 1, head_dim, case.block_size, dtype)
    layout = attention_layout(shape, device, max_tokens=72, max_sequences=3, has_prompts=True)
    inputs = random_inputs(case, device, 0)
    workspace = planned_workspace(case, device, layout)
    output = paged_attention(*inputs, workspace, case.scale)
    expected = exact(case, *inputs)
    tolerance = TOLERANCES[dtype] * max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(output.double(), expected, atol=tolerance, rtol=0)


def test_soft_cap_of_huge_scores(device):
    case = Case([(1, 20)], num_kv_heads=1, soft_cap=2.0)
    query, *others = random_inputs(case, device, 0)
    huge = (query * 1e4, *others)
    output = paged_attention(*huge, planned_workspace(case, device), case.scale, None, case.soft_cap)
    torch.testing.assert_close(output.double().cpu(), exact(case, *huge).cpu(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shared_prefix(dtype, device):
    steps = [(1, 40), (1, 33), (1, 70), (1, 35), (1, 48), (1, 34), (1, 33), (1, 36), (1, 41), (1, 64)]
    members = [0, 1, 3, 4, 5, 6, 7, 8, 9]
    assert_exact(Case(steps, num_kv_heads=1, dtype=dtype, shared=(members, 32)), device)


def test_shared_prefix_beside_a_prompt(device):
    assert_exact(Case([(1, 40), (20, 30), (1, 33)], num_kv_heads=1, shared=([0, 2], 32)), device, padding=1)


def test_pieces_are_merged_by_the_last_to_arrive(device):
    case = Case([(1, 90), (7, 61), (16, 16), (1, 1), (2, 70)], wide=False, workers=9, min_key_tiles=1)
    inputs = random_inputs(case, device, 0)
    layout = AttentionLayout(case.group_size, case.block_size, 64, 5, Tile(16, 32, 9), None)
    workspace = planned_workspace(case, device, layout)
    assert merged_in_place(workspace)
    expected = exact(case, *inputs)
    for _ in range(2):  # the counts are back at zero
        output = paged_attention(*inputs, workspace, case.scale)
        torch.testing.assert_close(output.double(), expected, atol=3e-5, rtol=0)
    assert not workspace.arrivals.any()


@pytest.mark.parametrize("group_size", some(3, slow=(1, 7, 16)))
def test_more_pieces_than_are_read_at_a_time(group_size, device):
    case = Case([(3, 370), (1, 40)], num_kv_heads=1, group_size=group_size, wide=False)
    inputs = random_inputs(case, device, 0)
    narrow = Tile(16, 32, 60, merged_slots=8)
    workspace = planned_workspace(case, device, AttentionLayout(group_size, case.block_size, 8, 2, narrow, None))
    assert max(merged_in_place(workspace)) > narrow.merged_slots > FEW_PIECES
    output = paged_attention(*inputs, workspace, case.scale)
    torch.testing.assert_close(output.double(), exact(case, *inputs), atol=3e-5, rtol=0)


def test_the_narrow_kernel_merges_its_own_pieces_beside_the_wide_one(device):
    case = Case([(1, 90), (20, 61), (1, 1), (2, 70)])
    inputs = random_inputs(case, device, 0)
    workspace = planned_workspace(case, device)
    assert merged_in_place(workspace)
    for _ in range(2):  # the counts are back at zero
        output = paged_attention(*inputs, workspace, case.scale)
        torch.testing.assert_close(output.double(), exact(case, *inputs), atol=3e-5, rtol=0)
    assert not workspace.arrivals.any()


def test_one_plan_buffer_serves_step_after_step(device):
    case = Case([(1, 90), (20, 20)], num_kv_heads=1)
    inputs = random_inputs(case, device, 0)
    workspace = planned_workspace(case, device)
    paged_attention(*inputs, workspace, case.scale)
    shorter = replace(case, steps=[(1, 3), (20, 20)])
    workspace.load(planned_workspace(shorter, device, workspace.layout).plan)
    output = paged_attention(*inputs, workspace, case.scale)
    expected = exact(shorter, *inputs)
    torch.testing.assert_close(output.double(), expected, atol=3e-5, rtol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, whose streams it is about")
def test_on_two_streams_as_on_gpus_without_early_launches(device, monkeypatch):
    for module in ("dispatch", "side_stream"):
        monkeypatch.setattr(f"text_generation_kernels.{module}.launches_early", lambda device: False)
    assert_exact(Case(MIXED), device)


def merged_in_place(workspace: AttentionWorkspace) -> list[int]:
    """Of the units that were cut and that the narrow kernel merges, in how many pieces each."""
    items = workspace.section("narrow_items").view(-1, NUM_ITEM_COLUMNS)[: int(workspace.section("narrow_starts")[-1])]
    return [int(item[NUM_PIECES]) for item in items if item[PIECE] == 0 and item[NUM_PIECES] > 0]


def planned_workspace(case: Case, device: torch.device, layout: AttentionLayout | None = None) -> AttentionWorkspace:
    layout = layout or AttentionLayout(case.group_size, case.block_size, 64, 4, Tile(16, 32, 3), Tile(32, 32, 3))
    plan = torch.zeros(layout.size, dtype=torch.int32)
    plan_attention(layout, plan.numpy(), *case.extents)
    workspace = AttentionWorkspace(layout, case.num_kv_heads, case.head_dim, device)
    workspace.load(plan)
    return workspace


def test_reference_with_soft_cap_is_exact(device):
    case = Case(MIXED, soft_cap=3.0, sliding_window=9)
    inputs = random_inputs(case, device, 0)
    output = reference.paged_attention(*inputs, *map(torch.from_numpy, case.extents), case.scale, 9, 3.0)
    torch.testing.assert_close(output.double(), exact(case, *inputs), atol=1e-5, rtol=0)
