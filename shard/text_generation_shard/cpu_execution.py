"""Steps on a CPU: at once, one after the other."""

import time
from dataclasses import dataclass

import numpy as np
import torch
from text_generation_kernels.cpu_attention_plan import CpuAttentionPlan
from text_generation_proto.columns import Int32Array

from text_generation_shard import distributed
from text_generation_shard.changed_logits import DEFAULT_WATERMARK, ChangedLogits, Watermark
from text_generation_shard.execution import CausalModel, StepOutput
from text_generation_shard.forward_context import ForwardContext, forward_context
from text_generation_shard.grammar_masks import StepMasks
from text_generation_shard.input_batch import InputBatch
from text_generation_shard.kv_cache import KvCaches
from text_generation_shard.sampler import sample_tokens
from text_generation_shard.step_inputs import BatchLimits, StepInputs
from text_generation_shard.token_scores import score_prompt, tell_prompt_scores


@dataclass(frozen=True, slots=True)
class FinishedStep:
    """A step that ended before it could be waited for."""

    output: StepOutput

    def choose_tokens(self) -> None:
        """Nothing: they are chosen."""

    def is_done(self) -> bool:
        """True."""
        return True

    def wait(self) -> StepOutput:
        """The step's tokens."""
        return self.output


class CpuExecution:
    """See `Execution`."""

    overlaps = False
    has_tables = False

    def __init__(self, model: CausalModel, watermark: Watermark = DEFAULT_WATERMARK) -> None:
        self._model = model
        self._watermark = watermark
        self._kv_caches: KvCaches = []
        self._last_end_ns = 0

    def run_worst_case(self, limits: BatchLimits, kv_caches: KvCaches) -> None:
        """The largest prefill, and the largest decode batch with one sequence at its longest; both sampled.

        All sequences at their longest would take 8 s on 2 cores with the demo model, and nothing is measured by it:
        the KV memory of a CPU is a share of the whole, not what steps leave of it.
        """
        # A step's tokens may all belong to one sequence; what is beyond its longest, to the next ones.
        longest = limits.max_sequence_length
        num_tokens = min(limits.max_step_tokens, longest * limits.max_num_sequences)
        num_prefills = -(-num_tokens // longest)
        prefills = np.full(num_prefills, longest, np.int32)
        prefills[-1] = num_tokens - longest * (num_prefills - 1)
        decodes = np.ones(min(limits.max_num_sequences, limits.max_step_tokens), np.int32)
        contexts = decodes.copy()
        contexts[0] = longest
        batch, changed = _batch_hardest_to_sample(limits), self._changed_logits(limits)
        for query_lengths, sequence_lengths in ((prefills, prefills), (decodes, contexts)):
            inputs = sequences_in_one_block(query_lengths, sequence_lengths, limits.block_size)
            num_blocks = -(-inputs.max_sequence_length // limits.block_size)
            hidden = self._forward(inputs, np.zeros((len(query_lengths), num_blocks), np.int32), kv_caches)
            sample_tokens(self._logits(hidden, inputs), batch, inputs, changed)

    def start(self, limits: BatchLimits, kv_caches: KvCaches) -> None:
        """Steps write to and read from these caches."""
        self._kv_caches = kv_caches
        self._changed = self._changed_logits(limits)

    def _changed_logits(self, limits: BatchLimits) -> ChangedLogits:
        return ChangedLogits(limits.max_num_sequences, limits.vocab_size, torch.device("cpu"), self._watermark)

    def update_rows(self, batch: InputBatch) -> None:
        """Rank 0 alone chooses tokens."""
        row_changes = batch.sampling.take_row_changes()
        if distributed.rank() == 0:
            self._changed.update(row_changes)

    def launch(self, inputs: StepInputs, batch: InputBatch, masks: StepMasks | None) -> FinishedStep:
        """Run a step; the step before it has ended, so its masks are there or being made."""
        started = time.perf_counter_ns()
        hidden = self._forward(inputs, batch.tables(inputs), self._kv_caches)
        logits = self._logits(hidden, inputs)
        forward_ended = time.perf_counter_ns()
        tokens = sample_tokens(logits, batch, inputs, self._changed, masks)
        scores = None
        if inputs.prompt is not None:
            scores = tell_prompt_scores(inputs.prompt, score_prompt(self._model.compute_logits, hidden, inputs.prompt))
        ended = time.perf_counter_ns()
        idle_ns = started - self._last_end_ns if self._last_end_ns else 0
        self._last_end_ns = ended
        return FinishedStep(
            StepOutput(
                tokens.token_ids,
                tokens.logprobs,
                tokens.is_valid,
                forward_ended - started,
                ended - forward_ended,
                idle_ns,
                tokens.top_tokens,
                scores,
            )
        )

    def _forward(self, inputs: StepInputs, tables: Int32Array, kv_caches: KvCaches) -> torch.Tensor:
        """Hidden states of the tokens that sample; of all in a step that scores a prompt."""
        plan = CpuAttentionPlan(
            tables, inputs.query_starts, inputs.sequence_lengths, inputs.positions, inputs.slot_mapping, kv_caches[0][0]
        )
        with forward_context(ForwardContext(kv_caches, plan)):
            rows = None
            if inputs.prompt is None and inputs.num_samples < inputs.num_tokens:
                rows = torch.from_numpy(inputs.sampling_indices)
            return self._model(torch.from_numpy(inputs.input_ids), torch.from_numpy(inputs.positions), rows)

    def _logits(self, hidden: torch.Tensor, inputs: StepInputs) -> torch.Tensor | None:
        """Logits of the sampling rows; None where no row samples."""
        if not inputs.num_samples:
            return None
        if inputs.num_samples < len(hidden):
            hidden = hidden[torch.from_numpy(inputs.sampling_indices)]
        return self._model.compute_logits(hidden)


def _batch_hardest_to_sample(limits: BatchLimits) -> InputBatch:
    """Rows that keep nearly all tokens of a flat distribution, by top-k and by top-p."""
    batch = InputBatch(limits)
    batch.sampling.temperatures[:] = 1000.0
    batch.sampling.top_k[:] = limits.vocab_size - 1
    batch.sampling.top_p[:] = 0.999
    return batch


def sequences_in_one_block(query_lengths: Int32Array, sequence_lengths: Int32Array, block_size: int) -> StepInputs:
    """A step that computes the last tokens of sequences which all lie in block 0 and all sample."""
    query_starts = np.zeros(len(query_lengths) + 1, np.int32)
    np.cumsum(query_lengths, out=query_starts[1:])
    positions = np.arange(query_starts[-1]) + np.repeat(sequence_lengths - query_starts[1:], query_lengths)
    rows = np.arange(len(query_lengths))
    return StepInputs(
        rows=rows,
        input_ids=np.zeros(len(positions), np.int64),
        positions=positions,
        slot_mapping=positions % block_size,
        query_starts=query_starts,
        sequence_lengths=sequence_lengths,
        is_decoding=np.zeros(len(rows), np.bool_),
        max_query_length=int(query_lengths.max()),
        max_sequence_length=int(sequence_lengths.max()),
        sampling_rows=rows,
        sampling_indices=query_starts[1:].astype(np.int64) - 1,
        sampling_positions=sequence_lengths.astype(np.int64),
    )
