"""The tensors of the running step that attention layers read, set once around each forward pass."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from text_generation_kernels.cpu_attention_plan import CpuAttentionPlan
from text_generation_kernels.paged_attention import AttentionWorkspace

from text_generation_shard.kv_cache import KvCaches


@dataclass(frozen=True)
class KernelAttentionPlan:
    """What attention by kernels reads, all of it in device memory."""

    slot_mapping: torch.Tensor  # [num_tokens]: where each token's key and value go; -1: nowhere
    block_tables: torch.Tensor  # [num_sequences, max_blocks] int32
    workspaces: Mapping[int | None, AttentionWorkspace]  # by sliding window


@dataclass(frozen=True)
class ForwardContext:
    """One step's view of the batch. Sequences are in batch order, their tokens flattened one after another."""

    kv_caches: KvCaches
    plan: KernelAttentionPlan | CpuAttentionPlan


_current: ForwardContext | None = None


@contextmanager
def forward_context(context: ForwardContext) -> Iterator[None]:
    """Make `context` current; nesting is refused."""
    global _current
    assert _current is None, "forward contexts do not nest"
    _current = context
    try:
        yield
    finally:
        _current = None


def get_forward_context() -> ForwardContext:
    """The running step's context; only callable inside `forward_context`."""
    assert _current is not None, "no step is running"
    return _current
