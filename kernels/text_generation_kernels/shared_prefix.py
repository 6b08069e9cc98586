"""Finds decoding sequences whose block tables begin with the same blocks, so that attention reads those once."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class SharedPrefix:
    """Sequences whose first `length` keys lie in the same blocks."""

    sequences: np.ndarray  # [n] rows of the batch, n >= 2, each with one query token
    length: int  # a multiple of the block size, smaller than each of their lengths


def find_shared_prefixes(
    block_tables: np.ndarray,  # [B, max_blocks]
    query_lengths: np.ndarray,  # [B]
    sequence_lengths: np.ndarray,  # [B]
    block_size: int,
    min_length: int,
) -> list[SharedPrefix]:
    """Groups of decoding sequences that share at least `min_length` keys; a sequence is in one group at most.

    Candidates are those with the same block at the place where `min_length` is reached; the blocks before and after it
    are compared, not assumed. Of groups within groups only the outer one is found.
    """
    least = -(-min_length // block_size)
    assert least > 0
    # The block of the newest token is a sequence's own: it is still written to.
    num_full = np.maximum(sequence_lengths - 1, 0) // block_size
    candidates = ((query_lengths == 1) & (num_full >= least)).nonzero()[0]
    if len(candidates) < 2:
        return []
    blocks = block_tables[candidates, least - 1]
    in_order = np.sort(blocks)
    if not (in_order[1:] == in_order[:-1]).any():  # as in most steps
        return []
    _, group_of, sizes = np.unique(blocks, return_inverse=True, return_counts=True)
    groups = []
    for group in np.flatnonzero(sizes > 1):
        members = candidates[group_of == group]
        tables = block_tables[members, : num_full[members].min()]
        differs = (tables != tables[0]).any(axis=0)
        common = int(differs.argmax()) if differs.any() else tables.shape[1]
        if common >= least:
            groups.append(SharedPrefix(members, common * block_size))
    return groups


def worth_sharing(
    owners: np.ndarray,  # [B] a number that sequences with the same prefix have in common
    prefix_lengths: np.ndarray,  # [B]
    min_keys_saved: int,  # by one product; about what it costs to have one more
) -> Iterator[np.ndarray]:
    """For each product that reads the prefixes of several sequences together: their places in B, in order.

    Sequences whose prefixes are not worth it are in none.
    """
    _, first, prefix, counts = np.unique(owners, return_index=True, return_inverse=True, return_counts=True)
    lengths = prefix_lengths[first]
    products: list[tuple[list[int], int]] = []  # prefixes, and the keys that these save
    for number in np.lexsort((counts, lengths)).tolist():
        saved = _keys_saved(counts[[number]], lengths[[number]])
        if products:
            members, saved_before = products[-1]
            together = [*members, number]
            saved_together = _keys_saved(counts[together], lengths[together])
            if saved_together >= saved_before + max(saved - min_keys_saved, 0):
                products[-1] = together, saved_together
                continue
        products.append(([number], saved))
    for members, saved in products:
        if saved >= min_keys_saved:
            yield np.flatnonzero(np.isin(prefix, members))


def _keys_saved(counts: np.ndarray, lengths: np.ndarray) -> int:
    """How many keys fewer are gathered and attended to if one product reads prefixes of so many sequences each.

    It is padded to the longest and to the most sequences. A key is taken to cost a sequence as much as its gathering.
    """
    together = len(counts) * int(lengths.max()) * (1 + int(counts.max()))
    return 2 * int(counts @ lengths) - together
