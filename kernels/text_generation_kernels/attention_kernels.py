"""Triton kernels of paged attention: one that computes items of the work list, one that merges partial results.

The same item kernel serves as "narrow" (few rows: bound by reading keys and values) and "wide" (many rows: bound by the
matrix unit). Rows are tokens times the query heads of one key/value head, so keys and values are read once per group.
"""

import triton
import triton.language as tl

from text_generation_kernels import attention_layout
from text_generation_kernels.dispatch import start_next, wait_for_inputs, wait_for_others

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
NUM_ITEM_COLUMNS: tl.constexpr = tl.constexpr(attention_layout.NUM_ITEM_COLUMNS)
NUM_MERGE_COLUMNS: tl.constexpr = tl.constexpr(attention_layout.NUM_MERGE_COLUMNS)
FEW_PIECES: tl.constexpr = tl.constexpr(attention_layout.FEW_PIECES)


@triton.jit(do_not_specialize=["table_stride", "sliding_window"])
def attention_items_kernel(
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
    arrivals,  # [rows, KVH] int32, zeros: how many of a unit's pieces are there, at its first row
    table_stride,
    scale,
    soft_cap,
    sliding_window,
    GROUP_SIZE: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    MERGED_SLOTS: tl.constexpr,  # partial results that are read at a time where more than FEW_PIECES are merged
    IS_WIDE: tl.constexpr,  # walk the tiles that every row sees without a mask, and leave merging to another kernel
    WIDEN: tl.constexpr,  # products in float32: Triton's interpreter multiplies the bit patterns of bfloat16
    BESIDE: tl.constexpr,  # runs beside the kernel ahead: reads the same inputs, writes other results
    EARLY: tl.constexpr,
):
    if BESIDE:
        start_next(EARLY)
    else:
        wait_for_inputs(EARLY)
    # Neighbouring programs take the heads of the same blocks, which lie side by side in memory.
    worker = tl.program_id(0) // NUM_KV_HEADS
    kv_head = tl.program_id(0) % NUM_KV_HEADS
    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, PADDED_DIM)
    is_dim = dims < HEAD_DIM
    heads = kv_head * GROUP_SIZE + rows % GROUP_SIZE
    head_base = kv_head.to(tl.int64) * (BLOCK_SIZE * HEAD_DIM)
    keys_of_head = key_cache + head_base
    values_of_head = value_cache + head_base
    last_item = tl.load(worker_starts + worker + 1)
    for index in range(tl.load(worker_starts + worker), last_item):
        item = items + index * NUM_ITEM_COLUMNS
        first_row = tl.load(item)
        num_tokens = tl.load(item + 1)
        is_row = rows < num_tokens * GROUP_SIZE
        table = block_tables + tl.load(item + 2).to(tl.int64) * table_stride
        key_start = tl.load(item + 3)
        full_start = tl.load(item + 4)
        full_end = tl.load(item + 5)
        key_end = tl.load(item + 6)
        piece = tl.load(item + 7)
        first_slot = tl.load(row_slots + first_row)  # for merging, where it would be waited for
        row = first_row + rows // GROUP_SIZE
        tokens = tl.load(row_tokens + row, mask=is_row, other=0)
        positions = tl.load(row_positions + row, mask=is_row, other=0)
        where = (tokens * (NUM_KV_HEADS * GROUP_SIZE) + heads) * HEAD_DIM
        is_element = is_row[:, None] & is_dim[None, :]
        q = tl.load(query + where[:, None] + dims[None, :], mask=is_element, other=0.0)

        total = tl.zeros([ROWS, PADDED_DIM], dtype=tl.float32)
        top = tl.full([ROWS], -float("inf"), dtype=tl.float32)
        weight = tl.zeros([ROWS], dtype=tl.float32)
        if IS_WIDE:
            for start in range(full_start, full_end, KEYS):
                total, top, weight = _attend(
                    total, top, weight, q, keys_of_head, values_of_head, table, positions, dims, is_dim,
                    tl.multiple_of(start, BLOCK_SIZE if BLOCK_SIZE < 16 else 16), key_end,
                    scale, soft_cap, sliding_window,
                    NUM_KV_HEADS, HEAD_DIM, PADDED_DIM, BLOCK_SIZE, KEYS, False, HAS_WINDOW, HAS_SOFT_CAP, WIDEN,
                )  # fmt: skip
        else:
            full_start = key_start
            full_end = key_start
        # The masked tiles left of the full ones, then those to their right.
        num_left = (full_start - key_start) // KEYS
        num_masked = num_left + (key_end - full_end + KEYS - 1) // KEYS
        for turn in range(0, num_masked):
            start = tl.where(turn < num_left, key_start + turn * KEYS, full_end + (turn - num_left) * KEYS)
            total, top, weight = _attend(
                total, top, weight, q, keys_of_head, values_of_head, table, positions, dims, is_dim,
                tl.multiple_of(start, BLOCK_SIZE if BLOCK_SIZE < 16 else 16), key_end,
                scale, soft_cap, sliding_window,
                NUM_KV_HEADS, HEAD_DIM, PADDED_DIM, BLOCK_SIZE, KEYS, True, HAS_WINDOW, HAS_SOFT_CAP, WIDEN,
            )  # fmt: skip

        # A row may see none of a piece's keys: its weight is then 0 and its result is left out of the merge.
        total = total / tl.where(weight > 0, weight, 1.0)[:, None]
        if piece < 0:
            result = total.to(output.dtype.element_ty)
            tl.store(output + where[:, None] + dims[None, :], result, mask=is_element)
        else:
            slots = tl.load(row_slots + row, mask=is_row, other=0) + piece
            lanes = slots * (NUM_KV_HEADS * GROUP_SIZE) + heads
            tl.store(partial_output + lanes[:, None] * HEAD_DIM + dims[None, :], total, mask=is_element)
            log_weight = tl.where(weight > 0, top + tl.log2(tl.where(weight > 0, weight, 1.0)), -float("inf"))
            tl.store(partial_weight + lanes, log_weight, mask=is_row)
            if not IS_WIDE:
                # The last piece of a unit to arrive merges them, where the item says so.
                num_pieces = tl.load(item + 8)
                if num_pieces > 0:
                    arrival = arrivals + first_row * NUM_KV_HEADS + kv_head
                    # All threads have stored before one of them counts; the last piece sees what the others stored.
                    tl.debug_barrier()
                    if tl.atomic_add(arrival, 1, sem="acq_rel") == num_pieces - 1:
                        tl.store(arrival, 0)
                        # Without a shared prefix a row's number is its token's, and slots are num_pieces apart.
                        for member in range(0, num_tokens):
                            token, slot = first_row + member, first_slot + member * num_pieces
                            if MERGED_SLOTS <= FEW_PIECES or num_pieces <= FEW_PIECES:
                                _merge_partials(
                                    partial_output, partial_weight, output, token, slot, num_pieces,
                                    kv_head * GROUP_SIZE, GROUP_SIZE, NUM_KV_HEADS * GROUP_SIZE, HEAD_DIM, PADDED_DIM,
                                    FEW_PIECES,
                                )  # fmt: skip
                            else:
                                _merge_partials(
                                    partial_output, partial_weight, output, token, slot, num_pieces,
                                    kv_head * GROUP_SIZE, GROUP_SIZE, NUM_KV_HEADS * GROUP_SIZE, HEAD_DIM, PADDED_DIM,
                                    MERGED_SLOTS,
                                )  # fmt: skip
    if BESIDE:
        wait_for_others(EARLY)


