"""Plans the attention of one step: cuts it into items of equal cost for a fixed number of workers.

Runs on the host from lengths the host knows (a decoding sequence grows by one), so a step can be planned before the
one ahead of it has ended. Numpy alone: no tensors, no device. What the arrays mean is in `attention_layout`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from text_generation_kernels.attention_layout import MAX_NARROW_QUERY, AttentionLayout, Tile
from text_generation_kernels.shared_prefix import SharedPrefix


@dataclass(frozen=True)
class _Units:
    """Tokens of one sequence (or, with a shared prefix, of several) and the keys they attend to; one entry each."""

    is_wide: np.ndarray
    first_row: np.ndarray
    num_rows: np.ndarray
    table: np.ndarray
    key_start: np.ndarray
    full_start: np.ndarray
    full_end: np.ndarray
    key_end: np.ndarray


@dataclass(frozen=True)
class _Cut:
    """The items of one kernel, in the order of its workers."""

    unit: np.ndarray  # [items]
    piece: np.ndarray  # [items] number of the item within its unit
    first_tile: np.ndarray  # [items] counted from the unit's first key
    end_tile: np.ndarray  # [items]
    worker_starts: np.ndarray  # [workers + 1] first item of each worker


def plan_attention(
    layout: AttentionLayout,
    buffer: np.ndarray,  # [layout.size] int32, overwritten
    query_starts: np.ndarray,  # [B + 1]: first token of each sequence, then the number of tokens
    sequence_lengths: np.ndarray,  # [B]: keys of each sequence, this step's tokens included
    sliding_window: int | None = None,
    shared_prefixes: Sequence[SharedPrefix] = (),
    table_rows: np.ndarray | None = None,  # [B] each sequence's row of the block tables; by default its own number
) -> None:
    """Write the items, rows and merges of a step into `buffer`.

    Shared prefixes are left unused with a sliding window, which seldom reaches back to them. Tokens after the last
    query start (the padding of a graph) get no item, and their output is not written.
    """
    starts, lengths = query_starts.astype(np.int64), sequence_lengths.astype(np.int64)
    query_lengths = starts[1:] - starts[:-1]
    groups = [] if sliding_window is not None else list(shared_prefixes)
    _check(layout, buffer, starts, query_lengths, lengths, groups)
    own = _own_units(layout, starts, query_lengths, lengths, sliding_window, groups)
    tokens = np.arange(starts[-1])
    positions = tokens + (lengths - starts[1:]).repeat(query_lengths)
    units, group_tokens = _with_groups(layout, own, starts, len(tokens), groups)
    pieces = np.zeros(len(units.table), dtype=np.int64)
    cuts: list[tuple[str, Tile, np.ndarray, _Cut]] = []
    for name, tile, is_kind in (("narrow", layout.narrow, ~units.is_wide), ("wide", layout.wide, units.is_wide)):
        chosen = is_kind.nonzero()[0]
        layout.view(buffer, f"{name}_starts")[:] = 0
        if tile is not None and len(chosen) > 0:
            num_tiles = -(-(units.key_end - units.key_start)[chosen] // tile.keys)
            cut = _cut(num_tiles, tile) if name == "narrow" else _deal(num_tiles, tile)
            pieces[chosen] = np.bincount(cut.unit, minlength=len(chosen))
            cuts.append((name, tile, chosen, cut))
    is_split, is_merged_in_place = _write_rows(layout, buffer, units, pieces, tokens, positions, group_tokens)
    num_pieces = np.where(is_merged_in_place, pieces, 0)
    tables = units.table if table_rows is None else table_rows[units.table]
    for name, tile, chosen, cut in cuts:
        _write_items(layout, buffer, name, tile, units, tables, chosen, cut, is_split, num_pieces)
        layout.view(buffer, f"{name}_starts")[:] = cut.worker_starts


def _check(
    layout: AttentionLayout,
    buffer: np.ndarray,
    starts: np.ndarray,
    query_lengths: np.ndarray,
    lengths: np.ndarray,
    groups: list[SharedPrefix],
) -> None:
    assert buffer.shape == (layout.size,)
    assert buffer.dtype == np.int32
    assert starts.shape == (len(lengths) + 1,)
    assert starts[0] == 0
    assert len(lengths) <= layout.max_sequences
    assert starts[-1] <= layout.max_tokens
    assert (query_lengths >= 0).all()
    assert (query_lengths <= lengths).all(), "a sequence's newest tokens are among its keys"
    if layout.wide is None:
        assert (query_lengths <= MAX_NARROW_QUERY).all(), "prompts need the wide kernel"
        assert not groups, "shared prefixes need the layout with the wide kernel, and the merge that follows"
    for group in groups:
        assert group.length % layout.block_size == 0
        assert (query_lengths[group.sequences] == 1).all()
        assert (lengths[group.sequences] > group.length).all()


def _own_units(
    layout: AttentionLayout,
    starts: np.ndarray,
    query_lengths: np.ndarray,
    lengths: np.ndarray,
    sliding_window: int | None,
    groups: list[SharedPrefix],
) -> _Units:
    """Each sequence's tokens, a tile's worth at a time, in token order."""
    skipped = np.zeros(len(lengths), dtype=np.int64)
    for group in groups:
        skipped[group.sequences] = group.length
    is_wide = query_lengths > MAX_NARROW_QUERY
    tile_tokens = np.where(is_wide, max(layout.wide_tokens, 1), layout.narrow_tokens)
    num_units = -(-query_lengths // tile_tokens)
    table = np.arange(len(lengths)).repeat(num_units)
    offset = (np.arange(len(table)) - _exclusive_sum(num_units)[table]) * tile_tokens[table]
    num_rows = np.minimum(tile_tokens[table], query_lengths[table] - offset)
    first = (lengths - query_lengths)[table] + offset  # position of the unit's first token
    key_start, seen_by_all = skipped[table], skipped[table]
    if sliding_window is not None:
        reach = np.maximum(first - sliding_window + 1, 0)
        key_start = reach // layout.block_size * layout.block_size
        seen_by_all = np.maximum(first + num_rows - sliding_window, key_start)
    keys = np.where(is_wide, 0 if layout.wide is None else layout.wide.keys, layout.narrow.keys)[table]
    full_start = key_start + -(-(seen_by_all - key_start) // keys) * keys
    full_end = key_start + (first + 1 - key_start) // keys * keys
    key_end = first + num_rows
    return _Units(is_wide[table], starts[table] + offset, num_rows, table, key_start, full_start, full_end, key_end)


def _with_groups(
    layout: AttentionLayout, own: _Units, starts: np.ndarray, num_tokens: int, groups: list[SharedPrefix]
) -> tuple[_Units, np.ndarray]:
    """The own units and those of shared prefixes, whose rows follow the step's tokens; the tokens of these rows."""
    if not groups:
        return own, np.zeros(0, dtype=np.int64)
    columns: list[tuple[int, ...]] = []
    first_row = num_tokens
    for group in groups:
        is_wide = layout.wide is not None and len(group.sequences) > layout.narrow_tokens
        tile = layout.wide if is_wide and layout.wide is not None else layout.narrow
        tile_tokens = tile.rows // layout.group_size
        full_end = group.length // tile.keys * tile.keys
        for offset in range(0, len(group.sequences), tile_tokens):
            num_rows = min(tile_tokens, len(group.sequences) - offset)
            table = int(group.sequences[0])
            columns.append((is_wide, first_row, num_rows, table, 0, 0, full_end, group.length))
            first_row += num_rows
    is_wide, *rest = np.array(columns, dtype=np.int64).T
    tokens = starts[np.concatenate([group.sequences for group in groups])]
    assert len(np.unique(tokens)) == len(tokens), "a sequence is in one group at most"
    joined = [np.concatenate(pair) for pair in zip(_columns(own), [is_wide.astype(bool), *rest], strict=True)]
    return _Units(*joined), tokens


