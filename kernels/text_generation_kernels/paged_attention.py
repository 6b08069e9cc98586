"""Attention of a step's tokens over the paged cache, by a plan of `attention_work` that lies in device memory.

Which kernels run, and on what grid, follows from the workspace's layout alone, never from the batch: a captured graph
serves every step that fits the layout.
"""

from typing import Any

import torch
import triton

from text_generation_kernels.attention_kernels import attention_items_kernel, merge_partials_kernel
from text_generation_kernels.attention_layout import AttentionLayout, Tile
from text_generation_kernels.dispatch import INTERPRETS, early_launch
from text_generation_kernels.side_stream import beside, join

HEAD_DIMS = (64, 80, 96, 128, 256)
# Partial results that one program of the merge reads at a time.
MERGE_SLOTS = 8


class AttentionWorkspace:
    """Device memory of one plan and of partial results. Layers that follow the same plan share it."""

    def __init__(
        self,
        layout: AttentionLayout,
        num_kv_heads: int,
        head_dim: int,
        device: torch.device | str,
        plan: torch.Tensor | None = None,  # [layout.size] int32: where plans come to lie; by default memory of its own
    ) -> None:
        self.layout = layout
        self.num_kv_heads = num_kv_heads
        num_heads = num_kv_heads * layout.group_size
        self.plan = torch.zeros(layout.size, dtype=torch.int32, device=device) if plan is None else plan
        self.partial_output = torch.empty(layout.max_partials, num_heads, head_dim, device=device)
        self.partial_weight = torch.empty(layout.max_partials, num_heads, device=device)
        # Of the pieces of each unit, by its first row; whoever counts to the end sets it back to zero.
        self.arrivals = torch.zeros(layout.max_rows * num_kv_heads, dtype=torch.int32, device=device)
        self._sections = {
            name: self.plan[offset : offset + shape[0] * (shape[1] if len(shape) > 1 else 1)]
            for name, (offset, shape) in layout.sections.items()
        }

    @property
    def num_bytes(self) -> int:
        """Device memory held, for the memory ledger."""
        return sum(part.nbytes for part in (self.plan, self.partial_output, self.partial_weight, self.arrivals))

    def load(self, plan: torch.Tensor) -> None:
        """Copy a plan made by `plan_attention`, best from pinned memory, in stream order."""
        self.plan.copy_(plan, non_blocking=True)

    def section(self, name: str) -> torch.Tensor:
        """One part of the plan, flat."""
        return self._sections[name]


def paged_attention(
    query: torch.Tensor,  # [T, H, D]
    key_cache: torch.Tensor,  # [num_blocks, KVH, block_size, D]
    value_cache: torch.Tensor,  # [num_blocks, KVH, block_size, D]
    block_tables: torch.Tensor,  # [B, max_blocks] int32; entries behind a sequence's blocks are not read
    workspace: AttentionWorkspace,
    scale: float,
    sliding_window: int | None = None,  # the one the plan was made with
    soft_cap: float | None = None,
    output: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention, [T, H, D], of each sequence's newest tokens. Tokens outside the plan are not written."""
    output = torch.empty_like(query) if output is None else output
    _check(query, key_cache, value_cache, block_tables, scale, workspace, output)
    layout = workspace.layout
    factors = (scale, soft_cap or 0.0, sliding_window or 0)
    tensors = (query, key_cache, value_cache, block_tables, workspace, output)
    if layout.wide is None:
        _launch_items("narrow", layout.narrow, *tensors, factors)
        return output
    with beside(query.device, "wide attention"):
        _launch_items("wide", layout.wide, *tensors, factors)
    _launch_items("narrow", layout.narrow, *tensors, factors)
    join(query.device, "wide attention")
    num_heads, head_dim = query.shape[1:]
    num_programs = min(layout.max_tokens * num_heads, 2 * layout.narrow.num_workers * workspace.num_kv_heads)
    merge_partials_kernel[(num_programs,)](
        workspace.section("num_merged"), workspace.section("merged"),
        workspace.partial_output, workspace.partial_weight, output,
        NUM_HEADS=num_heads, HEAD_DIM=head_dim, PADDED_DIM=triton.next_power_of_2(head_dim), SLOTS=MERGE_SLOTS,
        num_warps=2, enable_fp_fusion=True, **early_launch(query.device),
    )  # fmt: skip
    return output


def _launch_items(
    name: str,
    tile: Tile,
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    workspace: AttentionWorkspace,
    output: torch.Tensor,
    factors: tuple[float, float, int],  # scale, soft cap or 0, sliding window or 0
) -> None:
    num_kv_heads, head_dim, is_wide = workspace.num_kv_heads, query.shape[2], name == "wide"
    _, soft_cap, sliding_window = factors
    grid = (tile.num_workers * num_kv_heads,)
    tensors = (
        query, key_cache, value_cache, block_tables,
        workspace.section(f"{name}_starts"), workspace.section(f"{name}_items"),
        workspace.section("row_tokens"), workspace.section("row_positions"), workspace.section("row_slots"),
        output, workspace.partial_output, workspace.partial_weight,
    )  # fmt: skip
    constants: dict[str, Any] = {
        "GROUP_SIZE": workspace.layout.group_size, "NUM_KV_HEADS": num_kv_heads, "HEAD_DIM": head_dim,
        "BLOCK_SIZE": workspace.layout.block_size, "ROWS": tile.rows, "KEYS": tile.keys,
        "HAS_WINDOW": sliding_window > 0, "HAS_SOFT_CAP": soft_cap > 0,
        "num_warps": tile.num_warps, "maxnreg": tile.max_registers, "enable_fp_fusion": True,
    }  # fmt: skip
    if tile.is_hopper:
        # Its import takes 50 ms, which no other device's start need spend.
        from text_generation_kernels.hopper_attention import hopper_attention_kernel

        hopper_attention_kernel[grid](
            *tensors, block_tables.stride(0), *factors, STAGES=tile.num_stages,
            **early_launch(query.device), **constants,
        )  # fmt: skip
        return
    attention_items_kernel[grid](
        *tensors, workspace.arrivals, block_tables.stride(0), *factors,
        PADDED_DIM=triton.next_power_of_2(head_dim), MERGED_SLOTS=tile.merged_slots, IS_WIDE=is_wide,
        WIDEN=INTERPRETS, BESIDE=not is_wide and workspace.layout.wide is not None,
        **early_launch(query.device), **constants, num_stages=tile.num_stages,
    )  # fmt: skip


def _check(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    scale: float,
    workspace: AttentionWorkspace,
    output: torch.Tensor,
) -> None:
    layout, num_kv_heads = workspace.layout, workspace.num_kv_heads
    num_tokens, num_heads, head_dim = query.shape
    assert scale > 0, "the largest score is looked for before it is scaled"
    assert head_dim in HEAD_DIMS, f"head size {head_dim} is none of {HEAD_DIMS}"
    assert num_tokens <= layout.max_tokens
    assert num_heads == num_kv_heads * layout.group_size
    assert workspace.partial_output.shape[1:] == (num_heads, head_dim)
    assert key_cache.shape == value_cache.shape
    assert key_cache.shape[1:] == (num_kv_heads, layout.block_size, head_dim)
    assert block_tables.dtype == torch.int32
    assert block_tables.stride(1) == 1
    assert block_tables.shape[0] <= layout.max_sequences
    assert output.shape == query.shape
    for tensor in (query, workspace.partial_output):
        assert tensor.numel() < 2**31, "the kernels count these elements in 32 bits"
    for tensor in (query, key_cache, value_cache, output):
        assert tensor.is_contiguous()
        assert tensor.dtype == query.dtype
