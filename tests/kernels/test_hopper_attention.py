"""Hopper's own kernel of prompts, against the reference, which is exact to float32.

Only such a GPU runs it. Elsewhere its TTGIR is interpreted, for few and small cases.
"""

import functools
import itertools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import triton
from text_generation_kernels import reference
from text_generation_kernels.attention_layout import AttentionLayout, Tile
from text_generation_kernels.attention_settings import AttentionShape, attention_layout, wide_operation
from text_generation_kernels.attention_work import plan_attention
from text_generation_kernels.dispatch import HAS_GLUON
from text_generation_kernels.paged_attention import AttentionWorkspace, paged_attention
from text_generation_kernels.shared_prefix import SharedPrefix
from triton.backends.compiler import GPUTarget
from ttgir_interpreter import run_program
from ttgir_operations import Fault
from ttgir_text import Operation, parse

HAS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
needs_gluon = pytest.mark.skipif(not HAS_GLUON, reason="needs a Triton whose Gluon is known")


def on_hopper(test: Callable[..., None]) -> Callable[..., None]:
    return pytest.mark.gpu(pytest.mark.skipif(not HAS_HOPPER, reason="needs a Hopper GPU")(test))


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


@dataclass(frozen=True)
class Step:
    """A case's lengths, plan and inputs, in a cache full of NaN but for the sequences' own keys.

    The table is full of wild numbers but for their own blocks, the plan but for what is planned.
    """

    lengths: np.ndarray
    starts: np.ndarray
    layout: AttentionLayout
    plan: torch.Tensor
    inputs: tuple[torch.Tensor, ...]  # query, key cache, value cache, block tables


def step_of(case: Case, device: str) -> Step:
    query_lengths, lengths = np.array(case.steps, np.int32).T
    starts = np.concatenate(([0], np.cumsum(query_lengths))).astype(np.int32)
    layout = AttentionLayout(
        case.group_size, case.block_size, int(starts[-1]) + 3, len(lengths) + 2, Tile(16, 32, 3), case.wide
    )
    plan = torch.full((layout.size,), 2**30, dtype=torch.int32)
    prefixes = [SharedPrefix(np.arange(len(lengths)), case.shared_length)] if case.shared_length else []
    plan_attention(layout, plan.numpy(), starts, lengths, case.sliding_window, prefixes)
    return Step(lengths, starts, layout, plan, random_inputs(case, lengths, int(starts[-1]), device))


def assert_matches_reference(case: Case, step: Step, output: torch.Tensor) -> None:
    query, key_cache, value_cache, tables = step.inputs
    expected = reference.paged_attention(
        query.float(), key_cache, value_cache, tables, torch.from_numpy(step.starts), torch.from_numpy(step.lengths),
        case.head_dim**-0.5, case.sliding_window, case.soft_cap,
    )  # fmt: skip
    tolerance = TOLERANCES[case.dtype] * max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(output.float(), expected, atol=tolerance, rtol=0)


def assert_exact(case: Case) -> None:
    """On the GPU."""
    step = step_of(case, "cuda")
    workspace = AttentionWorkspace(step.layout, case.num_kv_heads, case.head_dim, "cuda")
    workspace.load(step.plan)
    workspace.partial_output.fill_(math.nan)
    workspace.partial_weight.fill_(math.nan)
    output = paged_attention(*step.inputs, workspace, case.head_dim**-0.5, case.sliding_window, case.soft_cap)
    assert_matches_reference(case, step, output)


def random_inputs(case: Case, lengths: np.ndarray, num_tokens: int, device: str) -> tuple[torch.Tensor, ...]:
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
    query, keys, values = (tensor.to(device, case.dtype) for tensor in (query, caches[0], caches[1]))
    return query, keys, values, tables.to(device)


@on_hopper
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("wide", TILES, ids=lambda wide: f"{wide.keys}x{wide.num_stages}")
def test_mixed_step(dtype, head_dim, wide):
    assert_exact(Case(STEPS, wide, head_dim=head_dim, dtype=dtype))


@on_hopper
@pytest.mark.parametrize("group_size", [1, 3, 7, 16])
def test_group_sizes(group_size):
    assert_exact(Case(STEPS, TILES[1], num_kv_heads=1, group_size=group_size))