def _columns(units: _Units) -> list[np.ndarray]:
    return [
        units.is_wide, units.first_row, units.num_rows, units.table,
        units.key_start, units.full_start, units.full_end, units.key_end,
    ]  # fmt: skip


def _cut(num_tiles: np.ndarray, tile: Tile) -> _Cut:
    """Give each worker an equal stretch of all tiles laid end to end, or, with little to do, one piece of a unit.

    Right where time is that of reading the keys: merging what was cut costs little beside it.
    """
    total, workers = int(num_tiles.sum()), tile.num_workers
    share = -(-total // workers)
    if share < tile.min_key_tiles:
        pieces = -(-num_tiles // tile.min_key_tiles)
        if pieces.sum() <= workers:
            unit, piece, first, end = _even_pieces(num_tiles, pieces)
            return _Cut(unit, piece, first, end, np.minimum(np.arange(workers + 1), len(unit)))
    starts = _exclusive_sum(num_tiles)
    places = np.concatenate((starts, np.arange(0, total, share), (total,)))
    places.sort()
    cuts = places[:-1][places[:-1] < places[1:]]  # each place once
    unit = starts.searchsorted(cuts, side="right") - 1
    ends = np.concatenate((cuts[1:], (total,)))
    worker_starts = cuts.searchsorted(np.arange(workers + 1) * share)
    piece = np.arange(len(unit)) - unit.searchsorted(unit)
    return _Cut(unit, piece, cuts - starts[unit], ends - starts[unit], worker_starts)


def _deal(num_tiles: np.ndarray, tile: Tile) -> _Cut:
    """Deal whole units out to the workers, the longest first and to and fro, so that all get about the same.

    Only a unit well beyond a worker's share is cut, for partial results of many rows are as large as keys and values.
    """
    workers = tile.num_workers
    longest = max(tile.min_key_tiles, -(-int(num_tiles.sum()) * 5 // (4 * workers)))
    unit, piece, first, end = _even_pieces(num_tiles, -(-num_tiles // longest))
    order = np.argsort(first - end, kind="stable")
    turn = np.arange(len(order))
    place = turn % workers
    worker = np.where(turn // workers % 2 == 0, place, workers - 1 - place)
    order = order[np.argsort(worker, kind="stable")]
    worker_starts = np.concatenate(([0], np.cumsum(np.bincount(worker, minlength=workers))))
    return _Cut(unit[order], piece[order], first[order], end[order], worker_starts)


def _even_pieces(num_tiles: np.ndarray, pieces: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Each unit in so many pieces of about the same length: unit, number within it, first tile, end tile."""
    unit = np.arange(len(num_tiles)).repeat(pieces)
    piece = np.arange(len(unit)) - _exclusive_sum(pieces)[unit]
    first = piece * num_tiles[unit] // pieces[unit]
    end = (piece + 1) * num_tiles[unit] // pieces[unit]
    return unit, piece, first, end


def _write_rows(
    layout: AttentionLayout,
    buffer: np.ndarray,
    units: _Units,
    pieces: np.ndarray,
    tokens: np.ndarray,
    positions: np.ndarray,
    group_tokens: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Rows and merges; returns which units write partial results, and which of them the narrow kernel merges itself.

    A token's partial results lie side by side: those of its own unit, then those of its shared prefix. Those of narrow
    units whose tokens share no prefix are in no list of merges.
    """
    row_pieces = pieces.repeat(units.num_rows)  # rows lie in the order of the units
    own_pieces = row_pieces[: len(tokens)]
    num_slots = own_pieces.copy()
    num_slots[group_tokens] += row_pieces[len(tokens) :]
    num_slots[num_slots == 1] = 0
    slots = _exclusive_sum(num_slots)
    assert num_slots.sum() <= layout.max_partials
    row_tokens = np.concatenate((tokens, group_tokens))
    num_rows = len(row_tokens)
    layout.view(buffer, "row_tokens")[:num_rows] = row_tokens
    layout.view(buffer, "row_positions")[:num_rows] = positions[row_tokens]
    row_slots = layout.view(buffer, "row_slots")
    row_slots[: len(tokens)] = slots
    row_slots[len(tokens) : num_rows] = slots[group_tokens] + own_pieces[group_tokens]
    has_group = np.zeros(len(tokens), dtype=bool)
    has_group[group_tokens] = True
    first_tokens = row_tokens[units.first_row]
    is_split = num_slots[first_tokens] > 0
    is_merged_in_place = is_split & ~units.is_wide & ~has_group[first_tokens]
    # Own units come first, in token order.
    merged = ((num_slots > 0) & ~is_merged_in_place.repeat(units.num_rows)[: len(tokens)]).nonzero()[0]
    layout.view(buffer, "num_merged")[0] = len(merged)
    table = layout.view(buffer, "merged")
    table[: len(merged), 0] = merged
    table[: len(merged), 1] = slots[merged]
    table[: len(merged), 2] = num_slots[merged]
    return is_split, is_merged_in_place


def _write_items(
    layout: AttentionLayout,
    buffer: np.ndarray,
    name: str,
    tile: Tile,
    units: _Units,
    tables: np.ndarray,  # row of the block tables of every unit
    chosen: np.ndarray,  # the units of this kernel
    cut: _Cut,
    is_split: np.ndarray,  # of every unit
    num_pieces: np.ndarray,  # of every unit, 0 where a kernel that follows merges them
) -> None:
    unit = chosen[cut.unit]
    key_start = units.key_start[unit] + cut.first_tile * tile.keys
    key_end = np.minimum(units.key_start[unit] + cut.end_tile * tile.keys, units.key_end[unit])
    full_start = np.minimum(np.maximum(units.full_start[unit], key_start), key_end)
    full_end = np.minimum(units.full_end[unit], key_end)
    # Without a whole tile that all rows see, the masked keys to the right are all of them.
    has_full = full_end > full_start
    full_start, full_end = np.where(has_full, full_start, key_start), np.where(has_full, full_end, key_start)
    piece = np.where(is_split[unit], cut.piece, -1)
    first_row, num_rows, table = units.first_row[unit], units.num_rows[unit], tables[unit]
    items = layout.view(buffer, f"{name}_items")
    columns = (first_row, num_rows, table, key_start, full_start, full_end, key_end, piece, num_pieces[unit])
    for index, column in enumerate(columns):
        items[: len(unit), index] = column


def _exclusive_sum(counts: np.ndarray) -> np.ndarray:
    sums: np.ndarray = counts.cumsum() - counts
    return sums
