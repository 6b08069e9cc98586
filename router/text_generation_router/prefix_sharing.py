"""What sequences share of their prefixes: blocks that one finds, offers to others, or waits for another to compute.

The block manager knows which block has which content, a sequence the keys of its own; this brings them together.
"""

from collections import Counter
from collections.abc import Iterable

from text_generation_router.block_manager import BlockManager, hash_block
from text_generation_router.sequence import Sequence


class PrefixSharing:
    """The scheduler's use of the prefix cache; without effect where that is off."""

    def __init__(self, blocks: BlockManager) -> None:
        self._blocks = blocks
        # Keys of prompt blocks that a running sequence will compute: a sequence that could share one waits for it.
        self._to_be_computed: Counter[bytes] = Counter()

    def clear(self) -> None:
        """No sequence is in the batch any more, and all blocks are lost."""
        self._to_be_computed.clear()

    def is_waiting(self, sequence: Sequence) -> bool:
        """Whether another sequence is still computing the block that this one waits for."""
        return sequence.awaited_key in self._to_be_computed

    def find(self, sequence: Sequence) -> list[int]:
        """Blocks a waiting sequence can share; sets `awaited_key` if the next one is about to be computed.

        A hit never covers the block of the last known token: at least one token must be computed. A prompt that is
        scored is computed as a whole.
        """
        if not self._blocks.prefix_caching:
            return []
        max_hits = (len(sequence.token_ids) - 1) // self._blocks.block_size
        self._hash_blocks(sequence, len(sequence.token_ids) // self._blocks.block_size)
        if sequence.request.scores_prompt:
            return []
        keys = sequence.block_hashes[:max_hits]
        hits = self._blocks.find(keys)
        next_key = keys[len(hits)] if len(hits) < max_hits else None
        sequence.awaited_key = next_key if next_key in self._to_be_computed else None
        return hits

    def joined(self, sequence: Sequence) -> None:
        """A sequence is in the batch, with the blocks that it found: it will compute the others."""
        sequence.num_found_blocks = sequence.num_registered_blocks
        self._to_be_computed.update(sequence.block_hashes[sequence.num_found_blocks :])

    def left(self, sequence: Sequence) -> None:
        """It is not any more: what it has not computed it never will."""
        for key in sequence.block_hashes[sequence.num_registered_blocks :]:
            self._count_down(key)

    def offer(self, sequence: Sequence) -> None:
        """Register the blocks that are full of known tokens and planned to be computed.

        A later plan that shares them runs after the one that fills them.
        """
        num_known = min(sequence.num_computed_tokens, len(sequence.token_ids))
        num_full = num_known // self._blocks.block_size
        if num_full <= sequence.num_registered_blocks or not self._blocks.prefix_caching:
            return
        self._hash_blocks(sequence, num_full)
        for index in range(sequence.num_registered_blocks, num_full):
            key = sequence.block_hashes[index]
            self._blocks.register(sequence.block_table[index], key)
            self._count_down(key)
        sequence.num_registered_blocks = num_full

    def withdraw(self, failed: Sequence, others: Iterable[Sequence]) -> list[Sequence]:
        """Take back what a failed sequence offered; answers those of the others that have found some of it.

        A shard that refused the sequence has written nothing, and what others computed from that is withdrawn as well.
        """
        self._blocks.unregister(failed.block_hashes)
        start = failed.num_found_blocks  # a key stands for all tokens up to its block: the first one tells
        first_key = failed.block_hashes[start : start + 1]
        sharers = [
            other
            for other in others
            if other.num_found_blocks > start and other.block_hashes[start : start + 1] == first_key
        ]
        for sharer in sharers:
            self._blocks.unregister(sharer.block_hashes[start:])
        return sharers

    def _hash_blocks(self, sequence: Sequence, num_blocks: int) -> None:
        size, keys = self._blocks.block_size, sequence.block_hashes
        while len(keys) < num_blocks:
            parent = keys[-1] if keys else sequence.request.cache_salt
            start = len(keys) * size
            keys.append(hash_block(parent, sequence.token_ids[start : start + size]))

    def _count_down(self, key: bytes) -> None:
        count = self._to_be_computed.get(key, 0)
        if count > 1:
            self._to_be_computed[key] = count - 1
        elif count:
            del self._to_be_computed[key]

    def check_idle(self) -> None:
        """Assert that nobody waits for anybody."""
        assert not self._to_be_computed
