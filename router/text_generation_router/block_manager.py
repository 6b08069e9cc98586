"""Owns the KV blocks: which are free, how many sequences hold each, and the prefix cache over them.

A block is free, held (by one sequence, or by several that share a prefix), or cached: held by nobody but still
findable by its content, until it is needed for something new (least recently used first).
"""

import hashlib
from array import array
from collections import OrderedDict


def hash_block(parent: bytes, token_ids: list[int]) -> bytes:
    """Key of a full block: SHA-256 over the key of the block before it (or the salt) and its token ids."""
    return hashlib.sha256(parent + array("i", token_ids).tobytes()).digest()


class BlockManager:
    """Hands out KV blocks by id; `block_size` tokens fit in each."""

    def __init__(self, num_blocks: int, block_size: int, prefix_caching: bool = True) -> None:
        assert block_size > 0
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self.clear(num_blocks)

    def clear(self, num_blocks: int) -> None:
        """Begin with `num_blocks` free ones; whatever was held or cached is forgotten."""
        assert num_blocks > 0
        self.num_blocks = num_blocks
        self._free: list[int] = []  # of the blocks that were used before
        self._num_holders: list[int] = []  # of the blocks that were ever used: those with the lowest ids
        self._hash_of_block: dict[int, bytes] = {}
        self._block_of_hash: dict[bytes, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()  # held by nobody, oldest first

    @property
    def num_available(self) -> int:
        """Blocks that can be allocated now; cached ones count, they are given up when needed."""
        return self.num_blocks - len(self._num_holders) + len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Blocks held by nobody whose content can still be found."""
        return len(self._cached)

    @property
    def num_held(self) -> int:
        """Blocks held by sequences."""
        return self.num_blocks - self.num_available

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` tokens fill, the last one perhaps in part."""
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks with no content; the caller has checked `num_available`."""
        assert count <= self.num_available
        blocks = []
        for _ in range(count):
            block = self._take()
            self._num_holders[block] = 1
            blocks.append(block)
        return blocks

    def _take(self) -> int:
        if self._free:
            return self._free.pop()
        if len(self._num_holders) < self.num_blocks:
            self._num_holders.append(0)
            return len(self._num_holders) - 1
        return self._evict()

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        del self._block_of_hash[self._hash_of_block.pop(block)]
        return block

    def find(self, block_hashes: list[bytes]) -> list[int]:
        """The blocks that hold the longest findable prefix of `block_hashes`; holds nothing yet."""
        blocks: list[int] = []
        for block_hash in block_hashes:
            block = self._block_of_hash.get(block_hash)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def hold(self, blocks: list[int]) -> None:
        """Add one holder to each of `blocks`, found by `find`."""
        for block in blocks:
            if self._num_holders[block] == 0:
                del self._cached[block]
            self._num_holders[block] += 1

    def num_cached_among(self, blocks: list[int]) -> int:
        """How many of `blocks` nobody holds: holding them lowers `num_available` by as many."""
        return sum(self._num_holders[block] == 0 for block in blocks)

    def register(self, block: int, block_hash: bytes) -> None:
        """Make a held, full block findable; a key that another block already has is left to it."""
        assert self._num_holders[block] > 0
        if self.prefix_caching and block_hash not in self._block_of_hash and block not in self._hash_of_block:
            self._block_of_hash[block_hash] = block
            self._hash_of_block[block] = block_hash

    def unregister(self, block_hashes: list[bytes]) -> None:
        """Make blocks unfindable, held or cached, because what they hold cannot be trusted."""
        for block_hash in block_hashes:
            block = self._block_of_hash.pop(block_hash, None)
            if block is not None:
                del self._hash_of_block[block]
                if block in self._cached:
                    del self._cached[block]
                    self._free.append(block)

    def release(self, blocks: list[int]) -> None:
        """Drop one holder of each block of a table; the end of a prefix becomes evictable before its start."""
        for block in reversed(blocks):
            assert self._num_holders[block] > 0, "a block was released that nobody holds"
            self._num_holders[block] -= 1
            if self._num_holders[block] == 0:
                if block in self._hash_of_block:
                    self._cached[block] = None
                else:
                    self._free.append(block)

    def check(self) -> None:
        """Assert that every block is in exactly one state."""
        assert len(self._num_holders) <= self.num_blocks
        num_held = sum(holders > 0 for holders in self._num_holders)
        assert num_held + len(self._free) + len(self._cached) == len(self._num_holders)
        assert len(set(self._free)) == len(self._free)
        assert not set(self._free) & set(self._cached)
        assert all(block in self._hash_of_block for block in self._cached)
        assert {block: key for key, block in self._block_of_hash.items()} == self._hash_of_block
