"""The warpgroups of Hopper's attention that compute, and how each warpgroup walks a program's items and tiles."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from text_generation_kernels.attention_kernels import LOG2_E, NUM_ITEM_COLUMNS

WARPS: gl.constexpr = gl.constexpr(4)  # of a warpgroup


@gluon.jit
def work(worker_starts, NUM_KV_HEADS: gl.constexpr):
    """The program's first item, the one behind its last, and its key/value head."""
    # Neighbouring programs take the heads of the same blocks, which lie side by side in memory.
    worker = gl.program_id(0) // NUM_KV_HEADS
    return gl.load(worker_starts + worker), gl.load(worker_starts + worker + 1), gl.program_id(0) % NUM_KV_HEADS


@gluon.jit
def tile_start(turn, key_start, full_start, full_end, KEYS: gl.constexpr, HAS_WINDOW: gl.constexpr):
    """First key of the tile whose turn it is: those that all rows see come first. Only a window has others before."""
    start = key_start + turn * KEYS
    if HAS_WINDOW:
        in_full = full_start + turn * KEYS
        masked = start - (full_end - full_start)
        start = gl.where(in_full < full_end, in_full, gl.where(masked < full_start, masked, start))
    return start


@gluon.jit
def compute_items(
    FIRST_ROW: gl.constexpr, q, shared, query, lists, outputs, numbers,
    GROUP_SIZE: gl.constexpr, NUM_KV_HEADS: gl.constexpr, HEAD_DIM: gl.constexpr, ROWS: gl.constexpr,
    KEYS: gl.constexpr, STAGES: gl.constexpr, HAS_WINDOW: gl.constexpr, HAS_SOFT_CAP: gl.constexpr,
):  # fmt: skip
    """A warpgroup that computes ROWS of the rows of each item, from FIRST_ROW on."""
    k_tiles, v_tiles, ready, free = shared
    worker_starts, items, row_tokens, row_positions, row_slots = lists
    output, partial_output, partial_weight = outputs
    scale, soft_cap, sliding_window = numbers
    first_item, end_item, kv_head = work(worker_starts, NUM_KV_HEADS)
    dtype: gl.constexpr = query.dtype.element_ty
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, KEYS, 16])
    total_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, HEAD_DIM, 16])
    weight_layout: gl.constexpr = gl.DotOperandLayout(0, total_layout, 2)
    score_rows: gl.constexpr = gl.SliceLayout(1, score_layout)
    count = 0  # uses of stages so far
    for index in range(first_item, end_item):
        item = items + index * NUM_ITEM_COLUMNS
        first_row = gl.load(item)
        num_rows = gl.load(item + 1) * GROUP_SIZE
        key_start = gl.load(item + 3)
        full_start = gl.load(item + 4)
        full_end = gl.load(item + 5)
        key_end = gl.load(item + 6)
        piece = gl.load(item + 7)
        num_tiles = (key_end - key_start + KEYS - 1) // KEYS
        num_full = (full_end - full_start) // KEYS

        if num_rows > FIRST_ROW:
            q.store(
                _load_queries(
                    query, row_tokens, FIRST_ROW, num_rows, first_row, kv_head, GROUP_SIZE, NUM_KV_HEADS, HEAD_DIM, ROWS
                )
            )
            rows = FIRST_ROW + gl.arange(0, ROWS, layout=score_rows)
            positions = gl.load(row_positions + first_row + rows // GROUP_SIZE, mask=rows < num_rows, other=0)

            mbarrier.wait(ready.index(count % STAGES), (count // STAGES) & 1)
            fence_async_shared()
            scores = warpgroup_mma_wait(0, deps=(_scores(q, k_tiles.index(count % STAGES)),))
            start = tile_start(0, key_start, full_start, full_end, KEYS, HAS_WINDOW)
            top = gl.full([ROWS], -float("inf"), gl.float32, score_rows)
            weight = gl.zeros([ROWS], gl.float32, score_rows)
            exponentials, top, weight, _shrink = _softmax(
                scores, top, weight, positions, start, key_end, scale, soft_cap, sliding_window,
                True, HAS_WINDOW, HAS_SOFT_CAP,
            )  # fmt: skip
            weights = gl.convert_layout(exponentials, weight_layout).to(dtype)
            total = gl.zeros([ROWS, HEAD_DIM], gl.float32, total_layout)
            for turn in range(1, num_full):
                start = tile_start(turn, key_start, full_start, full_end, KEYS, HAS_WINDOW)
                total, weights, top, weight = _step(
                    count + turn, total, weights, top, weight, q, positions, start, key_end,
                    shared, scale, soft_cap, sliding_window, KEYS, STAGES, False, HAS_WINDOW, HAS_SOFT_CAP,
                )  # fmt: skip
            for turn in range(gl.maximum(num_full, 1), num_tiles):
                start = tile_start(turn, key_start, full_start, full_end, KEYS, HAS_WINDOW)
                total, weights, top, weight = _step(
                    count + turn, total, weights, top, weight, q, positions, start, key_end,
                    shared, scale, soft_cap, sliding_window, KEYS, STAGES, True, HAS_WINDOW, HAS_SOFT_CAP,
                )  # fmt: skip
            last = count + num_tiles
            mbarrier.wait(ready.index(last % STAGES), (last // STAGES) & 1)
            fence_async_shared()
            total = warpgroup_mma(weights, v_tiles.index(last % STAGES), total, is_async=True)
            total, weights = warpgroup_mma_wait(0, deps=(total, weights))
            mbarrier.arrive(free.index((last - 1) % STAGES))
            mbarrier.arrive(free.index(last % STAGES))

            _store(
                total, top, weight, FIRST_ROW, num_rows, first_row, piece, kv_head,
                row_tokens, row_slots, output, partial_output, partial_weight, GROUP_SIZE, NUM_KV_HEADS,
            )  # fmt: skip
        else:  # an item of few rows
            for use in range(count, count + num_tiles + 1):
                mbarrier.wait(ready.index(use % STAGES), (use // STAGES) & 1)
                mbarrier.arrive(free.index(use % STAGES))
        count += num_tiles + 1


@gluon.jit
def _step(
    use, total, weights, top, weight, q, positions, start, key_end, shared, scale, soft_cap, sliding_window,
    KEYS: gl.constexpr, STAGES: gl.constexpr, MASKED: gl.constexpr, HAS_WINDOW: gl.constexpr,
    HAS_SOFT_CAP: gl.constexpr,
):  # fmt: skip
    """The scores and exponentials of a tile, beside the product of those before it with their values."""
    k_tiles, v_tiles, ready, free = shared
    stage = use % STAGES
    mbarrier.wait(ready.index(stage), (use // STAGES) & 1)
    fence_async_shared()
    scores = _scores(q, k_tiles.index(stage))
    total = warpgroup_mma(weights, v_tiles.index(stage), total, is_async=True)
    scores = warpgroup_mma_wait(1, deps=(scores,))
    mbarrier.arrive(free.index((use - 1) % STAGES))
    exponentials, top, weight, shrink = _softmax(
        scores, top, weight, positions, start, key_end, scale, soft_cap, sliding_window,
        MASKED, HAS_WINDOW, HAS_SOFT_CAP,
    )  # fmt: skip
    next_weights = gl.convert_layout(exponentials, weights.type.layout).to(weights.dtype)
    # Among its dependencies, so that the exponentials are not put behind the wait.
    total, weights, next_weights = warpgroup_mma_wait(0, deps=(total, weights, next_weights))
    total = total * gl.convert_layout(shrink, gl.SliceLayout(1, total.type.layout))[:, None]
    return total, next_weights, top, weight


@gluon.jit
def _load_queries(
    query, row_tokens, FIRST_ROW: gl.constexpr, num_rows, first_row, kv_head,
    GROUP_SIZE: gl.constexpr, NUM_KV_HEADS: gl.constexpr, HEAD_DIM: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    """The queries of a warpgroup's rows of an item, zeros behind the last."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [WARPS, 1], [1, 0])
    rows = FIRST_ROW + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    dims = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, layout))
    is_row = rows < num_rows
    tokens = gl.load(row_tokens + first_row + rows // GROUP_SIZE, mask=is_row, other=0)
    heads = (tokens * NUM_KV_HEADS + kv_head) * GROUP_SIZE + rows % GROUP_SIZE
    return gl.load(query + (heads * HEAD_DIM)[:, None] + dims[None, :], mask=is_row[:, None], other=0.0)


@gluon.jit
def _store(
    total, top, weight, FIRST_ROW: gl.constexpr, num_rows, first_row, piece, kv_head,
    row_tokens, row_slots, output, partial_output, partial_weight,
    GROUP_SIZE: gl.constexpr, NUM_KV_HEADS: gl.constexpr,
):  # fmt: skip
    """Write a warpgroup's rows of an item: the whole result, or a piece's with its weight."""
    HEAD_DIM: gl.constexpr = total.shape[1]
    rows_layout: gl.constexpr = gl.SliceLayout(1, total.type.layout)
    # A row may see none of a piece's keys: its weight is then 0 and its result is left out of the merge.
    some = gl.where(weight > 0, weight, 1.0)
    total = total / gl.convert_layout(some, rows_layout)[:, None]
    rows = FIRST_ROW + gl.arange(0, total.shape[0], layout=rows_layout)
    dims = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, total.type.layout))
    is_row = rows < num_rows
    row = first_row + rows // GROUP_SIZE
    heads = kv_head * GROUP_SIZE + rows % GROUP_SIZE
    if piece < 0:
        tokens = gl.load(row_tokens + row, mask=is_row, other=0)
        where = (tokens * (NUM_KV_HEADS * GROUP_SIZE) + heads) * HEAD_DIM
        gl.store(output + where[:, None] + dims[None, :], total.to(output.dtype.element_ty), mask=is_row[:, None])
    else:
        slots = gl.load(row_slots + row, mask=is_row, other=0) + piece
        lanes = slots * (NUM_KV_HEADS * GROUP_SIZE) + heads
        gl.store(partial_output + (lanes * HEAD_DIM)[:, None] + dims[None, :], total, mask=is_row[:, None])
        log_weight = gl.where(weight > 0, top + gl.log2(some), -float("inf"))
        gl.store(partial_weight + lanes, gl.convert_layout(log_weight, rows_layout), mask=is_row)


@gluon.jit
def _scores(q, keys):
    """The product of a warpgroup's queries and a tile of keys, begun."""
    ROWS: gl.constexpr = q.shape[0]
    KEYS: gl.constexpr = keys.shape[0]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, KEYS, 16])
    nothing = gl.zeros([ROWS, KEYS], gl.float32, layout)
    return warpgroup_mma(q, keys.permute((1, 0)), nothing, use_acc=False, is_async=True)


@gluon.jit
def _softmax(
    scores, top, weight, positions, start, key_end, scale, soft_cap, sliding_window,
    MASKED: gl.constexpr, HAS_WINDOW: gl.constexpr, HAS_SOFT_CAP: gl.constexpr,
):  # fmt: skip
    """One tile's exponentials relative to each row's highest score so far, in powers of two."""
    ROWS: gl.constexpr = scores.shape[0]
    KEYS: gl.constexpr = scores.shape[1]
    rows: gl.constexpr = top.type.layout
    if HAS_SOFT_CAP:
        scores = soft_cap * (1.0 - 2.0 / (gl.exp2(scores * (scale / soft_cap * 2.0 * LOG2_E)) + 1.0))
        factor = LOG2_E
    else:
        factor = scale * LOG2_E
    if MASKED:
        keys = start + gl.arange(0, KEYS, layout=gl.SliceLayout(0, scores.type.layout))
        is_seen = keys[None, :] <= gl.minimum(positions, key_end - 1)[:, None]
        if HAS_WINDOW:
            is_seen = is_seen & (keys[None, :] > (positions - sliding_window)[:, None])
        scores = gl.where(is_seen, scores, -float("inf"))
    # Halves first: within a thread a reduction is one long chain.
    left, right = gl.split(gl.reshape(scores, [ROWS, KEYS // 2, 2]))
    highest = gl.convert_layout(gl.max(gl.maximum(left, right), 1), rows)
    new_top = gl.maximum(top, highest * factor)
    # A row that has seen no key yet: any finite number does, its exponentials are 0.
    base = gl.where(new_top == -float("inf"), 0.0, new_top)
    exponentials = gl.exp2(scores * factor - base[:, None])
    shrink = gl.exp2(top - base)
    left, right = gl.split(gl.reshape(exponentials, [ROWS, KEYS // 2, 2]))
    weight = weight * shrink + gl.convert_layout(gl.sum(left + right, 1), rows)
    return exponentials, new_top, weight, shrink
