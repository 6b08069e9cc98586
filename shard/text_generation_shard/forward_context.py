"""The tensors of the running step that attention layers read, set once around each forward pass."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ForwardContext:
    """One step's view of the batch. Sequences are in batch order, their tokens flattened one after another."""

    slot_mapping: torch.Tensor  # [num_tokens] int64: where each token's key and value go
    block_tables: torch.Tensor  # [num_sequences, max_blocks] int32, padded with 0
    query_starts: torch.Tensor  # [num_sequences + 1] int32: first token of each sequence, then num_tokens
    sequence_lengths: torch.Tensor  # [num_sequences] int32: tokens attended to, this step's included
    max_query_length: int
    max_sequence_length: int
    kv_caches: list[tuple[torch.Tensor, torch.Tensor]]  # per layer: key, value
    # each [num_blocks, num_kv_heads, block_size, head_dim]


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
