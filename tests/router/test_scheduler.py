"""Scheduler and block manager against a model of a shard that remembers what every KV slot holds.

The model executes plans as shard.proto says, one or two plans behind the scheduler. Each slot remembers the whole
history (a hash over all token ids up to it), so a wrong block, a stale prefix hit or a block given away too early
shows as a wrong history. The sampled token is a function of the history alone: what each sequence generates is
known in advance, whatever batch, chunking, preemption or sharing happened on the way. A
row that is told to fail writes nonsense, and so does every row that reads it. A sequence that is told to be refused
writes nothing at all: who reads its blocks gets a wrong token, or fails.
"""

import dataclasses
import hashlib
import math
import tracemalloc
from collections import Counter, deque
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_generation_router.block_manager import BlockManager, hash_block
from text_generation_router.scheduler import Scheduler, SchedulerLimits
from text_generation_router.step import ScoredTokens, StepPlan, StepResult
from text_generation_router.token_scores import PromptScore
from text_generation_router.token_stream import FinishReason
from text_generation_router.valid_request import ValidRequest

EOS = 7
VOCABULARY = 50
NONSENSE = b""
UNWRITTEN = b"?"  # what lay there before


def history_of(token_ids: list[int]) -> bytes:
    return hashlib.sha256(repr(token_ids).encode()).digest()


def next_token(token_ids: list[int]) -> int:
    return history_of(token_ids)[0] % VOCABULARY


def expected_tokens(request: ValidRequest) -> tuple[list[int], FinishReason]:
    tokens = list(request.token_ids)
    for _ in range(request.max_new_tokens):
        tokens.append(next_token(tokens))
        if len(tokens) == len(request.token_ids) + request.max_new_tokens:
            break
        if tokens[-1] == EOS and not request.ignore_eos:
            return tokens[len(request.token_ids) :], FinishReason.EOS_TOKEN
    return tokens[len(request.token_ids) :], FinishReason.LENGTH


@dataclass
class Row:
    token_ids: list[int]
    num_computed: int
    blocks: list[int]
    is_decoding: bool = False
    is_broken: bool = False
    is_astray: bool = False  # it has read what nobody wrote


