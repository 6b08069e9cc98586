"""The scheduler: who runs in the next step, on how many tokens, in which blocks. Pure: no I/O, no clock.

One rule: a sequence wants `num_tokens - num_computed_tokens`; it gets what the step's token budget and the free
blocks allow. Decode, prefill, chunked prefill, prefix hits and recompute after a preemption are all that rule.
Decodes go first, so a long prompt never stalls running streams.

Plans are made before the results of earlier ones are known (design: two in flight). That is safe because plans
execute in order: a block freed here may be given away at once, since a step that still writes into it runs before
the step of its new owner.
"""

import math
from bisect import insort
from dataclasses import dataclass
from itertools import repeat

from text_generation_router.block_manager import BlockManager
from text_generation_router.prefix_sharing import PrefixSharing
from text_generation_router.sequence import Sequence, SequenceState
from text_generation_router.step import NewSequence, StepPlan, StepResult
from text_generation_router.token_scores import TopTokens
from text_generation_router.token_stream import FinishReason
from text_generation_router.valid_request import ValidRequest
from text_generation_router.waiting_queue import WaitingQueue

# Beside decodes a step ends at a whole part of the budget: a GPU rounds up to such sizes.
NUM_BUDGET_PARTS = 4
# Beside decodes the prompts of a step have so many tokens, and so many more for each decode. In longer steps they are
# computed no faster, and in each step every decode gets a token.
MIN_PROMPT_TOKENS = 512
PROMPT_TOKENS_PER_DECODE = 4
WATERMARK_SHARE = 0.01  # of all blocks, kept free at admission
MAX_LOSSES = 2  # of the shards while one sequence ran: it may have caused them


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """What one step and one batch may hold."""

    max_step_tokens: int  # token budget of one step
    max_num_sequences: int  # sequences in the batch
    equal_context_tokens: float = math.inf  # cached tokens whose attention takes a token as long as all products do


@dataclass(slots=True)
class Progress:
    """What a result changed for one sequence: one more token, or the reason why it has none.

    Nobody changes one; it is not frozen because that would treble the cost of making it.
    """

    sequence: Sequence
    token_id: int
    logprob: float
    finish_reason: FinishReason | None
    failure: str | None = None
    top_tokens: TopTokens = ()