@triton.jit
def _merge_partials(
    partial_output, partial_weight, output, token, first_slot, num_slots, first_head,
    GROUP_SIZE: tl.constexpr, NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
    SLOTS: tl.constexpr,  # read at a time, all asked for before one is waited for
):  # fmt: skip
    """Some heads of a token: the mean of their partial results by their weights, always in the order of the slots."""
    members, dims = tl.arange(0, triton.next_power_of_2(GROUP_SIZE)), tl.arange(0, PADDED_DIM)
    is_head, is_dim = members < GROUP_SIZE, dims < HEAD_DIM
    heads = first_head + members
    total = tl.zeros([members.shape[0], PADDED_DIM], dtype=tl.float32)
    top = tl.full([members.shape[0]], -float("inf"), dtype=tl.float32)
    weight = tl.zeros([members.shape[0]], dtype=tl.float32)
    for start in range(0, num_slots, SLOTS):
        slots = start + tl.arange(0, SLOTS)
        # Heads first: Triton then gives four of them to four warps, and each thread adds up slots by itself.
        is_lane = is_head[:, None] & (slots < num_slots)[None, :]
        lanes = heads[:, None] + (first_slot + slots)[None, :] * NUM_HEADS
        # Past the first-level cache: other multiprocessors wrote them.
        log_weights = tl.load(partial_weight + lanes, mask=is_lane, other=-float("inf"), cache_modifier=".cg")
        elements = lanes[:, :, None] * HEAD_DIM + dims[None, None, :]
        is_element = is_lane[:, :, None] & is_dim[None, None, :]
        parts = tl.load(partial_output + elements, mask=is_element, other=0.0, cache_modifier=".cg")
        new_top = tl.maximum(top, tl.max(log_weights, 1))
        base = tl.where(new_top == -float("inf"), 0.0, new_top)
        weights = tl.exp2(log_weights - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink[:, None] + tl.sum(parts * weights[:, :, None], 1)
        weight = weight * shrink + tl.sum(weights, 1)
        top = new_top
    # Every token sees at least itself, so the weights of a head do not all vanish.
    result = total / tl.where(is_head, weight, 1.0)[:, None]
    where = (token * NUM_HEADS + heads)[:, None] * HEAD_DIM + dims[None, :]
    tl.store(output + where, result.to(output.dtype.element_ty), mask=is_head[:, None] & is_dim[None, :])


@triton.jit
def _attend(
    total, top, weight, q, keys_of_head, values_of_head, table, positions, dims, is_dim, start, key_end,
    scale, soft_cap, sliding_window,
    NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    KEYS: tl.constexpr, MASKED: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFT_CAP: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """One tile of keys: exponentials relative to each row's highest score so far, in powers of two."""
    places = tl.arange(0, KEYS)
    positions_of_keys = start + places
    blocks = table + start // BLOCK_SIZE
    if KEYS % BLOCK_SIZE == 0:  # a tile is whole blocks: where its keys lie in them is the same for every tile
        blocks += places // BLOCK_SIZE
        places %= BLOCK_SIZE
    else:  # or part of one
        blocks += tl.zeros_like(places)
        places += start % BLOCK_SIZE
    if MASKED:
        # What lies behind the last key, in the table and in the blocks, may be anything: it is not read.
        is_key = positions_of_keys < key_end
        block = tl.load(blocks, mask=is_key, other=0)
        is_element = is_key[:, None] & is_dim[None, :]
    else:
        block = tl.load(blocks)
        is_element = is_dim[None, :]
    starts = block.to(tl.int64) * (NUM_KV_HEADS * BLOCK_SIZE * HEAD_DIM)
    elements = (places[:, None] * HEAD_DIM + dims[None, :]) + starts[:, None]
    if MASKED or PADDED_DIM != HEAD_DIM:
        k = tl.load(keys_of_head + elements, mask=is_element, other=0.0)
    else:
        k = tl.load(keys_of_head + elements)
    if WIDEN:
        scores = tl.dot(q.to(tl.float32), tl.trans(k.to(tl.float32)), input_precision="ieee")
    else:
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if HAS_SOFT_CAP:
        scores = soft_cap * (1.0 - 2.0 / (tl.exp2(scores * (scale / soft_cap * 2.0 * LOG2_E)) + 1.0))
        factor = LOG2_E
    else:
        factor = scale * LOG2_E
    if MASKED:
        is_seen = is_key[None, :] & (positions_of_keys[None, :] <= positions[:, None])
        if HAS_WINDOW:
            is_seen = is_seen & (positions_of_keys[None, :] > positions[:, None] - sliding_window)
        scores = tl.where(is_seen, scores, -float("inf"))
    new_top = tl.maximum(top, tl.max(scores, 1) * factor)
    # A row that has seen no key yet: any finite number does, its exponentials are 0.
    base = tl.where(new_top == -float("inf"), 0.0, new_top) if MASKED else new_top
    exponentials = tl.exp2(scores * factor - base[:, None])
    shrink = tl.exp2(top - base)
    weight = weight * shrink + tl.sum(exponentials, 1)
    total = total * shrink[:, None]
    if MASKED or PADDED_DIM != HEAD_DIM:
        v = tl.load(values_of_head + elements, mask=is_element, other=0.0)
    else:
        v = tl.load(values_of_head + elements)
    rounded = exponentials.to(v.dtype)
    if WIDEN:
        total = tl.dot(rounded.to(tl.float32), v.to(tl.float32), total, input_precision="ieee")
    else:
        total = tl.dot(rounded, v, total, input_precision="ieee")
    return total, new_top, weight


@triton.jit
def merge_partials_kernel(
    num_merged,  # [1] int32
    merged,  # [tokens, 4] int32
    partial_output,  # [slots, H, D] float32
    partial_weight,  # [slots, H] float32
    output,  # [T, H, D]
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    SLOTS: tl.constexpr,  # slots read in one loop turn
    EARLY: tl.constexpr,
):
    """Each head of each listed token: the mean of its partial results by their weights, in the order of the slots."""
    wait_for_inputs(EARLY)
    for index in range(tl.program_id(0), tl.load(num_merged) * NUM_HEADS, tl.num_programs(0)):
        entry = merged + index // NUM_HEADS * NUM_MERGE_COLUMNS
        token, first_slot, num_slots = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
        _merge_partials(
            partial_output, partial_weight, output, token.to(tl.int64), first_slot.to(tl.int64), num_slots,
            index % NUM_HEADS, 1, NUM_HEADS, HEAD_DIM, PADDED_DIM, SLOTS,
        )  # fmt: skip
