"""The persistent batch: one row a sequence, in columns of fixed capacity.

Applies a plan's changes, lays the step out as flat arrays for the model, and takes the sampled tokens back.
Row numbers are internal; everything outside speaks of sequence ids. All that a plan names is checked here.
"""

import heapq

import numpy as np
from text_generation_proto.columns import Int32Array

from text_generation_shard.sampling_columns import SamplingColumns, reason_to_refuse
from text_generation_shard.scored_prompts import ScoredPrompts, Span
from text_generation_shard.step import NewSequence, PlanError, StepPlan
from text_generation_shard.step_inputs import BatchLimits, BoolArray, Int64Array, PromptInputs, StepInputs

NO_SEQUENCE = -1
# More tokens than any row ever computes: an unused row never decodes.
_NEVER_KNOWN = np.iinfo(np.int32).max


class InputBatch:
    """A sequence keeps its row for as long as it stays: what lies on the device for that row need not move."""

    def __init__(self, limits: BatchLimits, has_device_tables: bool = False) -> None:
        capacity = limits.max_num_sequences
        self.limits = limits
        self.sequence_ids = np.full(capacity, NO_SEQUENCE, np.int32)
        # Sent by the router; later ones were sampled here.
        self.num_known_tokens = np.full(capacity, _NEVER_KNOWN, np.int32)
        self.num_computed_tokens = np.zeros(capacity, np.int32)
        self.last_token_ids = np.zeros(capacity, np.int64)  # a decoding row's next input
        self.num_blocks = np.zeros(capacity, np.int32)
        self.block_tables = np.zeros((capacity, limits.max_blocks_per_sequence), np.int32)
        self.sampling = SamplingColumns(capacity, limits.vocab_size)
        self._scored_prompts = ScoredPrompts()
        self._known_tokens: dict[int, Int32Array] = {}  # sequence id -> tokens, until all are computed
        self._rows: dict[int, int] = {}  # sequence id -> row
        self._free_rows = list(range(capacity))  # a heap: low rows first
        self._has_device_tables = has_device_tables
        self._table_changes: list[tuple[int, int]] = []  # first place in the flattened block tables, number of blocks
        # The router may name failed sequences until it learns of it and removes them. One that failed in a step keeps
        # its row till then, so that the ranks of a group, which end steps at different times, run the same rows.
        self._failed_ids: set[int] = set()

    @property
    def num_sequences(self) -> int:
        """Rows in use."""
        return len(self._rows)

    def clear(self) -> None:
        """Forget every sequence."""
        for sequence_id in list(self._rows):
            self._remove(sequence_id)
        self._failed_ids.clear()
        self._table_changes.clear()

    def apply(self, plan: StepPlan) -> dict[int, str]:
        """Apply a plan's changes; answers the new sequences that are refused, with the reason."""
        for sequence_id in plan.removed_sequence_ids.tolist():
            if not self._is_refused(sequence_id):
                self._remove(sequence_id)
            self._failed_ids.discard(sequence_id)
        failures = {}
        for sequence in plan.new_sequences:
            if reason := self._add(sequence):
                failures[sequence.sequence_id] = reason
        self._grow(plan)
        return failures

    def prepare(self, plan: StepPlan) -> StepInputs | None:
        """Lay out the step; None when no sequence computes anything."""
        query_lengths = self._query_lengths(plan)
        rows = np.flatnonzero(query_lengths)
        if not len(rows):
            return None
        lengths = query_lengths[rows]
        query_starts = np.zeros(len(rows) + 1, np.int32)
        np.cumsum(lengths, out=query_starts[1:])
        num_computed = self.num_computed_tokens[rows]
        sequence_lengths = num_computed + lengths
        self._check_capacity(rows, sequence_lengths, int(query_starts[-1]))

        token_rows = np.repeat(rows, lengths)
        positions = np.arange(len(token_rows)) - np.repeat(query_starts[:-1] - num_computed, lengths)
        block_size = self.limits.block_size
        slots = self.block_tables[token_rows, positions // block_size].astype(np.int64) * block_size
        input_ids = self.last_token_ids[token_rows]
        for sequence_id in plan.prefill_sequence_ids.tolist():
            if not self._is_refused(sequence_id):
                self._copy_known_tokens(sequence_id, rows, query_starts, input_ids)

        is_sampling = sequence_lengths >= self.num_known_tokens[rows]
        return StepInputs(
            rows=rows,
            input_ids=input_ids,
            positions=positions,
            slot_mapping=slots + positions % block_size,
            query_starts=query_starts,
            sequence_lengths=sequence_lengths,
            is_decoding=num_computed >= self.num_known_tokens[rows],
            max_query_length=int(lengths.max()),
            max_sequence_length=int(sequence_lengths.max()),
            sampling_rows=rows[is_sampling],
            sampling_indices=query_starts[1:][is_sampling].astype(np.int64) - 1,
            sampling_positions=sequence_lengths[is_sampling].astype(np.int64),
            prompt=self._prompt_inputs(plan, rows, query_starts) if self._scored_prompts else None,
        )

    def advance(self, inputs: StepInputs) -> Int32Array:
        """Count a step's tokens as computed, before its outcome is known; answers the ids of the sampling rows."""
        self.num_computed_tokens[inputs.rows] = inputs.sequence_lengths
        sequence_ids = self.sequence_ids[inputs.sampling_rows]
        for sequence_id in sequence_ids.tolist() if self._known_tokens else ():
            self._known_tokens.pop(sequence_id, None)
        return sequence_ids

    def settle(
        self, inputs: StepInputs, sequence_ids: Int32Array, token_ids: Int64Array, is_valid: BoolArray
    ) -> BoolArray:
        """Take the tokens of the sequences that `advance` answered; those without a valid one have failed.

        Answers which of them the router is to be told of: not those that had failed a step earlier.
        """
        is_there = self.sequence_ids[inputs.sampling_rows] == sequence_ids
        self.last_token_ids[inputs.sampling_rows[is_there]] = np.where(is_valid, token_ids, 0)[is_there]
        is_told = np.ones(len(sequence_ids), np.bool_)
        if self._failed_ids:
            is_told = ~np.isin(sequence_ids, list(self._failed_ids))
        self._failed_ids.update(sequence_ids[~is_valid & is_there].tolist())
        return is_told

    def tables(self, inputs: StepInputs) -> Int32Array:
        """The block tables of a step's sequences, as many columns as the longest needs."""
        num_blocks = -(-inputs.max_sequence_length // self.limits.block_size)
        return self.block_tables[inputs.rows, :num_blocks]

    def take_table_changes(self) -> tuple[Int64Array, Int32Array]:
        """Where the flattened block tables changed since the last call, and what stands there now."""
        if not self._table_changes:
            return np.empty(0, np.int64), np.empty(0, np.int32)
        starts, counts = np.array(self._table_changes, np.int64).T
        self._table_changes.clear()
        places = np.arange(counts.sum()) + np.repeat(starts - (np.cumsum(counts) - counts), counts)
        return places, self.block_tables.reshape(-1)[places]

    def _is_refused(self, sequence_id: int) -> bool:
        """Whether it never entered the batch, and the router has not removed it yet."""
        return sequence_id in self._failed_ids and sequence_id not in self._rows

    def _remove(self, sequence_id: int) -> None:
        row = self._rows.pop(sequence_id, None)
        if row is None:
            raise PlanError(f"sequence {sequence_id} is removed but not in the batch")
        self._known_tokens.pop(sequence_id, None)
        self._scored_prompts.remove(sequence_id)
        self.sampling.clear(row)
        self.sequence_ids[row] = NO_SEQUENCE
        self.num_known_tokens[row] = _NEVER_KNOWN
        self.num_computed_tokens[row] = 0
        heapq.heappush(self._free_rows, row)

    def _add(self, sequence: NewSequence) -> str | None:
        """Add a row; answers why the sequence fails alone, if it does."""
        sequence_id = sequence.sequence_id
        if sequence_id in self._rows or sequence_id in self._failed_ids:
            raise PlanError(f"sequence {sequence_id} is new but already in the batch")
        num_tokens = len(sequence.token_ids)
        if not 0 <= sequence.num_computed_tokens < num_tokens:
            raise PlanError(f"sequence {sequence_id} has {num_tokens} tokens, {sequence.num_computed_tokens} computed")
        if not 1 <= sequence.num_prompt_tokens <= num_tokens:
            raise PlanError(f"sequence {sequence_id} has {sequence.num_prompt_tokens} of {num_tokens} prompt tokens")
        self._check_block_ids(sequence.block_ids)
        if reason := self._reason_to_refuse(sequence):
            self._failed_ids.add(sequence_id)
            return reason
        if not self._free_rows:
            raise PlanError(f"more than {self.limits.max_num_sequences} sequences in the batch")
        row = heapq.heappop(self._free_rows)
        self._rows[sequence_id] = row
        self._known_tokens[sequence_id] = sequence.token_ids
        self.sequence_ids[row] = sequence_id
        self.num_known_tokens[row] = num_tokens
        self.num_computed_tokens[row] = sequence.num_computed_tokens
        self.last_token_ids[row] = 0
        self.num_blocks[row] = 0
        self._append_blocks(row, sequence.block_ids)
        self.sampling.set(row, sequence)
        if sequence.scores_prompt:
            self._scored_prompts.add(sequence)
        return None

    def _reason_to_refuse(self, sequence: NewSequence) -> str | None:
        """What is wrong with a sequence that a client may have caused: it ends that request alone."""
        token_ids = sequence.token_ids
        if len(token_ids) > self.limits.max_sequence_length:
            return f"{len(token_ids)} tokens, but at most {self.limits.max_sequence_length} fit a sequence"
        if int(token_ids.min()) < 0 or int(token_ids.max()) >= self.limits.vocab_size:
            return f"a token id is outside the vocabulary of {self.limits.vocab_size}"
        return reason_to_refuse(sequence, self.limits.vocab_size)

    def _grow(self, plan: StepPlan) -> None:
        """Append blocks to the tables that grow."""
        counts = plan.grown_num_blocks
        if len(counts) != len(plan.grown_sequence_ids):
            raise PlanError(f"{len(plan.grown_sequence_ids)} sequences grow, but {len(counts)} say by how much")
        if not len(counts):
            if len(plan.grown_block_ids):
                raise PlanError("blocks without a sequence that grows")
            return
        if int(counts.min()) < 1 or int(counts.sum(dtype=np.int64)) != len(plan.grown_block_ids):
            raise PlanError(f"grown_num_blocks does not add up to {len(plan.grown_block_ids)} blocks")
        self._check_block_ids(plan.grown_block_ids)
        start = 0
        for sequence_id, count in zip(plan.grown_sequence_ids.tolist(), counts.tolist(), strict=True):
            if not self._is_refused(sequence_id):
                self._append_blocks(self._row(sequence_id), plan.grown_block_ids[start : start + count])
            start += count

    def _append_blocks(self, row: int, block_ids: Int32Array) -> None:
        start = int(self.num_blocks[row])
        end = start + len(block_ids)
        if end > self.limits.max_blocks_per_sequence:
            raise PlanError(
                f"sequence {self.sequence_ids[row]} has {end} blocks,"
                f" but at most {self.limits.max_blocks_per_sequence} fit a sequence"
            )
        self.block_tables[row, start:end] = block_ids
        self.num_blocks[row] = end
        if self._has_device_tables and len(block_ids):
            self._table_changes.append((row * self.limits.max_blocks_per_sequence + start, len(block_ids)))

    def _query_lengths(self, plan: StepPlan) -> Int32Array:
        """Tokens each row computes: one where all known tokens are computed, else what the plan names."""
        query_lengths = (self.num_computed_tokens >= self.num_known_tokens).astype(np.int32)
        if len(plan.prefill_sequence_ids) != len(plan.prefill_num_tokens):
            raise PlanError("prefill_sequence_ids and prefill_num_tokens differ in length")
        for sequence_id, count in zip(
            plan.prefill_sequence_ids.tolist(), plan.prefill_num_tokens.tolist(), strict=True
        ):
            if self._is_refused(sequence_id):
                continue
            row = self._row(sequence_id)
            num_left = int(self.num_known_tokens[row]) - int(self.num_computed_tokens[row])
            if query_lengths[row] or not 1 <= count <= num_left:
                raise PlanError(
                    f"sequence {sequence_id} is to compute {count} known tokens, but {num_left} are left"
                    + (" and it already computes in this step" if query_lengths[row] else "")
                )
            query_lengths[row] = count
        return query_lengths

    def _copy_known_tokens(
        self, sequence_id: int, rows: Int64Array, query_starts: Int32Array, input_ids: Int64Array
    ) -> None:
        """Fill in the input ids of a sequence that computes known tokens."""
        span = self._span(sequence_id, rows, query_starts)
        known = self._known_tokens[sequence_id][span.position : span.position + span.num_tokens]
        input_ids[span.start : span.start + span.num_tokens] = known

    def _span(self, sequence_id: int, rows: Int64Array, query_starts: Int32Array) -> Span:
        """What a sequence that computes known tokens computes in this step."""
        row = self._rows[sequence_id]
        index = int(np.searchsorted(rows, row))
        start, end = int(query_starts[index]), int(query_starts[index + 1])
        return Span(sequence_id, start, int(self.num_computed_tokens[row]), end - start)

    def _prompt_inputs(self, plan: StepPlan, rows: Int64Array, query_starts: Int32Array) -> PromptInputs | None:
        """The prompt tokens whose log-probabilities this step tells."""
        ids = [sequence_id for sequence_id in plan.prefill_sequence_ids.tolist() if sequence_id in self._scored_prompts]
        return self._scored_prompts.inputs(self._span(sequence_id, rows, query_starts) for sequence_id in ids)

    def _check_capacity(self, rows: Int64Array, sequence_lengths: Int32Array, num_tokens: int) -> None:
        if num_tokens > self.limits.max_step_tokens:
            raise PlanError(f"{num_tokens} tokens in a step of at most {self.limits.max_step_tokens}")
        missing = sequence_lengths > self.num_blocks[rows] * self.limits.block_size
        if missing.any():
            row = rows[missing][0]
            raise PlanError(
                f"sequence {self.sequence_ids[row]} needs room for {sequence_lengths[missing][0]} tokens,"
                f" but has {self.num_blocks[row]} blocks"
            )

    def _check_block_ids(self, block_ids: Int32Array) -> None:
        if len(block_ids) and (int(block_ids.min()) < 0 or int(block_ids.max()) >= self.limits.num_blocks):
            raise PlanError(f"a block id is outside the {self.limits.num_blocks} blocks")

    def _row(self, sequence_id: int) -> int:
        row = self._rows.get(sequence_id)
        if row is None:
            raise PlanError(f"sequence {sequence_id} is not in the batch")
        return row