@on_hopper
@pytest.mark.parametrize("length", [17, 31, 32, 63, 64, 65, 127, 128, 129, 192, 193])
@pytest.mark.parametrize("wide", TILES, ids=lambda wide: f"{wide.keys}x{wide.num_stages}")
def test_lengths_at_edges_of_blocks_and_tiles(length, wide):
    assert_exact(Case([(length, length), (17, length)], wide))


@on_hopper
@pytest.mark.parametrize("block_size", [8, 32, 128])
@pytest.mark.parametrize("wide", TILES[1:], ids=lambda wide: f"{wide.keys}x{wide.num_stages}")
def test_block_sizes(block_size, wide):
    assert_exact(Case(STEPS, wide, block_size=block_size))


@on_hopper
@pytest.mark.parametrize("sliding_window", [1, 23, 64, 130, 1000])
@pytest.mark.parametrize("wide", TILES[1:], ids=lambda wide: f"{wide.keys}x{wide.num_stages}")
def test_sliding_windows_and_soft_caps(sliding_window, wide):
    case = Case(STEPS, wide, sliding_window=sliding_window)
    assert_exact(case)
    assert_exact(replace(case, soft_cap=5.0))


@on_hopper
@pytest.mark.parametrize("workers", [1, 2, 40])
def test_uncut_and_finely_cut(workers):
    for (keys, stages), min_key_tiles in itertools.product(((64, 4), (64, 5)), (1, 2)):
        assert_exact(Case(STEPS, tile(keys, stages, workers, min_key_tiles)))


@on_hopper
def test_shared_prefix():
    for wide in TILES:
        assert_exact(Case([(1, 40 + 7 * row + 256) for row in range(40)], wide, shared_length=256))


@on_hopper
@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_launch_table_uses_it(head_dim):
    shape, device = AttentionShape(8, 2, head_dim, 16, torch.bfloat16), torch.device("cuda")
    assert wide_operation(shape, device) == "attention_hopper"
    wide = attention_layout(shape, device, max_tokens=4096, max_sequences=9, has_prompts=True).wide
    assert wide is not None
    for length in (300, 2000):
        assert_exact(Case([*STEPS, (length, length), (length, 2 * length)], wide, head_dim=head_dim))


def ttgir_of(case: Case) -> str:
    """The kernel with a case's constants, compiled for Hopper."""
    numbers = (case.group_size, case.num_kv_heads, case.head_dim, case.block_size, case.wide.num_stages)
    return _compile(case.dtype, *numbers, case.sliding_window is not None, case.soft_cap is not None)


