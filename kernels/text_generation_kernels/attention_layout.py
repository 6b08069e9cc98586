"""Where each part of one step's attention work lies in a single int32 buffer of fixed size.

The host fills such a buffer with `attention_work.plan_attention` and sends it to the device in one copy. A graph
always reads the same device buffer, so its grid and its addresses fit any step of up to `max_tokens` tokens.

A unit is a few tokens of the step with the keys they attend to. A unit cut into pieces along its keys is several
items; each item is computed once per key/value head, by the worker whose list holds it.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

# Columns of an item.
FIRST_ROW = 0  # the unit's rows are FIRST_ROW … FIRST_ROW + NUM_ROWS - 1 of the row arrays
NUM_ROWS = 1
TABLE = 2  # row of the block tables that names the blocks of the keys
KEY_START = 3
FULL_START = 4  # every row sees every key of FULL_START … FULL_END - 1, which are whole tiles; the others need a mask
FULL_END = 5
KEY_END = 6
PIECE = 7  # added to a row's slot: where the item's partial result goes; -1: it is the whole result
NUM_PIECES = 8  # of the unit, if it is cut and the narrow kernel is to merge it: its tokens' slots lie in order; else 0
NUM_ITEM_COLUMNS = 9

# Columns of a token whose partial results are merged by the kernel that follows.
NUM_MERGE_COLUMNS = 4  # token, first partial slot, number of slots, unused

# Longer queries go to the wide kernel. Up to here reading a sequence's keys once for every few tokens, mostly from the
# second-level cache, beats a launch of the wide kernel: suffixes behind a prefix hit are this short.
MAX_NARROW_QUERY = 16

# So many pieces of a unit, or fewer, are merged in place by code of their own, which reads so many at a time.
FEW_PIECES = 4

# Sections start at multiples of this many int32, so that every one is aligned for vector loads.
ALIGNMENT = 32


@dataclass(frozen=True)
class Tile:
    """How one of the two kernels walks its units."""

    rows: int  # rows of the product: tokens times the query heads of one key/value head
    keys: int  # keys of one loop turn
    num_workers: int  # thread blocks per key/value head; each has its own list of items
    min_key_tiles: int = 1  # a unit is not cut finer than this while there are workers to spare
    merged_slots: int = FEW_PIECES  # partial results that are read at a time where more are merged in place
    num_warps: int = 4
    num_stages: int = 3
    max_registers: int | None = None  # of a thread; None: as many as the compiler likes
    is_hopper: bool = False  # computed by Hopper's own kernel, of which `num_stages` tiles are in shared memory


Section = tuple[int, tuple[int, ...]]  # offset in the buffer, shape


@dataclass(frozen=True)
class AttentionLayout:
    """Sizes of the work buffer. `wide` may be None where all queries are short: its kernel is then not launched."""

    group_size: int  # query heads of one key/value head
    block_size: int
    max_tokens: int
    max_sequences: int
    narrow: Tile  # units of few tokens, most of them one decoding token; queries of up to MAX_NARROW_QUERY tokens
    wide: Tile | None  # prompts, and decoding tokens that share a prefix

    def __post_init__(self) -> None:
        for tile in (self.narrow, self.wide or self.narrow):
            assert tile.rows >= self.group_size, "a tile must hold the heads of one token"
            assert tile.keys % self.block_size == 0 or self.block_size % tile.keys == 0
            assert tile.num_workers > 0
            assert tile.min_key_tiles > 0

    @property
    def narrow_tokens(self) -> int:
        """Tokens that one unit of the narrow kernel holds."""
        return self.narrow.rows // self.group_size

    @property
    def wide_tokens(self) -> int:
        """Tokens that one unit of the wide kernel holds."""
        return 0 if self.wide is None else self.wide.rows // self.group_size

    @cached_property
    def max_partials(self) -> int:
        """Partial results that a plan can need, over all cuts of units and all shared prefixes."""
        # The n workers of a kernel make fewer than n cuts, so fewer than 2n items belong to units that are cut. A
        # decoding token with a shared prefix has two results even where neither of its units is cut.
        cut_wide = 0 if self.wide is None else 2 * self.wide.num_workers * self.wide_tokens
        return 2 * self.narrow.num_workers * self.narrow_tokens + cut_wide + 2 * self.max_sequences

    @property
    def max_rows(self) -> int:
        """Entries of the row arrays: the step's tokens, and those of shared prefixes once more."""
        return self.max_tokens + self.max_sequences

    @cached_property
    def sections(self) -> dict[str, Section]:
        """Each part's offset and shape, in the order in which they lie."""
        wide_workers = 0 if self.wide is None else self.wide.num_workers
        # A sequence has its own units and, if it shares a prefix, is in one more.
        units_per_sequence = -(-MAX_NARROW_QUERY // self.narrow_tokens)
        max_narrow_units = min(self.max_tokens, self.max_sequences * units_per_sequence) + self.max_sequences
        max_wide_units = 0 if self.wide is None else self.max_tokens // self.wide_tokens + 2 * self.max_sequences
        shapes: dict[str, tuple[int, ...]] = {
            "num_merged": (1,),
            "narrow_starts": (self.narrow.num_workers + 1,),
            "wide_starts": (wide_workers + 1,),
            "narrow_items": (max_narrow_units + self.narrow.num_workers, NUM_ITEM_COLUMNS),
            "wide_items": (max_wide_units + wide_workers, NUM_ITEM_COLUMNS),
            "row_tokens": (self.max_rows,),
            "row_positions": (self.max_rows,),
            "row_slots": (self.max_rows,),
            "merged": (self.max_tokens, NUM_MERGE_COLUMNS),
        }
        sections, offset = {}, 0
        for name, shape in shapes.items():
            sections[name] = (offset, shape)
            offset += -(-math.prod(shape) // ALIGNMENT) * ALIGNMENT
        return sections

    @cached_property
    def size(self) -> int:
        """Length of the buffer in int32."""
        offset, shape = self.sections["merged"]
        return offset + -(-math.prod(shape) // ALIGNMENT) * ALIGNMENT

    def view(self, buffer: np.ndarray, name: str) -> np.ndarray:
        """One section of a host buffer."""
        offset, shape = self.sections[name]
        return buffer[offset : offset + math.prod(shape)].reshape(shape)
