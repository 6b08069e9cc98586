"""The attention kernels' tiles and numbers of workers for a model's heads on a device, from the launch table."""

from dataclasses import dataclass

import torch
import triton

from text_generation_kernels.attention_layout import FEW_PIECES, AttentionLayout, Tile
from text_generation_kernels.dispatch import HAS_GLUON, num_multiprocessors
from text_generation_kernels.gpu import gpu_of
from text_generation_kernels.launch_settings import Settings, launch_settings

# Head sizes that Hopper's own kernel takes; it multiplies in 16 bits.
HOPPER_HEAD_DIMS = (64, 128)
# A row of the matrix unit's smallest tile; fewer rows than this cost the same.
SMALLEST_TILE_ROWS = 16
# Heads of which the launch table says how many partial results are read at a time.
TABLE_GROUP_SIZE = 4


@dataclass(frozen=True)
class AttentionShape:
    """What one rank's attention looks like."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype

    @property
    def group_size(self) -> int:
        """Query heads of one key/value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def settings_name(self) -> str:
        """This shape's word in the launch table."""
        return "float32" if self.dtype == torch.float32 else f"d{max(64, triton.next_power_of_2(self.head_dim))}"


def attention_layout(
    shape: AttentionShape, device: torch.device, max_tokens: int, max_sequences: int, has_prompts: bool
) -> AttentionLayout:
    """The layout for steps of up to so many tokens. Without prompts the wide kernel is left out.

    A graph of decoding sequences saves that launch; one for sequences that share prefixes is best made with it.
    """
    smallest = max(SMALLEST_TILE_ROWS, triton.next_power_of_2(shape.group_size))
    narrow = launch_settings("attention_narrow", device, shape.settings_name)
    operation = wide_operation(shape, device)
    wide = launch_settings(operation, device, shape.settings_name)
    return AttentionLayout(
        group_size=shape.group_size,
        block_size=shape.block_size,
        max_tokens=max_tokens,
        max_sequences=max_sequences,
        narrow=make_tile(narrow, smallest, shape, device),
        wide=make_tile(wide, max(wide["ROWS"], smallest), shape, device, operation == "attention_hopper")
        if has_prompts
        else None,
    )


def wide_operation(shape: AttentionShape, device: torch.device) -> str:
    """The launch table's word for the kernel of prompts: Hopper GPUs have one of their own for most heads."""
    gpu = gpu_of(device)
    is_hopper = HAS_GLUON and gpu is not None and gpu.capability == (9, 0)
    suits = shape.head_dim in HOPPER_HEAD_DIMS and shape.dtype.itemsize == 2
    return "attention_hopper" if is_hopper and suits else "attention_wide"


def make_tile(
    settings: Settings, rows: int, shape: AttentionShape, device: torch.device, is_hopper: bool = False
) -> Tile:
    """As many workers as fit on the device at once: their shares are equal, so a second wave would double the time."""
    programs = num_multiprocessors(device) * settings["CTAS_PER_SM"]
    return Tile(
        rows=rows,
        keys=settings["KEYS"],
        num_workers=max(1, programs // shape.num_kv_heads),
        min_key_tiles=settings["MIN_KEY_TILES"],
        merged_slots=merged_slots(settings, shape.group_size),
        num_warps=settings["num_warps"],
        num_stages=settings["num_stages"],
        max_registers=settings.get("maxnreg"),
        is_hopper=is_hopper,
    )


def merged_slots(settings: Settings, group_size: int) -> int:
    """How many partial results the last piece of a unit reads at a time: fewer for a group of more than four heads."""
    slots: int = settings.get("MERGED_SLOTS", FEW_PIECES)
    heads = max(TABLE_GROUP_SIZE, int(triton.next_power_of_2(group_size)))
    return max(FEW_PIECES, slots * TABLE_GROUP_SIZE // heads)
