"""Plans as the router would send them for a steady load: so many sequences decode, prompts join in chunks.

Every plan names differences alone, and blocks are handed out as tokens need them.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from text_generation_shard.step import NewSequence, StepPlan


class LoadTooLarge(Exception):
    """KV memory or token budget do not hold the load; says how much they hold."""


@dataclass
class _Sequence:
    """A sequence as the plans so far leave it."""

    blocks: list[int]
    num_prompt_tokens: int
    num_computed_tokens: int = 0


class ScriptedRouter:
    """Owns sequences and blocks; `plan` answers the next step's plan. Prompts are random, so that none share blocks."""

    def __init__(self, num_blocks: int, block_size: int, max_step_tokens: int, vocab_size: int) -> None:
        self._free_blocks = list(range(num_blocks - 1, -1, -1))
        self._num_blocks = num_blocks
        self._block_size = block_size
        self._max_step_tokens = max_step_tokens
        self._vocab_size = vocab_size
        self._random = np.random.default_rng(0)
        self._sequences: dict[int, _Sequence] = {}
        self._step = 0
        self._last_id = 0
        self._guests: tuple[int, ...] = ()  # leave with the next plan

    def plan(self, new_lengths: tuple[int, ...] = (), removed: tuple[int, ...] = ()) -> StepPlan:
        """One step: all that have their prompt computed decode, the other prompts get what is left of the budget."""
        removed, self._guests = (*removed, *self._guests), ()
        for sequence_id in removed:
            self._free_blocks += self._sequences.pop(sequence_id).blocks
        decoding = [number for number, it in self._sequences.items() if it.num_computed_tokens >= it.num_prompt_tokens]
        grown = {number: blocks for number in decoding if (blocks := self._compute(number, 1))}
        new_sequences = tuple(self._admit(length) for length in new_lengths)
        prefill = {}
        budget = self._max_step_tokens - len(decoding)
        for number, it in self._sequences.items():
            count = min(budget, it.num_prompt_tokens - it.num_computed_tokens)
            if number not in grown and number not in decoding and count > 0:
                self._compute(number, count)
                prefill[number] = count
                budget -= count
        self._step += 1
        return StepPlan(
            self._step,
            removed_sequence_ids=_ints(removed),
            new_sequences=new_sequences,
            grown_sequence_ids=_ints(grown),
            grown_num_blocks=_ints(len(blocks) for blocks in grown.values()),
            grown_block_ids=_ints(block for blocks in grown.values() for block in blocks),
            prefill_sequence_ids=_ints(prefill),
            prefill_num_tokens=_ints(prefill.values()),
        )

    def bring_to(self, num_sequences: int, length: int) -> Iterator[StepPlan]:
        """Plans after which so many sequences decode; new ones have about `length` tokens.

        Their lengths differ, so that each step some of them need a new block.
        """
        staying = [number for number in self._sequences if number not in self._guests]
        lengths = tuple(length + index % self._block_size for index in range(num_sequences - len(staying)))
        yield self.plan(lengths, tuple(staying[num_sequences:]))
        while any(it.num_computed_tokens < it.num_prompt_tokens for it in self._sequences.values()):
            yield self.plan()

    def mixed(self, num_plans: int, length: int) -> Iterator[StepPlan]:
        """Plans each of which computes a whole prompt of `length` beside the decodes; its sequence ends there."""
        for _ in range(num_plans):
            plan = self.plan((length,))
            if sum(plan.prefill_num_tokens) != length:
                raise LoadTooLarge(f"a step of {self._max_step_tokens} tokens has no room for a prompt of {length}")
            self._guests = (self._last_id,)
            yield plan

    def _admit(self, length: int) -> NewSequence:
        self._last_id += 1
        blocks = self._take_blocks(-(-length // self._block_size))
        self._sequences[self._last_id] = _Sequence(list(blocks), length)
        tokens = self._random.integers(0, self._vocab_size, length, dtype=np.int32)
        return NewSequence(self._last_id, tokens, length, 0, _ints(blocks))

    def _compute(self, number: int, num_tokens: int) -> list[int]:
        """Count tokens as computed; answers the blocks that this takes beyond those that are there."""
        it = self._sequences[number]
        it.num_computed_tokens += num_tokens
        blocks = self._take_blocks(-(-it.num_computed_tokens // self._block_size) - len(it.blocks))
        it.blocks += blocks
        return blocks

    def _take_blocks(self, count: int) -> list[int]:
        if count > len(self._free_blocks):
            raise LoadTooLarge(f"{self._num_blocks} blocks of {self._block_size} tokens do not hold the sequences")
        return [self._free_blocks.pop() for _ in range(max(0, count))]


def _ints(values: object) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    return np.array(list(values), np.int32)  # type: ignore[call-overload]
