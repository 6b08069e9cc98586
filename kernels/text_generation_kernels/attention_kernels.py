"""Triton kernels of paged attention: one that computes items of the work list, one that merges partial results.

The same item kernel serves as "narrow" (few rows: bound by reading keys and values) and "wide" (many rows: bound by the
matrix unit). Rows are tokens times the query heads of one key/value head, so keys and values are read once per group.
"""

import triton
import triton.language as tl

from text_generation_kernels.dispatch import start_next, wait_for_inputs, wait_for_others

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
NUM_ITEM_COLUMNS: tl.constexpr = tl.constexpr(9)
NUM_MERGE_COLUMNS: tl.constexpr = tl.constexpr(4)


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
        is_row = rows < tl.load(item + 1) * GROUP_SIZE
        table = block_tables + tl.load(item + 2).to(tl.int64) * table_stride
        key_start = tl.load(item + 3)
        full_start = tl.load(item + 4)
        full_end = tl.load(item + 5)
        key_end = tl.load(item + 6)
        piece = tl.load(item + 7)
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
            first_lanes = tl.load(row_slots + row, mask=is_row, other=0) * (NUM_KV_HEADS * GROUP_SIZE) + heads
            lanes = first_lanes + piece * (NUM_KV_HEADS * GROUP_SIZE)
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
                        result = _merge_pieces(
                            partial_output, partial_weight, first_lanes, num_pieces, is_row, is_element, dims,
                            NUM_KV_HEADS * GROUP_SIZE, HEAD_DIM, ROWS, PADDED_DIM,
                        )  # fmt: skip
                        tl.store(
                            output + where[:, None] + dims[None, :], result.to(output.dtype.element_ty), mask=is_element
                        )
    if BESIDE:
        wait_for_others(EARLY)


@triton.jit
def _merge_pieces(
    partial_output, partial_weight, first_lanes, num_pieces, is_row, is_element, dims,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, PADDED_DIM: tl.constexpr,
):  # fmt: skip
    """The mean of a unit's partial results by their weights, in the order of the pieces, past the first-level cache."""
    total = tl.zeros([ROWS, PADDED_DIM], dtype=tl.float32)
    top = tl.full([ROWS], -float("inf"), dtype=tl.float32)
    weight = tl.zeros([ROWS], dtype=tl.float32)
    # Four at a time, all asked for before one is waited for.
    for start in range(0, num_pieces, 4):
        weights_0, parts_0 = _load_piece(
            partial_output,
            partial_weight,
            first_lanes,
            start,
            num_pieces,
            is_row,
            is_element,
            dims,
            NUM_HEADS,
            HEAD_DIM,
        )
        weights_1, parts_1 = _load_piece(
            partial_output, partial_weight, first_lanes, start + 1, num_pieces, is_row, is_element, dims, NUM_HEADS,
            HEAD_DIM,
        )  # fmt: skip
        weights_2, parts_2 = _load_piece(
            partial_output, partial_weight, first_lanes, start + 2, num_pieces, is_row, is_element, dims, NUM_HEADS,
            HEAD_DIM,
        )  # fmt: skip
        weights_3, parts_3 = _load_piece(
            partial_output, partial_weight, first_lanes, start + 3, num_pieces, is_row, is_element, dims, NUM_HEADS,
            HEAD_DIM,
        )  # fmt: skip
        highest = tl.maximum(tl.maximum(weights_0, weights_1), tl.maximum(weights_2, weights_3))
        new_top = tl.maximum(top, highest)
        base = tl.where(new_top == -float("inf"), 0.0, new_top)
        shrink = tl.exp2(top - base)
        weights_0, weights_1 = tl.exp2(weights_0 - base), tl.exp2(weights_1 - base)
        weights_2, weights_3 = tl.exp2(weights_2 - base), tl.exp2(weights_3 - base)
        total = total * shrink[:, None] + parts_0 * weights_0[:, None]
        total += parts_1 * weights_1[:, None]
        total += parts_2 * weights_2[:, None]
        total += parts_3 * weights_3[:, None]
        weight = weight * shrink + weights_0 + weights_1 + weights_2 + weights_3
        top = new_top
    # Every row sees at least its own key; padded rows are not stored.
    return total / tl.where(weight > 0, weight, 1.0)[:, None]


@triton.jit
def _load_piece(
    partial_output, partial_weight, first_lanes, piece, num_pieces, is_row, is_element, dims,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """A piece's log2 of weights and its result; one that the unit does not have weighs nothing."""
    lanes = first_lanes + tl.minimum(piece, num_pieces - 1) * NUM_HEADS
    weights = tl.load(partial_weight + lanes, mask=is_row, other=-float("inf"), cache_modifier=".cg")
    places = lanes[:, None] * HEAD_DIM + dims[None, :]
    parts = tl.load(partial_output + places, mask=is_element, other=0.0, cache_modifier=".cg")
    return tl.where(piece < num_pieces, weights, -float("inf")), parts


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
    dims = tl.arange(0, PADDED_DIM)
    is_dim = dims < HEAD_DIM
    for index in range(tl.program_id(0), tl.load(num_merged) * NUM_HEADS, tl.num_programs(0)):
        entry = merged + index // NUM_HEADS * NUM_MERGE_COLUMNS
        head = index % NUM_HEADS
        token = tl.load(entry).to(tl.int64)
        first_slot = tl.load(entry + 1).to(tl.int64)
        num_slots = tl.load(entry + 2)
        total = tl.zeros([PADDED_DIM], dtype=tl.float32)
        top = tl.full([], -float("inf"), dtype=tl.float32)
        weight = tl.zeros([], dtype=tl.float32)
        for start in range(0, num_slots, SLOTS):
            slots = start + tl.arange(0, SLOTS)
            is_slot = slots < num_slots
            lanes = (first_slot + slots) * NUM_HEADS + head
            log_weights = tl.load(partial_weight + lanes, mask=is_slot, other=-float("inf"))
            is_element = is_slot[:, None] & is_dim[None, :]
            parts = tl.load(partial_output + lanes[:, None] * HEAD_DIM + dims[None, :], mask=is_element, other=0.0)
            new_top = tl.maximum(top, tl.max(log_weights, 0))
            base = tl.where(new_top == -float("inf"), 0.0, new_top)
            weights = tl.exp2(log_weights - base)
            shrink = tl.exp2(top - base)
            total = total * shrink + tl.sum(parts * weights[:, None], 0)
            weight = weight * shrink + tl.sum(weights, 0)
            top = new_top
        # Every token sees at least itself, so the weights do not all vanish.
        where = (token * NUM_HEADS + head) * HEAD_DIM + dims
        tl.store(output + where, (total / weight).to(output.dtype.element_ty), mask=is_dim)
