"""One step of the model: apply the plan's changes, prepare, run the forward pass, sample.

Owns the batch and the KV memory. Executes plans and has no say in them. Called from one thread alone.
"""

import gc
import time
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from text_generation_shard.forward_context import ForwardContext, forward_context
from text_generation_shard.input_batch import BatchLimits, InputBatch, StepInputs
from text_generation_shard.kv_cache import KvCaches, KvLayout, allocate_kv_caches
from text_generation_shard.progress import ProgressFile
from text_generation_shard.sampler import sample_tokens
from text_generation_shard.step import StepPlan, StepResult
from text_generation_shard.warm_up import KvBudget, WarmUpLimits, WarmUpOutcome, num_kv_blocks, run_worst_case

NOT_FINITE = "the model's output for this sequence is not a finite number"


class CausalModel(Protocol):
    """What the runner asks of a model."""

    def __call__(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Hidden states of the step's tokens, [num_tokens, hidden_size]."""
        ...

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits, [num_rows, vocab_size], on every rank."""
        ...


@dataclass(frozen=True)
class ModelInfo:
    """What the router is told of the loaded model."""

    model_type: str
    device_name: str
    vocab_size: int
    max_position_embeddings: int


class ModelRunner:
    """Runs steps once `warm_up` has sized the KV memory."""

    def __init__(
        self,
        model: CausalModel,
        info: ModelInfo,
        layout: KvLayout,
        budget: KvBudget,
        device: torch.device,
        progress: ProgressFile,
    ) -> None:
        self.info = info
        self.layout = layout
        self._model = model
        self._budget = budget
        self._device = device
        self._progress = progress
        self._kv_caches: KvCaches = []
        self._batch: InputBatch | None = None
        self._has_garbage = False

    @property
    def is_warm(self) -> bool:
        """Whether KV memory stands and steps can run."""
        return self._batch is not None

    @torch.inference_mode()
    def warm_up(self, limits: WarmUpLimits) -> WarmUpOutcome:
        """Run the worst case, then allocate KV memory.

        Raises WarmUpError when the limits do not fit.
        """
        assert self._batch is None, "KV memory is allocated once"
        limits.check(self.info.max_position_embeddings)
        started = time.perf_counter_ns()
        run_worst_case(self.forward, limits, self.layout, self._device, self.info.max_position_embeddings)
        worst_case_ns = time.perf_counter_ns() - started
        self._progress.note_worst_case(worst_case_ns)
        num_blocks = num_kv_blocks(limits, self.layout, self._budget, self._device)
        self._kv_caches = allocate_kv_caches(self.layout, num_blocks, self._device)
        longest = limits.max_sequence_length or self.info.max_position_embeddings
        self._batch = InputBatch(
            BatchLimits(
                vocab_size=self.info.vocab_size,
                block_size=self.layout.block_size,
                num_blocks=num_blocks,
                max_num_sequences=limits.max_num_sequences,
                max_step_tokens=limits.max_step_tokens,
                max_sequence_length=min(longest, num_blocks * self.layout.block_size),
            )
        )
        # What stands now stays for good. From here on garbage is collected between steps only.
        gc.collect()
        gc.freeze()
        gc.disable()
        return WarmUpOutcome(num_blocks, worst_case_ns)

    @torch.inference_mode()
    def run_step(self, plan: StepPlan) -> StepResult:
        """Run one step. Raises PlanError for a plan that breaks the protocol; what else it raises is fatal."""
        started = time.perf_counter_ns()
        batch = self._batch
        assert batch is not None, "warm-up comes first"
        failures = batch.apply(plan)
        inputs = batch.prepare(plan)
        if inputs is None:
            self._progress.start(plan.step, 0, 0)
            self._progress.end()
            return StepResult(plan.step, failures=failures, step_ns=time.perf_counter_ns() - started)

        self._progress.start(plan.step, inputs.num_tokens, int(inputs.sequence_lengths.sum(dtype=np.int64)))
        forward_started = time.perf_counter_ns()
        logits = self.forward(inputs, self._kv_caches)
        forward_ended = time.perf_counter_ns()
        sampled = sample_tokens(logits, batch, inputs)
        sample_ended = time.perf_counter_ns()
        sequence_ids = batch.advance(inputs, sampled.token_ids, sampled.is_valid)
        self._progress.end()
        self._has_garbage = True

        failures.update(dict.fromkeys(sequence_ids[~sampled.is_valid].tolist(), NOT_FINITE))
        return StepResult(
            step=plan.step,
            sequence_ids=sequence_ids[sampled.is_valid],
            token_ids=sampled.token_ids[sampled.is_valid].astype(np.int32),
            logprobs=sampled.logprobs[sampled.is_valid],
            failures=failures,
            num_tokens=inputs.num_tokens,
            forward_ns=forward_ended - forward_started,
            sample_ns=sample_ended - forward_ended,
            step_ns=time.perf_counter_ns() - started,
        )

    def forward(self, inputs: StepInputs, kv_caches: KvCaches) -> torch.Tensor | None:
        """Logits of the sampling rows; None where no row samples."""
        context = ForwardContext(
            slot_mapping=self._to_device(inputs.slot_mapping),
            block_tables=self._to_device(inputs.block_tables),
            query_starts=self._to_device(inputs.query_starts),
            sequence_lengths=self._to_device(inputs.sequence_lengths),
            max_query_length=inputs.max_query_length,
            max_sequence_length=inputs.max_sequence_length,
            kv_caches=kv_caches,
        )
        with forward_context(context):
            hidden = self._model(self._to_device(inputs.input_ids), self._to_device(inputs.positions))
        num_samples = len(inputs.sampling_indices)
        if not num_samples:
            return None
        if num_samples < inputs.num_tokens:
            hidden = hidden[self._to_device(inputs.sampling_indices)]
        return self._model.compute_logits(hidden)

    def clear(self) -> None:
        """Drop every sequence; the KV memory stays."""
        if self._batch is not None:
            self._batch.clear()

    def collect_garbage(self) -> None:
        """Collect what steps left behind; called when there is nothing else to do."""
        if self._has_garbage:
            gc.collect()
            self._has_garbage = False

    def report_failure(self) -> None:
        """Show in the progress file that this rank is lost."""
        self._progress.fail()

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device)