class Scheduler:
    """Owns every sequence from arrival to end, and the block manager."""

    def __init__(self, limits: SchedulerLimits, blocks: BlockManager, eos_token_ids: frozenset[int]) -> None:
        assert limits.max_num_sequences <= limits.max_step_tokens, "decodes of a full batch must fit in a step"
        self.limits = limits
        self.blocks = blocks
        self.eos_token_ids = eos_token_ids
        self.waiting = WaitingQueue()
        self.running: list[Sequence] = []  # in the batch, by arrival
        self._by_id: dict[int, Sequence] = {}
        self._removed: list[int] = []  # left the batch since the last plan
        self._ended_in_flight: dict[int, Sequence] = {}  # ended, but a result may still say that they failed
        self._prefixes = PrefixSharing(blocks)
        self._on_trial: Sequence | None = None  # the suspect that joined the batch last
        self._next_sequence_id = 1
        self._last_step = 0
        self._last_step_ended = 0
        self.num_prefix_query_tokens = 0
        self.num_prefix_hit_tokens = 0
        self.num_preemptions = 0
        self.num_recomputed_tokens = 0
        self.num_dropped_tokens = 0

    def add(self, request: ValidRequest) -> Sequence:
        """Queue a request as a new sequence."""
        sequence = Sequence(self._next_sequence_id, request)
        assert self.blocks.num_blocks_for(sequence.max_tokens) <= self.blocks.num_blocks
        self._next_sequence_id += 1
        self._by_id[sequence.sequence_id] = sequence
        self.waiting.add(sequence)
        return sequence

    def finish(self, sequence: Sequence) -> None:
        """End a sequence, whatever its state, and free its blocks; results still in flight for it are dropped."""
        if sequence.state is SequenceState.RUNNING:
            self._leave_batch(sequence)
        elif sequence.state is SequenceState.WAITING:
            self.waiting.remove(sequence)
        if sequence.state is not SequenceState.FINISHED:
            if (num_generated := len(sequence.token_ids) - sequence.num_prompt_tokens) > 0:
                self.waiting.note_generated(num_generated)
            sequence.state = SequenceState.FINISHED
            del self._by_id[sequence.sequence_id]
            if sequence.step_last_planned > self._last_step_ended:
                self._ended_in_flight[sequence.sequence_id] = sequence
            self._free_blocks(sequence)

    def _leave_batch(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._removed.append(sequence.sequence_id)
        self._prefixes.left(sequence)

    def _free_blocks(self, sequence: Sequence) -> None:
        self.blocks.release(sequence.block_table)
        sequence.block_table = []

    def start_over(self) -> list[Sequence]:
        """The shards are lost, and all blocks with them: what was in the batch waits to be computed again.

        Answers the sequences, not ended yet, that have run in two losses. Those that ran return one at a time, so that
        a second loss, if one of them causes it, does not hit those behind it.
        """
        batch = [s for s in self._by_id.values() if s.state in (SequenceState.RUNNING, SequenceState.DRAINING)]
        for sequence in batch:
            sequence.note_loss()
            self.waiting.add(sequence)
        for sequence in self._by_id.values():
            sequence.step_last_planned = sequence.last_void_step = 0
            sequence.num_pending_tokens = 0  # also of one that was preempted with a token on its way
            sequence.awaited_key = None
        self.running.clear()
        self.blocks.clear(self.blocks.num_blocks)
        self._removed.clear()
        self._ended_in_flight.clear()
        self._prefixes.clear()
        self._on_trial = None
        self._last_step = self._last_step_ended = 0
        return [sequence for sequence in batch if sequence.num_restarts >= MAX_LOSSES]

    def grammars(self) -> set[str]:
        """The grammars of the sequences that have not ended."""
        return {sequence.request.grammar for sequence in self._by_id.values()} - {""}

    @property
    def num_unfinished(self) -> int:
        """Sequences that have not ended: waiting, running, or with their last tokens in flight."""
        return len(self._by_id)

    def unfinished_ids(self) -> list[int]:
        """Their ids."""
        return list(self._by_id)

    def schedule(self) -> StepPlan | None:
        """The next plan, or None when there is nothing to compute and nothing to tell the shards."""
        plan = StepPlan(step=self._last_step + 1)
        self._retire_exhausted()
        self._plan_decodes(plan)
        self._plan_running_prefills(plan)
        self._admit(plan)
        is_idle = self._last_step_ended == self._last_step
        assert not (plan.is_empty and is_idle and self.running), "a batch that nothing can move"
        if plan.is_empty and not (is_idle and self._removed):
            return None
        return self._close(plan)

    def probe(self) -> StepPlan:
        """A plan that computes nothing, to see whether the shards answer."""
        return self._close(StepPlan(step=self._last_step + 1))

    def _close(self, plan: StepPlan) -> StepPlan:
        self._last_step = plan.step
        plan.removed_sequence_ids, self._removed = self._removed, []
        return plan

    def _retire_exhausted(self) -> None:
        """Take sequences out of the batch whose last token is already on its way."""
        for sequence in [s for s in self.running if len(s.token_ids) + s.num_pending_tokens >= s.max_tokens]:
            self._leave_batch(sequence)
            sequence.state = SequenceState.DRAINING

    def _plan_decodes(self, plan: StepPlan) -> None:
        """One token for each sequence that decodes.

        Runs for every sequence of every step, so what most steps do to most sequences calls nothing.
        """
        running, block_size = self.running, self.blocks.block_size
        index = 0
        while index < len(running):
            sequence = running[index]
            index += 1
            num_computed = sequence.num_computed_tokens
            if num_computed < sequence.num_joined_tokens:
                continue  # it is prefilling
            if num_computed >= len(sequence.block_table) * block_size and not self._make_room(sequence, plan):
                continue  # it was the youngest and gave way itself
            sequence.step_last_planned = plan.step
            sequence.num_computed_tokens = num_computed + 1
            sequence.num_pending_tokens += 1
            plan.num_decode_tokens += 1
            if not (num_computed + 1) % block_size:
                self._prefixes.offer(sequence)

    def _make_room(self, sequence: Sequence, plan: StepPlan) -> bool:
        """Give a decoding sequence its next block if it needs one, preempting the youngest until there is one."""
        num_missing = self._num_missing_blocks(sequence, 1)
        while num_missing > self.blocks.num_available:
            victim = self.running[-1]
            self._preempt(victim, plan)
            if victim is sequence:
                return False
        self._grow(sequence, num_missing, plan)
        return True

    def _plan_running_prefills(self, plan: StepPlan) -> None:
        for sequence in [s for s in self.running if s.num_computed_tokens < s.num_joined_tokens]:
            num_tokens = self._chunk(sequence, plan)
            if num_tokens:
                self._grow(sequence, self._num_missing_blocks(sequence, num_tokens), plan)
                self._prefill(sequence, num_tokens, plan)

    def _chunk(self, sequence: Sequence, plan: StepPlan) -> int:
        """How many tokens budget and blocks let a prefilling sequence compute now."""
        room = (len(sequence.block_table) + self.blocks.num_available) * self.blocks.block_size
        num_computed = sequence.num_computed_tokens
        return min(self._budget(plan, num_computed), room - num_computed, sequence.num_wanted_tokens)

    def _budget(self, plan: StepPlan, num_context_tokens: int) -> int:
        """How many tokens behind such a context still have room in the step.

        While others decode, attention to the context counts like tokens, so that it does not hold them up for longer,
        and the fewer decode, the shorter the step is. It ends at a whole part of the budget, and its first prompt has
        at least half a part.
        """
        num_tokens = plan.num_decode_tokens + plan.num_prefill_tokens
        limit = self.limits.max_step_tokens
        if plan.num_decode_tokens:
            part = max(1, limit // NUM_BUDGET_PARTS)
            left_cost_tokens = max(0.0, limit - plan.num_decode_tokens - plan.prefill_cost_tokens)
            num_parts = round((num_tokens + left_cost_tokens / self._token_cost(num_context_tokens)) / part)
            most_tokens = MIN_PROMPT_TOKENS + (1 + PROMPT_TOKENS_PER_DECODE) * plan.num_decode_tokens
            num_parts = min(num_parts, -(-most_tokens // part))
            if not plan.num_prefill_tokens:
                num_parts = max(num_parts, round(num_tokens / part) + 1)
            limit = min(limit, num_parts * part)
        return max(0, limit - num_tokens)

    def _token_cost(self, num_context_tokens: int) -> float:
        return 1 + num_context_tokens / self.limits.equal_context_tokens

    def _preempt(self, sequence: Sequence, plan: StepPlan) -> None:
        self._return_to_queue(sequence)
        plan.num_preempted += 1

    def _return_to_queue(self, sequence: Sequence) -> None:
        """Take a sequence's blocks back; it waits, and computes all its tokens again later."""
        if sequence.state is SequenceState.RUNNING:
            self._leave_batch(sequence)
        self._free_blocks(sequence)
        sequence.state = SequenceState.WAITING
        sequence.num_lost_tokens = sequence.num_computed_tokens
        sequence.num_computed_tokens = 0
        sequence.num_registered_blocks = 0
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.add(sequence)

    def _admit(self, plan: StepPlan) -> None:
        if plan.num_preempted or len(self.running) >= self.limits.max_num_sequences or self._has_trial():
            return
        for sequence in self.waiting:
            if len(self.running) >= self.limits.max_num_sequences or self._budget(plan, 0) <= 0:
                return
            if sequence.step_last_planned > self._last_step_ended:
                return  # preempted, and a plan that names it is still in flight
            if self._prefixes.is_waiting(sequence):
                continue
            hits = self._prefixes.find(sequence)
            if sequence.awaited_key is not None:
                continue
            if not self._fits(sequence, hits) or self._budget(plan, len(hits) * self.blocks.block_size) <= 0:
                return
            self._join_batch(sequence, hits, plan)
            if sequence.is_suspect:
                self._on_trial = sequence
                return

    def _has_trial(self) -> bool:
        """Whether a suspect is in the batch, which nobody joins meanwhile."""
        on_trial = self._on_trial
        return (
            on_trial is not None
            and on_trial.is_suspect
            and on_trial.state in (SequenceState.RUNNING, SequenceState.DRAINING)
        )

    def _fits(self, sequence: Sequence, hits: list[int]) -> bool:
        """Whether all known tokens find room beside what running prefills still need, above the watermark.

        So running prefills alone can never block each other: what they still need is available as soon as the
        decodes that took it have ended.
        """
        num_needed = self.blocks.num_blocks_for(len(sequence.token_ids)) - len(hits)
        num_needed += self.blocks.num_cached_among(hits)
        if not self.running:
            return num_needed <= self.blocks.num_available
        num_promised = sum(
            self.blocks.num_blocks_for(len(other.token_ids)) - len(other.block_table)
            for other in self.running
            if other.is_prefilling
        )
        watermark = int(self.blocks.num_blocks * WATERMARK_SHARE) + len(self.running) // 2 + 1
        return num_needed + num_promised + watermark <= self.blocks.num_available

    def _join_batch(self, sequence: Sequence, hits: list[int], plan: StepPlan) -> None:
        num_hit_tokens = len(hits) * self.blocks.block_size
        self.blocks.hold(hits)
        sequence.block_table = list(hits)
        sequence.num_computed_tokens = num_hit_tokens
        sequence.num_joined_tokens = len(sequence.token_ids)
        sequence.num_registered_blocks = len(hits)
        if sequence.has_had_turn:
            num_recomputed_tokens = max(0, sequence.num_lost_tokens - num_hit_tokens)
            sequence.num_recomputed_tokens += num_recomputed_tokens
            self.num_recomputed_tokens += num_recomputed_tokens
        else:
            sequence.num_cached_tokens = num_hit_tokens
            self.num_prefix_query_tokens += sequence.num_prompt_tokens
            self.num_prefix_hit_tokens += num_hit_tokens
        self.waiting.join(sequence)
        sequence.state = SequenceState.RUNNING
        insort(self.running, sequence, key=lambda other: other.arrival)
        num_tokens = self._chunk(sequence, plan)
        sequence.block_table += self.blocks.allocate(self._num_missing_blocks(sequence, num_tokens))
        plan.new_sequences.append(
            NewSequence(
                sequence.sequence_id,
                sequence.token_ids.copy(),
                sequence.num_prompt_tokens,
                num_hit_tokens,
                sequence.block_table.copy(),
                sequence.request.sampling,
                sequence.request.grammar,
                sequence.request.scores_prompt,
                sequence.request.prompt_top_n_tokens,
            )
        )
        self._prefixes.joined(sequence)
        self._prefill(sequence, num_tokens, plan)

    def _num_missing_blocks(self, sequence: Sequence, num_tokens: int) -> int:
        num_blocks = self.blocks.num_blocks_for(sequence.num_computed_tokens + num_tokens)
        return max(0, num_blocks - len(sequence.block_table))

    def _grow(self, sequence: Sequence, num_blocks: int, plan: StepPlan) -> None:
        if num_blocks:
            blocks = self.blocks.allocate(num_blocks)
            sequence.block_table += blocks
            plan.grown_sequence_ids.append(sequence.sequence_id)
            plan.grown_num_blocks.append(num_blocks)
            plan.grown_block_ids += blocks

    def _prefill(self, sequence: Sequence, num_tokens: int, plan: StepPlan) -> None:
        plan.prefill_sequence_ids.append(sequence.sequence_id)
        plan.prefill_num_tokens.append(num_tokens)
        plan.num_prefill_tokens += num_tokens
        plan.prefill_cost_tokens += num_tokens * self._token_cost(sequence.num_computed_tokens)
        self._compute(sequence, num_tokens, plan)

    def _compute(self, sequence: Sequence, num_tokens: int, plan: StepPlan) -> None:
        """Count tokens as computed; the step that computes the last known token samples one more."""
        assert num_tokens > 0
        sequence.step_last_planned = plan.step
        sequence.num_computed_tokens += num_tokens
        if not sequence.is_prefilling:
            sequence.num_pending_tokens += 1
        self._prefixes.offer(sequence)

    def update(self, result: StepResult) -> list[Progress]:
        """Take a step's tokens in; sequences that end by length or EOS are finished here.

        Rows of sequences that ended meanwhile are dropped, and counted, and so are those of sequences that read what a
        failed one never wrote.
        """
        assert result.step == self._last_step_ended + 1, "results come in the order of the plans"
        self._last_step_ended = result.step
        self._note_scores(result)
        progress = self._end_failed(result)
        # Endless nothing where no sequence asked for its most likely tokens.
        rows = zip(
            result.sequence_ids, result.token_ids, result.logprobs, result.top_tokens or repeat(()), strict=False
        )
        for sequence_id, token_id, logprob, top_tokens in rows:
            sequence = self._by_id.get(sequence_id)
            if sequence is None or result.step <= sequence.last_void_step:
                self.num_dropped_tokens += 1
                continue
            reason = self._append(sequence, token_id)
            progress.append(Progress(sequence, token_id, logprob, reason, None, top_tokens))
            if reason is not None:
                self.finish(sequence)
        for sequence in [*self._ended_in_flight.values()]:
            if sequence.step_last_planned <= result.step:
                del self._ended_in_flight[sequence.sequence_id]
        if not self._by_id:
            self.check_idle()
        return progress

    def _note_scores(self, result: StepResult) -> None:
        for scored in result.scored_prompts:
            sequence = self._by_id.get(scored.sequence_id)
            if sequence is not None and sequence.prompt_scores is not None:
                end = scored.first_position + len(scored.scores)
                sequence.prompt_scores[scored.first_position : end] = scored.scores

    def _end_failed(self, result: StepResult) -> list[Progress]:
        """End the sequences whose row failed; what the row computed is not shared, wherever its blocks are by now."""
        progress = []
        for sequence_id, message in result.failures.items():
            sequence = self._by_id.get(sequence_id) or self._ended_in_flight.get(sequence_id)
            if sequence is None or result.step <= sequence.last_void_step:
                continue
            others = [*self._by_id.values(), *self._ended_in_flight.values()]
            for sharer in self._prefixes.withdraw(sequence, others):
                self._begin_again(sharer)
            if sequence_id in self._by_id:
                progress.append(Progress(sequence, -1, 0.0, None, message))
                self.finish(sequence)
        return progress

    def _begin_again(self, sequence: Sequence) -> None:
        """Have a sequence computed anew from the tokens it has; what is in flight for it comes to nothing."""
        if sequence.state in (SequenceState.RUNNING, SequenceState.DRAINING):
            self._return_to_queue(sequence)
        sequence.num_pending_tokens = 0
        sequence.last_void_step = sequence.step_last_planned

    def _append(self, sequence: Sequence, token_id: int) -> FinishReason | None:
        sequence.token_ids.append(token_id)
        sequence.num_pending_tokens -= 1
        assert sequence.num_pending_tokens >= 0
        num_tokens = len(sequence.token_ids)
        if not num_tokens % self.blocks.block_size:
            self._prefixes.offer(sequence)
        if token_id in sequence.request.stop_token_ids:
            return FinishReason.STOP_SEQUENCE
        if num_tokens >= sequence.max_tokens:
            return FinishReason.LENGTH
        if token_id in self.eos_token_ids and not sequence.request.ignore_eos:
            return FinishReason.EOS_TOKEN
        return None

    def check_idle(self) -> None:
        """Assert that nothing is left behind when no sequence is."""
        assert not self.running
        assert not len(self.waiting)
        assert self.blocks.num_held == 0, "blocks are held although nothing runs"
        self._prefixes.check_idle()
        assert self._last_step_ended < self._last_step or not self._ended_in_flight
