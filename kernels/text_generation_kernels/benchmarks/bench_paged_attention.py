"""Paged attention at Llama-3.1-8B's heads: decode steps, shared prefixes, prompts, and steps that mix them.

A GPU's time is measured with the plan in place, as a captured step finds it; planning runs on the host beforehand.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F

from text_generation_kernels.attention_layout import AttentionLayout
from text_generation_kernels.attention_settings import AttentionShape, attention_layout, wide_operation
from text_generation_kernels.attention_work import plan_attention
from text_generation_kernels.benchmarks.harness import Bench, Case
from text_generation_kernels.paged_attention import AttentionWorkspace, paged_attention
from text_generation_kernels.shared_prefix import find_shared_prefixes

# Tried on the cases of either kernel; what does not fit on the GPU, or spills, falls out by itself.
CANDIDATES = {
    "KEYS": [32, 64], "CTAS_PER_SM": [1, 2, 4, 5], "num_warps": [4, 8], "num_stages": [3, 5],
}  # fmt: skip
BLOCK_SIZE = 16


@dataclasses.dataclass(frozen=True)
class Step:
    """One step's sequences and heads."""

    steps: list[tuple[int, int]]  # query length, sequence length
    shape: AttentionShape
    shared_length: int = 0  # leading keys that all sequences share

    @property
    def num_tokens(self) -> int:
        """Of this step."""
        return sum(query for query, _ in self.steps)

    @property
    def num_bytes(self) -> int:
        """Every key and value once, queries and outputs once."""
        shape = self.shape
        keys = self.shared_length + sum(length - self.shared_length for _, length in self.steps)
        values = 2 * keys * shape.num_kv_heads + 2 * self.num_tokens * shape.num_heads
        return values * shape.head_dim * shape.dtype.itemsize

    @property
    def num_flops(self) -> int:
        """Two products over the keys that each query sees."""
        seen = sum(query * length - query * (query - 1) // 2 for query, length in self.steps)
        return 4 * seen * self.shape.num_heads * self.shape.head_dim


def cases(bench: Bench) -> Iterator[Case]:
    """Decode steps first, prompts after them."""
    shape = AttentionShape(bench.size(32, 4), bench.size(8, 2), bench.size(128, 64), BLOCK_SIZE, bench.dtype)
    yield from decode_cases(bench, shape)
    yield from prompt_cases(bench, shape)


def decode_cases(bench: Bench, shape: AttentionShape) -> Iterator[Case]:
    """One token a sequence: bound by reading keys and values."""
    narrow = ("attention_narrow", shape.settings_name)
    sizes = [(batch, context) for batch in (1, 8, 64, 256) for context in (512, 2048, 8192)]
    for batch, context in [(1, 1024), *sizes] if not bench.is_tiny else [(2, 40)]:
        step = Step([(1, context)] * batch, shape)
        yield make_case(bench, f"decode, {batch} x {context}", step, narrow)
    batch, own, shared = (32, 256, 2048) if not bench.is_tiny else (6, 8, 32)
    step = Step([(1, shared + own)] * batch, shape, shared)
    yield make_case(bench, f"decode, {batch} x {own} after {shared} shared", step, ("", ""), has_prompts=True)


def prompt_cases(bench: Bench, shape: AttentionShape) -> Iterator[Case]:
    """Prompts, bound by the matrix unit; the last beside decoding sequences."""
    wide = (wide_operation(shape, bench.device), shape.settings_name)
    whole, chunk, context, batch = (8192, 2048, 4096, 256) if not bench.is_tiny else (24, 18, 40, 3)
    prompts = Step([(whole, whole)], shape)
    yield make_case(bench, f"prompt, 1 x {whole}", prompts, wide, has_prompts=True)
    yield dense_case(bench, f"prompt, 1 x {whole}, torch on contiguous memory", prompts)
    chunks = Step([(chunk, context + chunk)] * 4, shape)
    yield make_case(bench, f"prompts, 4 x {chunk} after {context}", chunks, wide, has_prompts=True)
    short = Step([(chunk // 8, chunk // 8)], shape)
    yield make_case(bench, f"prompt, 1 x {chunk // 8}", short, wide, has_prompts=True)
    mixed = Step([(1, chunk)] * batch + [(chunk, chunk)], shape)
    yield make_case(bench, f"{batch} decode at {chunk}, prompt 1 x {chunk}", mixed, ("", ""), has_prompts=True)


def make_case(bench: Bench, name: str, step: Step, settings: tuple[str, str], has_prompts: bool = False) -> Case:
    """The step's runs, each over caches of its own."""
    block_tables, tables, num_blocks = make_tables(bench, step)
    shape, group = step.shape, [step.num_tokens, step.shape.num_heads, step.shape.head_dim]
    cache = [num_blocks, shape.num_kv_heads, BLOCK_SIZE, shape.head_dim]
    plans = functools.cache(functools.partial(make_workspace, bench, step, tables))

    def run(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        # Asked for on every run: when tuning, the launch table changes between runs. A replay does not come by here.
        layout = attention_layout(shape, bench.device, step.num_tokens, len(step.steps), has_prompts)
        return paged_attention(query, keys, values, block_tables, plans(layout), shape.head_dim**-0.5)

    inputs = [
        (bench.random(*group), bench.random(*cache), bench.random(*cache))
        for _ in range(bench.num_copies(step.num_bytes))
    ]
    runs: list[Callable[[], object]] = [functools.partial(run, *tensors) for tensors in inputs]
    return Case(name, runs, step.num_bytes, step.num_flops, settings)


def make_tables(bench: Bench, step: Step) -> tuple[torch.Tensor, np.ndarray, int]:
    """The sequences' blocks in random order; also on the host, and how many there are."""
    lengths = np.array(step.steps)[:, 1]
    shared = step.shared_length // BLOCK_SIZE
    own = -(-int(lengths.max()) // BLOCK_SIZE) - shared
    order = np.random.default_rng(0).permutation(shared + own * len(lengths)).astype(np.int32)
    common = np.broadcast_to(order[:shared], (len(lengths), shared))
    tables = np.ascontiguousarray(np.concatenate([common, order[shared:].reshape(len(lengths), own)], axis=1))
    return torch.from_numpy(tables).to(bench.device), tables, len(order)


def make_workspace(bench: Bench, step: Step, tables: np.ndarray, layout: AttentionLayout) -> AttentionWorkspace:
    """The step planned for one layout."""
    query_lengths, lengths = np.array(step.steps).T
    starts = np.concatenate(([0], np.cumsum(query_lengths)))
    groups = find_shared_prefixes(tables, query_lengths, lengths, BLOCK_SIZE, 256 if not bench.is_tiny else 32)
    plan = torch.zeros(layout.size, dtype=torch.int32)
    plan_attention(layout, plan.numpy(), starts, lengths, shared_prefixes=groups)
    workspace = AttentionWorkspace(layout, step.shape.num_kv_heads, step.shape.head_dim, bench.device)
    workspace.load(plan)
    return workspace


def dense_case(bench: Bench, name: str, step: Step) -> Case:
    """The same prompt by torch, whose keys need not be gathered from blocks."""
    shape, length = step.shape, step.num_tokens

    def run(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(query, keys, values, is_causal=True, enable_gqa=True)

    inputs = [
        [bench.random(1, heads, length, shape.head_dim) for heads in (shape.num_heads, *[shape.num_kv_heads] * 2)]
        for _ in range(bench.num_copies(step.num_bytes))
    ]
    runs: list[Callable[[], object]] = [functools.partial(run, *tensors) for tensors in inputs]
    return Case(name, runs, step.num_bytes, step.num_flops)