@functools.cache
def _compile(
    dtype: torch.dtype, group_size: int, num_kv_heads: int, head_dim: int, block_size: int, stages: int,
    has_window: bool, has_soft_cap: bool,
) -> str:  # fmt: skip
    from text_generation_kernels.hopper_attention import hopper_attention_kernel as kernel
    from triton.experimental.gluon._runtime import GluonASTSource

    data = {torch.float16: "*fp16", torch.bfloat16: "*bf16"}[dtype]
    types = dict.fromkeys(("query", "key_cache", "value_cache", "output"), data)
    types |= {"partial_output": "*fp32", "partial_weight": "*fp32", "scale": "fp32", "soft_cap": "fp32"}
    types |= {"table_stride": "i32", "sliding_window": "i32"}
    constants = {
        "GROUP_SIZE": group_size, "NUM_KV_HEADS": num_kv_heads, "HEAD_DIM": head_dim, "BLOCK_SIZE": block_size,
        "ROWS": 128, "KEYS": 64, "STAGES": stages, "HAS_WINDOW": has_window, "HAS_SOFT_CAP": has_soft_cap,
        "EARLY": True,
    }  # fmt: skip
    signature = {name: "constexpr" if name in constants else types.get(name, "*i32") for name in kernel.arg_names}
    pointers = [index for index, kind in enumerate(signature.values()) if kind.startswith("*")]
    source = GluonASTSource(kernel, signature, constants, {(index,): [["tt.divisibility", 16]] for index in pointers})
    options = {"num_warps": 4, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ttgir"]


def assert_exact_interpreted(case: Case, kernel: Operation, seed: int) -> None:
    """Without a GPU, for queries that are all of the wide kernel. Here the partial results are merged."""
    step = step_of(case, "cpu")
    num_heads = case.num_kv_heads * case.group_size
    sections = {name: step.layout.view(step.plan.numpy(), name) for name in step.layout.sections}
    assert not sections["narrow_starts"].any()
    query, key_cache, value_cache, tables = step.inputs
    stored = np.float16 if case.dtype is torch.float16 else np.float32
    query, key_cache, value_cache = (tensor.float().numpy().astype(stored) for tensor in step.inputs[:3])
    output = np.full_like(query, math.nan)
    partial_output = np.full((step.layout.max_partials, num_heads, case.head_dim), math.nan, np.float32)
    partial_weight = np.full((step.layout.max_partials, num_heads), math.nan, np.float32)
    arrays = {
        "query": query, "key_cache": key_cache, "value_cache": value_cache, "block_tables": tables.numpy(),
        "worker_starts": sections["wide_starts"], "items": sections["wide_items"],
        "output": output, "partial_output": partial_output, "partial_weight": partial_weight,
    } | {name: sections[name] for name in ("row_tokens", "row_positions", "row_slots")}  # fmt: skip
    arguments = {name: array.reshape(-1) for name, array in arrays.items()} | {
        "table_stride": np.int32(tables.shape[1]), "scale": np.float32(case.head_dim**-0.5),
        "soft_cap": np.float32(case.soft_cap or 0), "sliding_window": np.int32(case.sliding_window or 0),
    }  # fmt: skip
    for program in range(case.wide.num_workers * case.num_kv_heads):
        run_program(kernel, arguments, program, seed)
    for token, slot, num_slots, _ in sections["merged"][: sections["num_merged"][0]]:
        weights = torch.from_numpy(partial_weight[slot : slot + num_slots, :, None] * np.float32(math.log(2)))
        output[token] = (weights.softmax(0).numpy() * partial_output[slot : slot + num_slots]).sum(0)
    assert_matches_reference(case, step, torch.from_numpy(output))


SMALL = Case([(70, 70), (33, 200), (17, 17), (20, 193)], tile(64, 3, 2), head_dim=64, dtype=torch.float16)
WINDOW = replace(SMALL, steps=[(70, 200), (18, 257)], num_kv_heads=1, group_size=1, sliding_window=23)


@needs_gluon
@pytest.mark.parametrize(
    "case",
    [
        SMALL,
        replace(SMALL, wide=tile(64, 3, 1)),  # all items of a head by one worker
        replace(SMALL, wide=tile(64, 3, 20)),  # every tile a piece of its own
        replace(SMALL, num_kv_heads=1, group_size=3, block_size=8, wide=tile(64, 4, 2), dtype=torch.bfloat16),
        WINDOW,
        replace(WINDOW, sliding_window=1),
        replace(WINDOW, sliding_window=130),
        replace(WINDOW, group_size=4, block_size=128, soft_cap=5.0, wide=tile(64, 5, 4), dtype=torch.bfloat16),
    ],
)
def test_interpreted(case):
    kernel = parse(ttgir_of(case))
    for seed in range(4):
        assert_exact_interpreted(case, kernel, seed)


@needs_gluon
def test_touches_no_memory_before_the_kernels_ahead_have_ended():
    text = ttgir_of(SMALL)
    before, wait, after = text.partition("griddepcontrol.wait")
    assert wait
    assert "griddepcontrol.launch_dependents" in after
    assert not re.search(r"tt\.(load|store)|async_copy|warp_specialize", before)


@needs_gluon
@pytest.mark.parametrize(
    ("pattern", "replacement", "fault"),
    [
        ("ttng.fence_async_shared .*", "", "written behind the last fence"),
        ("pendings = 1", "pendings = 2", "nothing has waited for"),
        (r"ttng.arrive_barrier .*", "", "deadlock"),
        (r"ttng.wait_barrier .*(?=\n +%is_key)", "", "tile|deadlock"),  # a stage's copy does not wait
        (r"async_copy_global_to_local (.*) mask \S+", r"async_copy_global_to_local \1", "outside|not close"),
    ],
)
def test_interpreter_finds_faults(pattern, replacement, fault):
    text, count = re.subn(pattern, replacement, ttgir_of(SMALL))
    assert count > 0
    with pytest.raises((Fault, AssertionError), match=fault):
        assert_exact_interpreted(SMALL, parse(text), 0)
