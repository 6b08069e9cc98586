"""Finds decoding sequences whose block tables begin with the same blocks, so that attention reads those once."""

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
