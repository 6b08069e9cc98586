"""Attention of prompts on Hopper GPUs, in Gluon: what `attention_items_kernel` computes for the wide items, faster.

A program has three warpgroups, as in FlashAttention-3 (Shah et al. 2024): one copies tiles of keys and values into
shared memory, two compute half of an item's rows each. Neither of those waits for the other, so that one multiplies
while the other takes exponentials. Each begins the scores of a tile and the product of the exponentials before with
their values together.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from text_generation_kernels.attention_kernels import NUM_ITEM_COLUMNS
from text_generation_kernels.hopper_attention_compute import WARPS, compute_items, tile_start, work

# Registers of a thread: of those that compute and of those that copy.
COMPUTE_REGISTERS: gl.constexpr = gl.constexpr(208)
COPY_REGISTERS: gl.constexpr = gl.constexpr(88)

# Triton 3.6 has another name for it.
copy_async = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared


@gluon.jit(do_not_specialize=["table_stride", "sliding_window"])
def hopper_attention_kernel(
    query,  # [T, H, D]
    key_cache,  # [num_blocks, KVH, BLOCK_SIZE, D]
    value_cache,
    block_tables,  # [B, table_stride] int32
    worker_starts,  # [workers + 1] int32
    items,  # [items, 9] int32
    row_tokens,  # [rows] int32
    row_positions,
    row_slots,
    output,  # [T, H, D]
    partial_output,  # [slots, H, D] float32
    partial_weight,  # [slots, H] float32: log2 of the sum of the row's exponentials
    table_stride,
    scale,
    soft_cap,
    sliding_window,
    GROUP_SIZE: gl.constexpr,
    NUM_KV_HEADS: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    ROWS: gl.constexpr,
    KEYS: gl.constexpr,
    STAGES: gl.constexpr,  # tiles of keys and of values in shared memory
    HAS_WINDOW: gl.constexpr,
    HAS_SOFT_CAP: gl.constexpr,
    EARLY: gl.constexpr,
):
    gl.static_assert(gl.num_warps() == WARPS)
    dtype: gl.constexpr = query.dtype.element_ty
    tile_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KEYS, HEAD_DIM], dtype)
    k_tiles = gl.allocate_shared_memory(dtype, [STAGES, KEYS, HEAD_DIM], tile_layout)
    v_tiles = gl.allocate_shared_memory(dtype, [STAGES, KEYS, HEAD_DIM], tile_layout)
    query_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS // 2, HEAD_DIM], dtype)
    q_tiles = gl.allocate_shared_memory(dtype, [2, ROWS // 2, HEAD_DIM], query_layout)
    # A stage holds a tile of keys and the values of the tile before it. Of each: whether they are there, as all threads
    # that copy say, and whether both that compute have done with them.
    barrier_layout: gl.constexpr = mbarrier.MBarrierLayout()
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier_layout)
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier_layout)
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=32 * WARPS)
        mbarrier.init(free.index(stage), count=2)
    _wait_for_inputs(EARLY)

    shared = (k_tiles, v_tiles, ready, free)
    lists = (worker_starts, items, row_tokens, row_positions, row_slots)
    outputs = (output, partial_output, partial_weight)
    numbers = (scale, soft_cap, sliding_window)
    gl.warp_specialize(
        [
            (
                compute_items,
                (
                    0, q_tiles.index(0), shared, query, lists, outputs, numbers,
                    GROUP_SIZE, NUM_KV_HEADS, HEAD_DIM, ROWS // 2, KEYS, STAGES, HAS_WINDOW, HAS_SOFT_CAP,
                ),
            ),
            (
                compute_items,
                (
                    ROWS // 2, q_tiles.index(1), shared, query, lists, outputs, numbers,
                    GROUP_SIZE, NUM_KV_HEADS, HEAD_DIM, ROWS // 2, KEYS, STAGES, HAS_WINDOW, HAS_SOFT_CAP,
                ),
            ),
            (
                _copy_items,
                (
                    shared, key_cache, value_cache, block_tables, table_stride, worker_starts, items,
                    NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, KEYS, STAGES, HAS_WINDOW,
                ),
            ),
        ],
        [WARPS, WARPS],
        [COMPUTE_REGISTERS, COPY_REGISTERS],
    )  # fmt: skip


@gluon.jit
def _wait_for_inputs(EARLY: gl.constexpr):
    """As `dispatch.wait_for_inputs`, for the whole program: its other warpgroups begin where this one has waited."""
    if EARLY:
        gl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], gl.int32, is_pure=False, pack=1)
        gl.inline_asm_elementwise("griddepcontrol.launch_dependents; // $0", "=r", [], gl.int32, is_pure=False, pack=1)


@gluon.jit
def _copy_items(
    shared, key_cache, value_cache, block_tables, table_stride, worker_starts, items,
    NUM_KV_HEADS: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_SIZE: gl.constexpr, KEYS: gl.constexpr,
    STAGES: gl.constexpr, HAS_WINDOW: gl.constexpr,
):  # fmt: skip
    """The warpgroup that copies every tile of the program's items, zeros behind the last key."""
    k_tiles, v_tiles, ready, free = shared
    first_item, end_item, kv_head = work(worker_starts, NUM_KV_HEADS)
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    head_base = kv_head.to(gl.int64) * (BLOCK_SIZE * HEAD_DIM)
    places = gl.arange(0, KEYS, layout=gl.SliceLayout(1, layout))
    dims = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, layout))
    # Where a tile's keys lie in their blocks is the same for every tile, if a tile is whole blocks.
    within = places % BLOCK_SIZE if KEYS % BLOCK_SIZE == 0 else places
    keys_of_head = key_cache + head_base + (within * HEAD_DIM)[:, None] + dims[None, :]
    values_of_head = value_cache + head_base + (within * HEAD_DIM)[:, None] + dims[None, :]
    count = 0  # uses of stages so far
    for index in range(first_item, end_item):
        item = items + index * NUM_ITEM_COLUMNS
        table = block_tables + gl.load(item + 2).to(gl.int64) * table_stride
        key_start = gl.load(item + 3)
        full_start = gl.load(item + 4)
        full_end = gl.load(item + 5)
        key_end = gl.load(item + 6)
        num_tiles = (key_end - key_start + KEYS - 1) // KEYS
        start = tile_start(0, key_start, full_start, full_end, KEYS, HAS_WINDOW)
        blocks = _blocks(table, start, key_end, places, BLOCK_SIZE)
        # Other values than `start` and `blocks` have: what in the loop is given the very value that it had ahead of
        # the loop, Triton takes for something that never changes.
        start_before = start - KEYS
        blocks_before = blocks * 0
        for turn in range(0, num_tiles + 1):
            stage = count % STAGES
            mbarrier.wait(free.index(stage), (count // STAGES + 1) & 1)
            is_key = (start + places < key_end)[:, None]
            offsets = _offsets(blocks, start, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, KEYS)[:, None]
            copy_async(k_tiles.index(stage), keys_of_head + offsets, mask=is_key)
            # The first stage has no values.
            is_value = ((start_before + places < key_end) & (turn > 0))[:, None]
            offsets = _offsets(blocks_before, start_before, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, KEYS)[:, None]
            copy_async(v_tiles.index(stage), values_of_head + offsets, mask=is_value)
            async_copy.mbarrier_arrive(ready.index(stage), increment_count=False)
            start_before = start
            blocks_before = blocks
            start = tile_start(turn + 1, key_start, full_start, full_end, KEYS, HAS_WINDOW)
            blocks = _blocks(table, start, key_end, places, BLOCK_SIZE)
            count += 1


@gluon.jit
def _offsets(
    blocks, start, NUM_KV_HEADS: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_SIZE: gl.constexpr, KEYS: gl.constexpr
):
    """How far into the cache each key's block lies; of a block of several tiles, the tile."""
    offsets = blocks.to(gl.int64) * (NUM_KV_HEADS * BLOCK_SIZE * HEAD_DIM)
    if KEYS % BLOCK_SIZE != 0:
        offsets += start % BLOCK_SIZE * HEAD_DIM
    return offsets


@gluon.jit
def _blocks(table, start, key_end, places, BLOCK_SIZE: gl.constexpr):
    """The block of each key of a tile. What lies behind the last key in the table may be anything: it is not read."""
    return gl.load(table + (start + places) // BLOCK_SIZE, mask=start + places < key_end, other=0)