@dataclass
class ModelShard:
    """Executes plans literally, and asserts all that the protocol promises."""

    num_blocks: int
    block_size: int
    limits: SchedulerLimits
    rows: dict[int, Row] = field(default_factory=dict)
    slots: dict[int, bytes] = field(default_factory=dict)
    failing: set[int] = field(default_factory=set)  # sequences whose rows fail
    refusing: set[int] = field(default_factory=set)  # sequences that get no row
    refused: dict[int, Row] = field(default_factory=dict)  # not removed yet
    computed: Counter[tuple[int, int]] = field(default_factory=Counter)  # how often (sequence, position) was
    num_sampled: int = 0

    def execute(self, plan: StepPlan) -> StepResult:
        failures = self.apply_changes(plan)
        work = {sequence_id: 1 for sequence_id, row in self.rows.items() if row.is_decoding}
        skipped = [row for row in self.refused.values() if row.num_computed >= len(row.token_ids)]
        assert len(work) + len(skipped) == plan.num_decode_tokens
        for row in skipped:
            self.skip(row, 1)
        for sequence_id, count in zip(plan.prefill_sequence_ids, plan.prefill_num_tokens, strict=True):
            assert sequence_id not in work
            assert count > 0
            if sequence_id in self.refused:
                self.skip(self.refused[sequence_id], count)
            else:
                work[sequence_id] = count
        assert sum(work.values()) <= self.limits.max_step_tokens
        sampled = {}
        for sequence_id, count in work.items():
            row = self.rows[sequence_id]
            row.is_broken |= sequence_id in self.failing
            self.computed.update((sequence_id, row.num_computed + index) for index in range(count))
            token = self.compute(row, count)
            if row.is_broken or (row.is_astray and sequence_id % 2):
                failures[sequence_id] = "not finite"
            elif token is not None:
                sampled[sequence_id] = token
        self.num_sampled += len(sampled)
        return StepResult(plan.step, list(sampled), list(sampled.values()), [0.0] * len(sampled), failures)

    def apply_changes(self, plan: StepPlan) -> dict[int, str]:
        for sequence_id in plan.removed_sequence_ids:
            del (self.refused if sequence_id in self.refused else self.rows)[sequence_id]
        for new in plan.new_sequences:
            assert new.sequence_id not in self.rows
            assert 0 <= new.num_computed_tokens < len(new.token_ids)
            row = Row(list(new.token_ids), new.num_computed_tokens, list(new.block_ids))
            (self.refused if new.sequence_id in self.refusing else self.rows)[new.sequence_id] = row
        position = 0
        for sequence_id, count in zip(plan.grown_sequence_ids, plan.grown_num_blocks, strict=True):
            row = self.refused.get(sequence_id) or self.rows[sequence_id]
            row.blocks += plan.grown_block_ids[position : position + count]
            position += count
        assert position == len(plan.grown_block_ids)
        assert len(self.rows) <= self.limits.max_num_sequences
        return {new.sequence_id: "refused" for new in plan.new_sequences if new.sequence_id in self.refused}

    def slot(self, row: Row, position: int) -> int:
        return row.blocks[position // self.block_size] * self.block_size + position % self.block_size

    def skip(self, row: Row, count: int) -> None:
        for position in range(row.num_computed, row.num_computed + count):
            self.slots[self.slot(row, position)] = UNWRITTEN
        row.num_computed += count

    def compute(self, row: Row, count: int) -> int | None:
        start = row.num_computed
        for position in range(start):
            found = self.slots[self.slot(row, position)]
            row.is_broken |= found == NONSENSE
            row.is_astray |= found == UNWRITTEN
            is_known = found == history_of(row.token_ids[: position + 1])
            assert row.is_broken or row.is_astray or is_known, "stale KV memory"
        for position in range(start, start + count):
            known = history_of(row.token_ids[: position + 1])
            self.slots[self.slot(row, position)] = NONSENSE if row.is_broken else UNWRITTEN if row.is_astray else known
        row.num_computed += count
        assert row.num_computed <= len(row.token_ids)
        if row.num_computed < len(row.token_ids):
            return None
        row.is_decoding = True
        row.token_ids.append((next_token(row.token_ids) + row.is_astray) % VOCABULARY)
        return row.token_ids[-1]


class Harness:
    """A scheduler and its model shard, with up to `depth` plans in flight."""

    def __init__(self, num_blocks: int, block_size: int, limits: SchedulerLimits, depth: int = 2, caching: bool = True):
        self.blocks = BlockManager(num_blocks, block_size, caching)
        self.scheduler = Scheduler(limits, self.blocks, frozenset([EOS]))
        self.shard = ModelShard(num_blocks, block_size, limits)
        self.depth = depth
        self.in_flight: deque[StepPlan] = deque()
        self.generated: dict[int, list[int]] = {}
        self.reasons: dict[int, FinishReason] = {}
        self.failed: set[int] = set()
        self.num_steps = 0

    def add(self, request: ValidRequest):
        sequence = self.scheduler.add(request)
        self.generated[sequence.sequence_id] = []
        return sequence

    def send(self) -> None:
        """Send what can be sent."""
        while len(self.in_flight) < self.depth and (plan := self.scheduler.schedule()) is not None:
            self.in_flight.append(plan)
            self.blocks.check()

    def advance(self) -> bool:
        """Send what can be sent, then take one result in; False when there was nothing to do."""
        self.send()
        if not self.in_flight:
            return False
        self.num_steps += 1
        for progress in self.scheduler.update(self.shard.execute(self.in_flight.popleft())):
            sequence_id = progress.sequence.sequence_id
            assert sequence_id not in self.reasons, "a token after the end"
            if progress.failure is not None:
                self.failed.add(sequence_id)
                continue
            self.generated[sequence_id].append(progress.token_id)
            if progress.finish_reason is not None:
                self.reasons[sequence_id] = progress.finish_reason
        self.blocks.check()
        return True

    def lose_shards(self) -> set[int]:
        """Whatever they held and were about to answer is gone; others take their place. Answers who ends for it."""
        self.in_flight.clear()
        self.shard.rows.clear()
        self.shard.refused.clear()
        self.shard.slots.clear()
        culprits = self.scheduler.start_over()
        for culprit in culprits:
            self.scheduler.finish(culprit)
            self.failed.add(culprit.sequence_id)
        self.blocks.check()
        return {culprit.sequence_id for culprit in culprits}

    def run_until_idle(self, max_steps: int = 5000) -> None:
        while self.advance():
            assert self.num_steps < max_steps, "no end in sight"
        assert self.scheduler.num_unfinished == 0
        self.scheduler.check_idle()
        assert not self.shard.rows, "the shard was not told of every end"
        assert not self.shard.refused
        num_generated = sum(map(len, self.generated.values()))
        assert self.shard.num_sampled == num_generated + self.scheduler.num_dropped_tokens
        size = self.blocks.block_size
        findable = {slot for block in self.blocks._hash_of_block for slot in range(block * size, (block + 1) * size)}
        worthless = {slot for slot in findable if self.shard.slots[slot] in (NONSENSE, UNWRITTEN)}
        assert not worthless, "nonsense in the prefix cache"


def make_request(prompt: list[int], max_new_tokens: int, ignore_eos: bool = False, salt: bytes = b"") -> ValidRequest:
    return ValidRequest(prompt, max_new_tokens, ignore_eos=ignore_eos, cache_salt=salt)


@st.composite
def prompts(draw: st.DrawFn) -> list[int]:
    """Prompts that often share a prefix, also with what others generate."""
    base = list(range(draw(st.integers(0, 3)), 30))
    shared = base[: draw(st.integers(0, 24))]
    for _ in range(draw(st.integers(0, 6))):
        shared.append(next_token(shared))
    return shared + draw(st.lists(st.integers(0, 2), min_size=0 if shared else 1, max_size=6))


# Much alike, so that most share blocks with one that is in the same step.
LIKE_PROMPTS = st.builds(lambda length, last: [*range(length), last], st.integers(3, 24), st.integers(0, 2))
OFTEN_REFUSED = st.sampled_from([False, False, True])


def actions(prompts: st.SearchStrategy[list[int]], is_refused: st.SearchStrategy[bool]) -> st.SearchStrategy:
    salts = st.sampled_from([b"", b"", b"b"])
    return st.lists(
        st.one_of(
            st.tuples(st.just("add"), is_refused, prompts, st.integers(1, 20), st.booleans(), salts),
            st.tuples(st.just("cancel"), st.integers(0, 40)),
            st.tuples(st.just("fail"), st.integers(0, 40)),
            st.tuples(st.just("advance"), st.integers(1, 4)),
            st.tuples(st.just("lose")),
        ),
        min_size=12,  # or most have five
        max_size=60,
    )


@settings(max_examples=300, deadline=None)
@given(
    actions=actions(prompts(), st.just(False)) | actions(LIKE_PROMPTS, OFTEN_REFUSED),
    num_blocks=st.integers(14, 60),
    block_size=st.sampled_from([4, 5]),
    max_num_sequences=st.integers(1, 8),
    extra_budget=st.integers(0, 20),
    equal_context=st.sampled_from([math.inf, 2.0, 10.0]),
    depth=st.integers(1, 3),
    caching=st.booleans(),
)
def test_every_sequence_ends_with_the_tokens_it_would_have_alone(
    actions, num_blocks, block_size, max_num_sequences, extra_budget, equal_context, depth, caching
):
    limits = SchedulerLimits(max_num_sequences + extra_budget, max_num_sequences, equal_context)
    harness = Harness(num_blocks, block_size, limits, depth, caching)
    sequences, cancelled, culprits = [], set(), set()
    for action in actions:
        if action[0] == "add":
            sequences.append(harness.add(make_request(*action[2:])))
            if action[1]:
                harness.shard.refusing.add(sequences[-1].sequence_id)
        elif action[0] == "cancel" and action[1] < len(sequences):
            sequence = sequences[action[1]]
            harness.scheduler.finish(sequence)
            if sequence.sequence_id not in harness.reasons:
                cancelled.add(sequence.sequence_id)
        elif action[0] == "fail" and action[1] < len(sequences):
            harness.shard.failing.add(sequences[action[1]].sequence_id)
        elif action[0] == "lose":
            culprits |= harness.lose_shards()
        elif action[0] == "advance":
            for _ in range(action[1]):
                harness.advance()
    harness.run_until_idle()
    assert harness.failed <= harness.shard.failing | harness.shard.refusing | culprits, "one's failure ended another"
    for sequence in sequences:
        tokens, reason = expected_tokens(sequence.request)
        generated = harness.generated[sequence.sequence_id]
        if sequence.sequence_id in cancelled | harness.failed:
            assert generated == tokens[: len(generated)]
        else:
            assert generated == tokens
            assert harness.reasons[sequence.sequence_id] is reason


def work_of_steps(harness: Harness) -> list[tuple[int, list[int]]]:
    """How many tokens decode, and how many each prompt has, in each step with a prompt until all is done."""
    work = []
    schedule = harness.scheduler.schedule

    def schedule_and_note() -> StepPlan | None:
        plan = schedule()
        if plan is not None and plan.num_prefill_tokens:
            work.append((plan.num_decode_tokens, list(plan.prefill_num_tokens)))
        return plan

    harness.scheduler.schedule = schedule_and_note
    harness.run_until_idle()
    return work


QUARTERS_OF_16 = SchedulerLimits(64, 41, equal_context_tokens=100.0)  # and 100 tokens of context cost as much as one


def decoding_harness(num_decoding: int, limits: SchedulerLimits = QUARTERS_OF_16) -> Harness:
    harness = Harness(2000, 4, limits)
    for first in range(num_decoding):
        harness.add(make_request([first % VOCABULARY, 1], 90, ignore_eos=True))
    while len(harness.scheduler.running) < num_decoding:
        harness.advance()
    return harness


@pytest.mark.parametrize(
    ("num_decoding", "expected"),
    [
        # Alone the whole budget, else whole quarters that cost as nearly as much, and half a quarter at least.
        (0, [64] * 4 + [44]),
        (15, [49, 33, 33] + [17] * 10 + [15]),
        (20, [44, 28, 28, 28] + [12] * 14 + [4]),
        (31, [33] + [17] * 15 + [12]),
        (40, [24] * 3 + [8] * 28 + [4]),
    ],
)
def test_the_longer_its_context_the_fewer_tokens_a_prompt_has_beside_decodes(num_decoding, expected):
    harness = decoding_harness(num_decoding)
    harness.add(make_request(list(range(300)), 1))
    assert work_of_steps(harness) == [(num_decoding, [count]) for count in expected]


@pytest.mark.parametrize(
    ("num_decoding", "expected"),
    [
        (0, [1024, 476]),  # alone the whole budget
        (1, [767, 733]),  # else 512 tokens, four more for each that decodes, and what fills the quarter
        (51, [717, 717, 66]),
        (52, [972, 528]),
    ],
)
def test_the_fewer_decode_the_shorter_are_the_steps_of_a_prompt_beside_them(num_decoding, expected):
    harness = decoding_harness(num_decoding, SchedulerLimits(1024, 60))
    harness.add(make_request([index % VOCABULARY for index in range(1500)], 1))
    assert work_of_steps(harness) == [(num_decoding, [count]) for count in expected]


def test_what_a_long_context_costs_is_taken_from_the_next_prompt():
    harness = decoding_harness(20)
    sequence = harness.add(make_request(list(range(300)), 1))
    while sequence.num_computed_tokens < 128:
        harness.advance()
    harness.add(make_request([7] * 30, 1))
    # 20 decodes and 12 tokens behind 128 to 176 others cost 47 to 53 of 64: a quarter is left, and at last none.
    assert [chunks for _, chunks in work_of_steps(harness)][:2] == [[12, 16], [12, 14]]


def test_a_prompt_whose_context_is_cached_waits_until_a_step_has_room_for_one_of_its_tokens():
    harness = decoding_harness(20)
    harness.add(make_request(list(range(300)), 1))
    while harness.scheduler.num_unfinished > 20:
        harness.advance()
    harness.add(make_request(list(range(1000, 1300)), 1))
    harness.add(make_request([*range(300), 5, 6], 1))
    work = work_of_steps(harness)
    assert [num for _, chunks in work[:-1] for num in chunks[1:]] == []
    assert harness.scheduler.num_prefix_hit_tokens == 300


def test_a_small_memory_preempts_and_everything_still_comes_out_right():
    harness = Harness(12, 4, SchedulerLimits(16, 8))
    sequences = [harness.add(make_request([i, i + 1, i + 2], 40, ignore_eos=True)) for i in range(6)]
    harness.run_until_idle()
    assert harness.scheduler.num_preemptions > 0
    num_recomputed = harness.shard.computed.total() - len(harness.shard.computed)
    assert harness.scheduler.num_recomputed_tokens == num_recomputed > 0
    assert sum(sequence.num_recomputed_tokens for sequence in sequences) == num_recomputed
    for sequence in sequences:
        assert harness.generated[sequence.sequence_id] == expected_tokens(sequence.request)[0]


def test_shards_are_lost_while_the_token_of_a_preempted_sequence_is_on_its_way():
    harness = Harness(12, 4, SchedulerLimits(16, 8))
    sequences = [harness.add(make_request([i, i + 1, i + 2], 40, ignore_eos=True)) for i in range(6)]
    while not any(sequence.num_preemptions and sequence.num_pending_tokens for sequence in sequences):
        assert harness.advance()
        harness.send()
    harness.lose_shards()
    harness.run_until_idle()
    for sequence in sequences:
        assert harness.generated[sequence.sequence_id] == expected_tokens(sequence.request)[0]


def test_all_that_run_in_two_losses_end():
    harness = Harness(200, 4, SchedulerLimits(64, 8))
    sequences = [harness.add(make_request([i, i + 1, i + 2], 60, ignore_eos=True)) for i in range(4)]
    harness.advance()
    harness.lose_shards()
    while len(harness.shard.rows) < 2:  # the first one has got past the loss
        harness.advance()
    harness.lose_shards()
    harness.run_until_idle()
    assert harness.failed == {sequence.sequence_id for sequence in sequences[:2]}
    for sequence in sequences[2:]:
        assert harness.generated[sequence.sequence_id] == expected_tokens(sequence.request)[0]


def test_who_ran_in_two_losses_far_apart_ends_and_who_came_between_them_does_not():
    harness = Harness(200, 4, SchedulerLimits(64, 8))
    old = harness.add(make_request([1, 2, 3], 60, ignore_eos=True))
    harness.advance()
    harness.lose_shards()
    for _ in range(20):
        harness.advance()
    new = harness.add(make_request([4, 5, 6], 60, ignore_eos=True))
    while len(harness.shard.rows) < 2:
        harness.advance()
    harness.lose_shards()
    harness.run_until_idle()
    assert harness.failed == {old.sequence_id}
    assert harness.generated[new.sequence_id] == expected_tokens(new.request)[0]


def test_a_second_loss_hits_the_one_that_has_returned_alone():
    harness = Harness(200, 4, SchedulerLimits(64, 8))
    sequences = [harness.add(make_request([i, i + 1, i + 2], 60, ignore_eos=True)) for i in range(3)]
    harness.advance()
    harness.lose_shards()
    harness.advance()
    [on_trial] = harness.shard.rows
    harness.lose_shards()
    harness.run_until_idle()
    assert harness.failed == {on_trial}
    for sequence in sequences:
        if sequence.sequence_id != on_trial:
            assert harness.generated[sequence.sequence_id] == expected_tokens(sequence.request)[0]


def test_a_long_prompt_does_not_stall_running_streams():
    harness = Harness(100, 4, SchedulerLimits(8, 4))
    first = harness.add(make_request([1, 2, 3], 30, ignore_eos=True))
    harness.advance()
    harness.add(make_request(list(range(40)), 2))
    before = len(harness.generated[first.sequence_id])
    for _ in range(6):
        harness.advance()
    assert len(harness.generated[first.sequence_id]) - before == 6


def test_sequences_with_one_prefix_compute_it_once():
    harness = Harness(200, 4, SchedulerLimits(16, 8))
    prefix = [number % VOCABULARY for number in range(40)]
    for tail in range(5):
        harness.add(make_request([*prefix, tail], 3, ignore_eos=True))
    harness.run_until_idle()
    assert harness.scheduler.num_prefix_query_tokens == 5 * 41
    assert harness.scheduler.num_prefix_hit_tokens == 4 * 40


def test_a_prompt_that_is_scored_takes_no_hits_and_gives_some():
    harness = Harness(100, 4, SchedulerLimits(64, 8))
    prompt = list(range(20))
    first = harness.add(make_request(prompt, 3))
    harness.run_until_idle()
    scored = harness.add(dataclasses.replace(make_request(prompt, 3), scores_prompt=True))
    third = harness.add(make_request(prompt, 3))
    harness.run_until_idle()
    assert (first.num_cached_tokens, scored.num_cached_tokens, third.num_cached_tokens) == (0, 0, 16)
    assert all(harness.shard.computed[scored.sequence_id, position] == 1 for position in range(20))


def test_scores_find_their_places():
    """Those of a chunk come before any token; those of sequences that have ended are dropped."""
    harness = Harness(100, 4, SchedulerLimits(4, 2))
    sequence = harness.add(dataclasses.replace(make_request([5, 6, 7, 8, 9], 3), scores_prompt=True))
    scheduler = harness.scheduler
    for first, logprobs in ((1, [-1.0, -2.0, -3.0, -4.0]), (1, [-1.5])):
        assert (plan := scheduler.schedule()) is not None
        scores = [PromptScore(logprob, []) for logprob in logprobs]
        scored = [ScoredTokens(sequence.sequence_id, first, scores), ScoredTokens(99, 1, scores)]
        assert scheduler.update(StepResult(plan.step, [], [], [], scored_prompts=scored)) == []
    told = [score and score.logprob for score in sequence.prompt_scores]
    assert told == [None, -1.5, -2.0, -3.0, -4.0]


def test_generated_tokens_are_found_again_by_the_next_turn():
    harness = Harness(200, 4, SchedulerLimits(64, 8))
    first = harness.add(make_request(list(range(10)), 20, ignore_eos=True))
    harness.run_until_idle()
    second = harness.add(make_request([*first.request.token_ids, *harness.generated[first.sequence_id], 1], 4))
    harness.run_until_idle()
    assert second.num_cached_tokens == 28  # 29 of 31 tokens have keys and values: seven full blocks


def test_salts_do_not_share_blocks():
    harness = Harness(200, 4, SchedulerLimits(64, 8))
    harness.add(make_request(list(range(20)), 2, salt=b"a"))
    harness.run_until_idle()
    harness.add(make_request(list(range(20)), 2, salt=b"b"))
    harness.run_until_idle()
    assert harness.scheduler.num_prefix_hit_tokens == 0


def test_a_hit_never_covers_the_last_prompt_token():
    harness = Harness(200, 4, SchedulerLimits(64, 8))
    for _ in range(2):
        sequence = harness.add(make_request(list(range(20)), 2))
        harness.run_until_idle()
    assert sequence.num_cached_tokens == 16


def test_the_older_sequence_is_never_preempted_for_a_younger_one():
    harness = Harness(10, 4, SchedulerLimits(16, 8))
    sequences = [harness.add(make_request([i], 36, ignore_eos=True)) for i in range(4)]
    harness.run_until_idle()
    assert sequences[0].num_preemptions == 0
    assert sum(sequence.num_preemptions for sequence in sequences) > 0


def test_a_failed_sequence_ends_alone_and_leaves_nothing_in_the_prefix_cache():
    harness = Harness(100, 4, SchedulerLimits(64, 8))
    broken = harness.add(make_request(list(range(20)), 5))
    fine = harness.add(make_request([9, 8], 5, ignore_eos=True))
    harness.shard.failing.add(broken.sequence_id)
    harness.run_until_idle()
    assert harness.failed == {broken.sequence_id}
    assert harness.generated[fine.sequence_id] == expected_tokens(fine.request)[0]
    assert harness.blocks.find([hash_block(b"", [0, 1, 2, 3])]) == []


def test_a_sequence_that_was_cancelled_before_its_failure_came_leaves_nothing_in_the_prefix_cache():
    harness = Harness(100, 4, SchedulerLimits(64, 8), depth=1)
    broken = harness.add(make_request(list(range(20)), 5))
    harness.shard.failing.add(broken.sequence_id)
    harness.in_flight.append(harness.scheduler.schedule())
    harness.scheduler.finish(broken)
    assert harness.blocks.num_cached == 5
    harness.run_until_idle()
    assert not harness.failed
    assert harness.blocks.num_cached == 0


def test_a_sequence_that_was_preempted_before_its_failure_came_leaves_nothing_in_the_prefix_cache():
    harness = Harness(12, 4, SchedulerLimits(16, 8))
    for number in range(3):
        harness.add(make_request([number] * 8, 40, ignore_eos=True))
    while not harness.scheduler.num_preemptions:
        harness.advance()
        harness.send()
    broken = next(sequence for sequence in harness.scheduler.waiting if sequence.num_preemptions)
    assert broken.step_last_planned == harness.in_flight[0].step
    assert harness.blocks.find(broken.block_hashes)
    harness.shard.failing.add(broken.sequence_id)
    harness.advance()
    assert harness.failed == {broken.sequence_id}
    assert not harness.blocks.find(broken.block_hashes)
    harness.run_until_idle()


def refuse_one(harness: Harness, num_tokens: int, sharer_prompts: list[list[int]]):
    """A sequence that will be refused, and others that have a prefix of it."""
    refused = harness.add(make_request(list(range(num_tokens)), 5))
    harness.shard.refusing.add(refused.sequence_id)
    sharers = [harness.add(make_request(prompt, 5, ignore_eos=True)) for prompt in sharer_prompts]
    harness.send()
    return refused, sharers


@pytest.mark.parametrize("num_tokens", [21, 60])
def test_who_shares_the_blocks_of_a_refused_sequence_is_computed_again(num_tokens):
    """With 60 tokens it takes two steps, and the second is on its way when it is refused in the first."""
    harness = Harness(100, 4, SchedulerLimits(32, 8))
    refused, sharers = refuse_one(harness, num_tokens, [[*range(20), number] for number in range(3)])
    assert sharers[0].num_cached_tokens == 20
    harness.run_until_idle()
    assert harness.failed == {refused.sequence_id}
    for sharer in sharers:
        assert harness.generated[sharer.sequence_id] == expected_tokens(sharer.request)[0]


def test_a_sharer_of_a_refused_sequence_that_was_cancelled_leaves_nothing_in_the_prefix_cache():
    harness = Harness(100, 4, SchedulerLimits(64, 8), depth=1)
    _, [sharer] = refuse_one(harness, 9, [list(range(20))])
    assert sharer.num_cached_tokens == 8
    harness.scheduler.finish(sharer)
    assert harness.blocks.num_cached == 3
    harness.run_until_idle()
    assert harness.blocks.num_cached == 0


def test_shards_are_lost_while_a_sharer_of_a_refused_sequence_waits():
    harness = Harness(100, 4, SchedulerLimits(64, 8))
    _, [sharer] = refuse_one(harness, 21, [[*range(20), 1]])
    harness.advance()
    harness.lose_shards()
    harness.run_until_idle()
    assert harness.generated[sharer.sequence_id] == expected_tokens(sharer.request)[0]


def test_a_refused_sequence_does_not_disturb_those_that_share_what_both_have_found():
    harness = Harness(100, 4, SchedulerLimits(64, 8))
    harness.add(make_request(list(range(9)), 1))
    harness.run_until_idle()
    refused, [sharer] = refuse_one(harness, 20, [[*range(8), 1]])
    assert (refused.num_cached_tokens, sharer.num_cached_tokens) == (8, 8)
    harness.run_until_idle()
    assert harness.generated[sharer.sequence_id] == expected_tokens(sharer.request)[0]
    assert sharer.num_preemptions == 0


def test_blocks_that_were_never_used_cost_nothing():
    """Or shards that are lost again and again would leave the router's memory in shreds."""
    tracemalloc.start()
    blocks = BlockManager(100_000, 16)
    num_bytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert num_bytes < 10_000
    assert blocks.num_available == 100_000
    taken = blocks.allocate(3)
    blocks.release(taken)
    blocks.check()
    assert blocks.allocate(4) == [0, 1, 2, 3]
    blocks.check()


def test_results_out_of_order_are_refused():
    harness = Harness(100, 4, SchedulerLimits(64, 8))
    harness.add(make_request([1, 2], 5))
    harness.scheduler.schedule()
    with pytest.raises(AssertionError, match="order"):
        harness.scheduler.update(StepResult(2, [], [], []))
