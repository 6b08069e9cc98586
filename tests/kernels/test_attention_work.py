"""The plan of a step, walked item by item: every row meets each of its keys exactly once, within the fixed sizes."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_generation_kernels import attention_layout as columns
from text_generation_kernels.attention_layout import AttentionLayout, Tile
from text_generation_kernels.attention_work import plan_attention
from text_generation_kernels.shared_prefix import SharedPrefix, find_shared_prefixes


def make_layout(group_size: int = 4, wide: bool = True, workers: int = 5, min_key_tiles: int = 1) -> AttentionLayout:
    narrow_rows = 16 if group_size <= 16 else 64
    return AttentionLayout(
        group_size=group_size,
        block_size=16,
        max_tokens=300,
        max_sequences=9,
        narrow=Tile(narrow_rows, 32, workers, min_key_tiles),
        wide=Tile(64, 16, max(workers - 2, 1), min_key_tiles) if wide else None,
    )


def plan(
    layout: AttentionLayout,
    steps: list[tuple[int, int]],
    window: int | None = None,
    prefixes: list[SharedPrefix] | None = None,
) -> np.ndarray:
    query_lengths, lengths = np.array(steps, dtype=np.int32).reshape(-1, 2).T
    starts = np.concatenate(([0], np.cumsum(query_lengths)))
    buffer = np.full(layout.size, -77, dtype=np.int32)
    plan_attention(layout, buffer, starts, lengths, window, prefixes or [])
    return buffer


def items_of(layout: AttentionLayout, buffer: np.ndarray, kind: str) -> list[tuple[int, np.ndarray]]:
    """(worker, item) of one kernel, found as the kernel finds them."""
    starts = layout.view(buffer, f"{kind}_starts")
    items = layout.view(buffer, f"{kind}_items")
    return [
        (worker, items[index])
        for worker, (start, end) in enumerate(itertools.pairwise(starts))
        for index in range(start, end)
    ]


def check(layout: AttentionLayout, buffer: np.ndarray, steps: list[tuple[int, int]], window: int | None = None) -> None:
    """Count how often each token meets each position, and follow its results to their slots."""
    token_positions = [length - query + i for query, length in steps for i in range(query)]
    table_of = [row for row, (query, _) in enumerate(steps) for _ in range(query)]
    longest = max(length for _, length in steps)
    met = np.zeros((len(token_positions), longest), dtype=int)
    slots_of: dict[int, list[int]] = {token: [] for token in range(len(token_positions))}
    is_direct: set[int] = set()
    merged_in_place: dict[int, range] = {}  # of a token: the slots that the narrow kernel's last piece merges
    tokens, positions, slots = (layout.view(buffer, f"row_{name}") for name in ("tokens", "positions", "slots"))
    for kind, tile in (("narrow", layout.narrow), ("wide", layout.wide)):
        for _, item in items_of(layout, buffer, kind) if tile is not None else []:
            assert 0 < item[columns.NUM_ROWS] * layout.group_size <= tile.rows
            assert item[columns.KEY_START] % layout.block_size == 0
            assert item[columns.KEY_START] < item[columns.KEY_END] <= longest
            assert item[columns.KEY_START] <= item[columns.FULL_START] <= item[columns.FULL_END]
            assert item[columns.FULL_END] <= item[columns.KEY_END]
            for start in (columns.FULL_START, columns.FULL_END):
                assert (item[start] - item[columns.KEY_START]) % tile.keys == 0
            for row in range(item[columns.FIRST_ROW], item[columns.FIRST_ROW] + item[columns.NUM_ROWS]):
                token = tokens[row]
                assert positions[row] == token_positions[token]
                keys = np.arange(item[columns.KEY_START], item[columns.KEY_END])
                seen = keys <= positions[row]
                if window is not None:
                    seen &= keys > positions[row] - window
                assert seen[(keys >= item[columns.FULL_START]) & (keys < item[columns.FULL_END])].all()
                met[token, keys[seen]] += 1
                if item[columns.PIECE] < 0:
                    assert token not in is_direct
                    is_direct.add(token)
                else:
                    slots_of[token].append(slots[row] + item[columns.PIECE])
                    if item[columns.NUM_PIECES] > 0:
                        assert kind == "narrow"
                        all_slots = range(slots[row], slots[row] + item[columns.NUM_PIECES])
                        assert merged_in_place.setdefault(token, all_slots) == all_slots
                assert table_of[token] == item[columns.TABLE] or len(steps) > 1
    for token, position in enumerate(token_positions):
        first = 0 if window is None else max(0, position - window + 1)
        assert (met[token, first : position + 1] == 1).all()
        assert met[token].sum() == position + 1 - first
    merged = layout.view(buffer, "merged")[: layout.view(buffer, "num_merged")[0]]
    merges = {int(token): range(start, start + count) for token, start, count, _ in merged}
    assert len(merges) == len(merged)
    assert not merges.keys() & merged_in_place.keys()
    merges |= merged_in_place
    assert merges.keys() == {token for token, found in slots_of.items() if found}
    for token, all_slots in merges.items():
        assert sorted(slots_of[token]) == list(all_slots)
        assert len(all_slots) > 1
        assert token not in is_direct
    used = [slot for found in slots_of.values() for slot in found]
    assert len(set(used)) == len(used)
    assert all(slot < layout.max_partials for slot in used)


sequences = st.integers(0, 40).flatmap(lambda query: st.tuples(st.just(query), st.integers(max(query, 1), 150)))


@settings(deadline=None, max_examples=150)
@given(
    st.lists(sequences, min_size=1, max_size=7),
    st.sampled_from([1, 3, 4, 16]),
    st.sampled_from([1, 2, 7, 40]),
    st.sampled_from([1, 3]),
    st.sampled_from([None, 1, 5, 40, 1000]),
)
def test_every_row_meets_each_of_its_keys_once(
    steps: list[tuple[int, int]], group_size: int, workers: int, min_key_tiles: int, window: int | None
) -> None:
    layout = make_layout(group_size, workers=workers, min_key_tiles=min_key_tiles)
    check(layout, plan(layout, steps, window), steps, window)


@settings(deadline=None, max_examples=80)
@given(
    st.lists(st.integers(1, 60), min_size=4, max_size=9),
    st.integers(1, 6),
    st.sampled_from([1, 4, 40]),
    st.sampled_from([4, 16, 20]),
)
def test_shared_prefixes_are_read_once_and_nothing_is_lost(
    own: list[int], prefix_blocks: int, workers: int, group_size: int
) -> None:
    layout = make_layout(group_size, workers=workers)
    prefix = 16 * prefix_blocks
    members, alone = np.arange(len(own) - 1), len(own) - 1
    steps = [(1, prefix + length) for length in own]
    buffer = plan(layout, steps, prefixes=[SharedPrefix(members, prefix)])
    check(layout, buffer, steps)
    items = [item for kind in ("narrow", "wide") for _, item in items_of(layout, buffer, kind)]
    reads = sum(
        item[columns.KEY_END] - item[columns.KEY_START]
        for item in items
        if item[columns.KEY_END] <= prefix and item[columns.TABLE] != alone
    )
    tile_tokens = layout.wide_tokens if len(members) > layout.narrow_tokens else layout.narrow_tokens
    assert reads == prefix * -(-len(members) // tile_tokens)


def test_prefixes_beside_prompts() -> None:
    layout = make_layout()
    steps = [(1, 70), (33, 50), (1, 66), (0, 12), (2, 90), (1, 65)]
    buffer = plan(layout, steps, prefixes=[SharedPrefix(np.array([0, 2, 5]), 64)])
    check(layout, buffer, steps)


def test_work_is_shared_out_evenly() -> None:
    layout = make_layout(workers=8)
    buffer = plan(layout, [(1, length) for length in (3000, 40, 700, 1, 1290)])
    tiles = np.zeros(8, dtype=int)
    for worker, item in items_of(layout, buffer, "narrow"):
        tiles[worker] += -(-(item[columns.KEY_END] - item[columns.KEY_START]) // 32)
    assert tiles.max() == -(-tiles.sum() // 8)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(17, 300), min_size=1, max_size=6), st.sampled_from([1, 3, 8]))
def test_prompts_are_dealt_out_whole_unless_one_is_far_longer_than_a_share(lengths: list[int], workers: int) -> None:
    layout = AttentionLayout(4, 16, 2000, 9, Tile(16, 32, 5), Tile(64, 16, workers, 4))
    steps = [(length, length) for length in lengths]
    buffer = plan(layout, steps)
    check(layout, buffer, steps)
    tiles = np.zeros(workers, dtype=int)
    for worker, item in items_of(layout, buffer, "wide"):
        tiles[worker] += -(-(item[columns.KEY_END] - item[columns.KEY_START]) // 16)
    longest = max(4, -(-5 * tiles.sum() // (4 * workers)))
    assert tiles.max() <= -(-tiles.sum() // workers) + longest
    for _, item in items_of(layout, buffer, "wide"):
        assert -(-(item[columns.KEY_END] - item[columns.KEY_START]) // 16) <= longest


def test_short_work_is_cut_only_as_fine_as_asked() -> None:
    layout = make_layout(workers=8, min_key_tiles=3)
    items = items_of(layout, plan(layout, [(1, 32 * 6), (1, 32 * 3)]), "narrow")
    assert [worker for worker, _ in items] == [0, 1, 2]
    assert [int(item[columns.KEY_END] - item[columns.KEY_START]) for _, item in items] == [96, 96, 96]
    assert [int(item[columns.PIECE]) for _, item in items] == [0, 1, -1]


def test_empty_step_has_no_items() -> None:
    layout = make_layout()
    buffer = plan(layout, [(0, 5), (0, 0)])
    assert not items_of(layout, buffer, "narrow")
    assert not items_of(layout, buffer, "wide")
    assert layout.view(buffer, "num_merged")[0] == 0


def test_prompts_need_the_wide_kernel() -> None:
    with pytest.raises(AssertionError, match="wide"):
        plan(make_layout(wide=False), [(30, 30)])


def test_finds_prefixes_by_comparing_blocks() -> None:
    tables = np.array([
        [5, 6, 7, 8, 1],
        [5, 6, 7, 9, 2],
        [5, 6, 7, 8, 3],
        [4, 6, 7, 8, 1],  # same later blocks, another first one
        [5, 6, 7, 8, 1],  # prefills
        [3, 2, 1, 0, 0],
    ])  # fmt: skip
    lengths = np.array([70, 70, 70, 70, 70, 17])
    query_lengths = np.array([1, 1, 1, 1, 5, 1])
    assert find_shared_prefixes(tables[:4], query_lengths[:4], lengths[:4], 16, 32) == []
    kept = [0, 1, 2, 4, 5]
    for min_length, expected in ((32, [([0, 1, 2], 48)]), (64, [([0, 2], 64)]), (80, [])):
        groups = find_shared_prefixes(tables[kept], query_lengths[kept], lengths[kept], 16, min_length)
        assert [(group.sequences.tolist(), group.length) for group in groups] == expected


def test_the_block_being_written_is_never_shared() -> None:
    tables = np.array([[1, 2, 3], [1, 2, 3]])
    groups = find_shared_prefixes(tables, np.array([1, 1]), np.array([32, 33]), 16, 16)
    assert [group.length for group in groups] == [16]


def test_tables_narrower_than_the_shortest_prefix_share_nothing() -> None:
    tables = np.array([[3], [3]], np.int32)
    assert find_shared_prefixes(tables, np.array([1, 1]), np.array([9, 16]), 16, 32) == []
