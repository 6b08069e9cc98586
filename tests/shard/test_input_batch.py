"""The persistent batch against a naive model that keeps each sequence as a list of tokens and a list of blocks."""

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from text_generation_shard.input_batch import InputBatch
from text_generation_shard.step import NewSequence, PlanError, StepPlan
from text_generation_shard.step_inputs import BatchLimits, StepInputs

LIMITS = BatchLimits(
    vocab_size=100, block_size=4, num_blocks=64, max_num_sequences=5, max_step_tokens=40, max_sequence_length=32
)


@dataclass
class NaiveSequence:
    """What the router knows of one sequence, without any array."""

    sequence_id: int
    tokens: list[int]
    num_known: int
    num_computed: int
    blocks: list[int]
    seed: int = 0
    is_failed: bool = False  # the router has not heard of it yet

    @property
    def is_decoding(self) -> bool:
        return self.num_computed >= self.num_known


@dataclass
class NaiveBatch:
    """Makes valid random plans and says what each should compute."""

    draw: st.DrawFn
    running: dict[int, NaiveSequence] = field(default_factory=dict)
    preempted: list[NaiveSequence] = field(default_factory=list)
    next_id: int = 7

    def integer(self, low: int, high: int) -> int:
        return self.draw(st.integers(low, high))

    def plan(self, step: int) -> tuple[StepPlan, dict[int, int]]:
        """A plan, and how many tokens it has each sequence compute."""
        removed = [sequence_id for sequence_id in self.running if self.integer(0, 5) == 0]
        removed += [s.sequence_id for s in self.running.values() if len(s.tokens) >= LIMITS.max_sequence_length]
        removed = list(dict.fromkeys(removed))
        for sequence_id in removed:
            sequence = self.running.pop(sequence_id)
            if not sequence.is_failed:
                self.preempted.append(sequence)
        new = [self.add() for _ in range(self.integer(0, LIMITS.max_num_sequences - len(self.running)))]
        work, budget = {}, LIMITS.max_step_tokens
        for sequence in self.running.values():
            num_left = 1 if sequence.is_decoding else sequence.num_known - sequence.num_computed
            wanted = 1 if sequence.is_decoding else self.integer(0, num_left)
            if budget >= wanted > 0:
                work[sequence.sequence_id] = wanted
                budget -= wanted
        grown = {s.sequence_id: self.grow(s, work.get(s.sequence_id, 0)) for s in self.running.values()}
        grown = {sequence_id: blocks for sequence_id, blocks in grown.items() if blocks}
        prefills = {i: count for i, count in work.items() if not self.running[i].is_decoding}
        plan = StepPlan(
            step=step,
            removed_sequence_ids=ints(removed),
            new_sequences=tuple(new),
            grown_sequence_ids=ints([*grown]),
            grown_num_blocks=ints([len(blocks) for blocks in grown.values()]),
            grown_block_ids=ints([block for blocks in grown.values() for block in blocks]),
            prefill_sequence_ids=ints([*prefills]),
            prefill_num_tokens=ints([*prefills.values()]),
        )
        return plan, work

    def blocks(self, count: int) -> list[int]:
        return [self.integer(0, LIMITS.num_blocks - 1) for _ in range(count)]

    def add(self) -> NewSequence:
        """A fresh sequence, or one that returns with the tokens it had."""
        if self.preempted and self.integer(0, 1):
            sequence = self.preempted.pop()
            tokens = sequence.tokens[: LIMITS.max_sequence_length - 1]
            sequence = replace(sequence, tokens=tokens, num_known=len(tokens), blocks=[])
        else:
            tokens = [self.integer(0, LIMITS.vocab_size - 1) for _ in range(self.integer(1, 20))]
            sequence = NaiveSequence(self.next_id, tokens, len(tokens), 0, [], self.integer(0, 2**64 - 1))
            self.next_id += self.integer(1, 3)
        sequence.num_computed = self.integer(0, len(tokens) - 1)
        sequence.blocks = self.blocks(-(-sequence.num_computed // LIMITS.block_size))
        self.running[sequence.sequence_id] = sequence
        return NewSequence(
            sequence_id=sequence.sequence_id,
            token_ids=ints(tokens),
            num_prompt_tokens=len(tokens),
            num_computed_tokens=sequence.num_computed,
            block_ids=ints(sequence.blocks),
            seed=sequence.seed,
        )

    def grow(self, sequence: NaiveSequence, num_tokens: int) -> list[int]:
        """The blocks that so many more tokens need, and now and then one more."""
        wanted = -(-(sequence.num_computed + num_tokens) // LIMITS.block_size)
        if self.integer(0, 3) == 0:
            wanted = min(wanted + 1, LIMITS.max_blocks_per_sequence)
        added = self.blocks(max(0, wanted - len(sequence.blocks)))
        sequence.blocks += added
        return added


def ints(values: list[int]) -> np.ndarray:
    return np.array(values, np.int32)


def check_inputs(batch: InputBatch, naive: NaiveBatch, work: dict[int, int], inputs: StepInputs) -> None:
    ids = batch.sequence_ids[inputs.rows].tolist()
    assert sorted(ids) == sorted(work)
    assert inputs.query_starts.tolist() == [0, *np.cumsum([work[i] for i in ids]).tolist()]
    assert inputs.max_query_length == max(work.values())
    assert inputs.max_sequence_length == max(naive.running[i].num_computed + work[i] for i in ids)
    sampling = []
    for index, sequence_id in enumerate(ids):
        sequence = naive.running[sequence_id]
        start, end = inputs.query_starts[index : index + 2].tolist()
        positions = range(sequence.num_computed, sequence.num_computed + work[sequence_id])
        assert inputs.input_ids[start:end].tolist() == [sequence.tokens[p] for p in positions]
        assert inputs.positions[start:end].tolist() == list(positions)
        assert inputs.slot_mapping[start:end].tolist() == [sequence.blocks[p // 4] * 4 + p % 4 for p in positions]
        length = positions[-1] + 1
        assert inputs.sequence_lengths[index] == length
        num_blocks = -(-length // 4)
        assert batch.tables(inputs)[index, :num_blocks].tolist() == sequence.blocks[:num_blocks]
        assert inputs.is_decoding[index] == sequence.is_decoding
        if length == len(sequence.tokens):
            sampling.append((sequence_id, end - 1, length, sequence.seed))
    rows = inputs.sampling_rows
    sampled_ids = batch.sequence_ids[rows].tolist()
    seeds = batch.sampling.seeds[rows].tolist()
    got = zip(sampled_ids, inputs.sampling_indices.tolist(), inputs.sampling_positions.tolist(), seeds, strict=True)
    assert list(got) == sampling


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_run_of_plans_computes_what_the_naive_model_says(data: st.DataObject) -> None:
    batch, naive = InputBatch(LIMITS, has_device_tables=True), NaiveBatch(data.draw)
    on_device = np.zeros_like(batch.block_tables).reshape(-1)
    for step in range(1, data.draw(st.integers(2, 14)) + 1):
        plan, work = naive.plan(step)
        assert batch.apply(plan) == {}
        inputs = batch.prepare(plan)
        assert (inputs is None) == (not work)
        if inputs is None:
            continue
        check_inputs(batch, naive, work, inputs)
        places, blocks = batch.take_table_changes()
        on_device[places] = blocks
        num_blocks = -(-inputs.max_sequence_length // LIMITS.block_size)
        mirrored = on_device.reshape(batch.block_tables.shape)[inputs.rows, :num_blocks]
        needed = np.arange(num_blocks) * LIMITS.block_size < inputs.sequence_lengths[:, None]
        assert (mirrored == batch.tables(inputs))[needed].all()
        sampled_ids = batch.sequence_ids[inputs.sampling_rows].tolist()
        tokens = [data.draw(st.integers(0, 99)) for _ in sampled_ids]
        is_valid = [data.draw(st.integers(0, 7)) != 0 for _ in sampled_ids]
        answered = settle(batch, inputs, tokens, is_valid)
        assert answered == [i for i in sampled_ids if not naive.running[i].is_failed]
        for sequence_id, count in work.items():
            naive.running[sequence_id].num_computed += count
        for sequence_id, token, valid in zip(sampled_ids, tokens, is_valid, strict=True):
            # A failed sequence keeps its place until the router removes it, as if token 0 had been chosen.
            naive.running[sequence_id].tokens.append(token if valid else 0)
            naive.running[sequence_id].is_failed |= not valid
        assert batch.num_sequences == len(naive.running)


def settle(batch: InputBatch, inputs: StepInputs, tokens: list[int], is_valid: list[bool]) -> list[int]:
    """Finish a step at once; the ids that the router is told of."""
    sequence_ids = batch.advance(inputs)
    is_told = batch.settle(inputs, sequence_ids, np.array(tokens, np.int64), np.array(is_valid, np.bool_))
    return sequence_ids[is_told].tolist()


def new(sequence_id: int = 1, **changes: object) -> NewSequence:
    sequence = NewSequence(
        sequence_id, token_ids=ints([5, 6, 7]), num_prompt_tokens=3, num_computed_tokens=0, block_ids=ints([0])
    )
    return replace(sequence, **changes)  # type: ignore[arg-type]


def plan_of(**columns: object) -> StepPlan:
    arrays = {name: ints(value) if isinstance(value, list) else value for name, value in columns.items()}
    return StepPlan(step=1, **arrays)  # type: ignore[arg-type]


def run(batch: InputBatch, plan: StepPlan) -> None:
    batch.apply(plan)
    batch.prepare(plan)


BROKEN_PLANS = {
    "unknown removed": plan_of(removed_sequence_ids=[9]),
    "removed twice": plan_of(removed_sequence_ids=[2, 2]),
    "known twice": plan_of(new_sequences=(new(2),)),
    "no tokens": plan_of(new_sequences=(new(token_ids=ints([])),)),
    "all computed": plan_of(new_sequences=(new(num_computed_tokens=3),)),
    "prompt too long": plan_of(new_sequences=(new(num_prompt_tokens=4),)),
    "no prompt": plan_of(new_sequences=(new(num_prompt_tokens=0),)),
    "block beyond": plan_of(new_sequences=(new(block_ids=ints([64])),)),
    "block below": plan_of(new_sequences=(new(block_ids=ints([-1])),)),
    "table too long": plan_of(new_sequences=(new(block_ids=ints([0] * 9)),)),
    "too many": plan_of(new_sequences=tuple(new(i) for i in range(10, 15))),
    "unknown grows": plan_of(grown_sequence_ids=[9], grown_num_blocks=[1], grown_block_ids=[1]),
    "growth without count": plan_of(grown_sequence_ids=[2], grown_block_ids=[1]),
    "growth does not add up": plan_of(grown_sequence_ids=[2], grown_num_blocks=[2], grown_block_ids=[1]),
    "growth of nothing": plan_of(grown_sequence_ids=[2, 2], grown_num_blocks=[0, 1], grown_block_ids=[1]),
    "growth below zero": plan_of(grown_sequence_ids=[2, 2], grown_num_blocks=[2, -1], grown_block_ids=[1]),
    "blocks of nobody": plan_of(grown_block_ids=[1]),
    "growth too long": plan_of(grown_sequence_ids=[2], grown_num_blocks=[8], grown_block_ids=[0] * 8),
    "growth beyond": plan_of(grown_sequence_ids=[2], grown_num_blocks=[1], grown_block_ids=[64]),
    "unknown prefills": plan_of(prefill_sequence_ids=[9], prefill_num_tokens=[1]),
    "prefill without count": plan_of(prefill_sequence_ids=[2]),
    "prefill of nothing": plan_of(prefill_sequence_ids=[2], prefill_num_tokens=[0]),
    "prefill below zero": plan_of(prefill_sequence_ids=[2], prefill_num_tokens=[-1]),
    "prefill beyond": plan_of(prefill_sequence_ids=[2], prefill_num_tokens=[4]),
    "prefill twice": plan_of(prefill_sequence_ids=[2, 2], prefill_num_tokens=[1, 1]),
    "no room": plan_of(new_sequences=(new(block_ids=ints([])),), prefill_sequence_ids=[1], prefill_num_tokens=[3]),
}


@pytest.mark.parametrize("plan", BROKEN_PLANS.values(), ids=BROKEN_PLANS)
def test_a_plan_that_breaks_the_protocol_is_refused(plan: StepPlan) -> None:
    batch = InputBatch(LIMITS)
    batch.apply(plan_of(new_sequences=(new(2),)))
    with pytest.raises(PlanError):
        run(batch, plan)


def test_a_step_of_too_many_tokens_is_refused() -> None:
    batch = InputBatch(replace(LIMITS, max_step_tokens=3))
    sequences = (new(1), new(2))
    plan = plan_of(new_sequences=sequences, prefill_sequence_ids=[1, 2], prefill_num_tokens=[2, 2])
    batch.apply(plan)
    with pytest.raises(PlanError, match="4 tokens in a step of at most 3"):
        batch.prepare(plan)


def test_a_decoding_sequence_without_room_is_refused() -> None:
    batch = InputBatch(LIMITS)
    plan = plan_of(new_sequences=(new(token_ids=ints([1, 2, 3, 4]), num_prompt_tokens=4),),
                   prefill_sequence_ids=[1], prefill_num_tokens=[4])  # fmt: skip
    batch.apply(plan)
    inputs = batch.prepare(plan)
    assert inputs is not None
    settle(batch, inputs, [8], [True])
    with pytest.raises(PlanError, match="room for 5 tokens"):
        batch.prepare(plan_of())


REFUSED_SEQUENCES = {
    "token beyond": new(token_ids=ints([1, 100, 2])),
    "token below": new(token_ids=ints([1, -1, 2])),
    "too long": new(token_ids=ints([1] * 33), block_ids=ints([])),
    "temperature nan": new(temperature=float("nan")),
    "temperature infinite": new(temperature=float("inf")),
    "temperature below": new(temperature=-0.5),
    "top_p zero": new(temperature=1.0, top_p=0.0),
    "top_p above": new(temperature=1.0, top_p=1.5),
    "top_p nan": new(temperature=1.0, top_p=float("nan")),
}


@pytest.mark.parametrize("sequence", REFUSED_SEQUENCES.values(), ids=REFUSED_SEQUENCES)
def test_a_sequence_that_cannot_be_computed_fails_alone(sequence: NewSequence) -> None:
    batch = InputBatch(LIMITS)
    plan = plan_of(new_sequences=(new(2), sequence), prefill_sequence_ids=[2, 1], prefill_num_tokens=[3, 1])
    assert list(batch.apply(plan)) == [1]
    inputs = batch.prepare(plan)
    assert inputs is not None
    assert inputs.input_ids.tolist() == [5, 6, 7]
    assert settle(batch, inputs, [8], [True]) == [2]
    # The router may name it until it has heard, and then removes it: once.
    later = plan_of(grown_sequence_ids=[1], grown_num_blocks=[1], grown_block_ids=[3])
    assert batch.apply(later) == {}
    assert batch.apply(plan_of(removed_sequence_ids=[1])) == {}
    with pytest.raises(PlanError):
        batch.apply(plan_of(removed_sequence_ids=[1]))


def test_clear_forgets_every_sequence() -> None:
    batch = InputBatch(LIMITS)
    batch.apply(plan_of(new_sequences=(new(1), new(2, token_ids=ints([5, 500, 7])))))
    batch.clear()
    assert batch.prepare(plan_of()) is None
    assert list(batch.apply(plan_of(new_sequences=(new(1), new(2))))) == []


def test_a_step_that_was_launched_before_the_one_ahead_of_it_ended() -> None:
    """Two steps are under way: the second knows lengths, not tokens, and what became of its rows comes later."""
    batch = InputBatch(LIMITS)
    batch.apply(plan_of(new_sequences=(new(1), new(2, block_ids=ints([1])))))
    first = batch.prepare(plan_of(prefill_sequence_ids=[1, 2], prefill_num_tokens=[3, 3]))
    assert first is not None
    ahead = batch.advance(first)
    second = batch.prepare(plan_of())
    assert second is not None
    assert second.positions.tolist() == [3, 3]
    assert second.is_decoding.tolist() == [True, True]
    behind = batch.advance(second)
    tokens, valid, invalid = np.array([8, 9]), np.array([True, True]), np.array([False, True])
    assert batch.settle(first, ahead, tokens, invalid).tolist() == [True, True]
    # Sequence 1 failed in the first step: others compute it in vain, and nothing more is said of it.
    assert batch.settle(second, behind, tokens, invalid).tolist() == [False, True]
    assert batch.apply(plan_of(removed_sequence_ids=[1])) == {}
    # Sequence 2 is preempted while a step is under way: its token counts all the same, and its row is free.
    batch.apply(plan_of(grown_sequence_ids=[2], grown_num_blocks=[1], grown_block_ids=[2]))
    third = batch.prepare(plan_of())
    assert third is not None
    last = batch.advance(third)
    batch.apply(plan_of(removed_sequence_ids=[2], new_sequences=(new(3),)))
    assert batch.settle(third, last, np.array([7]), valid[:1]).tolist() == [True]
    assert batch.last_token_ids[0] == 0
