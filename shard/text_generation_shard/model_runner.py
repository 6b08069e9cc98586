"""One step of the model: apply the plan's changes, lay the step out, give it to the device, take its tokens.

Owns the batch and the KV memory. Executes plans and has no say in them. Called from one thread alone.
"""

import gc
import time
from dataclasses import dataclass

import numpy as np
import torch
from text_generation_proto.columns import Int32Array

from text_generation_shard import distributed
from text_generation_shard.compiled_grammars import CompiledGrammars
from text_generation_shard.execution import Execution, RunningStep, StepOutput
from text_generation_shard.grammar_masks import GrammarMasks, StepMasks
from text_generation_shard.input_batch import InputBatch
from text_generation_shard.kv_cache import KvCaches, KvLayout, allocate_kv_caches
from text_generation_shard.progress import Operation, ProgressFile
from text_generation_shard.step import StepPlan, StepResult
from text_generation_shard.step_inputs import BatchLimits, StepInputs
from text_generation_shard.token_scores import select_rows
from text_generation_shard.warm_up import KvBudget, WarmUpLimits, num_kv_blocks, run_worst_case

NOT_FINITE = "the model's output for this sequence is not a finite number"


@dataclass(frozen=True)
class ModelInfo:
    """What the router is told of the loaded model."""

    device_name: str
    vocab_size: int
    max_position_embeddings: int
    num_layer_weights: int = 0  # of this rank: those that every token is multiplied with
    num_context_features: int = 0  # of this rank's queries, where they attend to the whole context
    device_uuid: str = ""  # of a GPU


@dataclass(frozen=True, slots=True)
class StepInFlight:
    """A step that was launched and is not finished."""

    step: int
    failures: dict[int, str]  # of sequences that the plan's changes were refused for
    started_ns: int
    inputs: StepInputs | None = None  # None: nothing is computed
    sequence_ids: Int32Array | None = None  # of the sampling rows
    running: RunningStep | None = None
    masks: StepMasks | None = None

    def is_done(self) -> bool:
        """Whether finishing it waits for nothing."""
        return self.running is None or self.running.is_done()


class ModelRunner:
    """Runs steps once `warm_up` has sized the KV memory."""

    def __init__(
        self,
        execution: Execution,
        info: ModelInfo,
        layout: KvLayout,
        budget: KvBudget,
        device: torch.device,
        progress: ProgressFile,
    ) -> None:
        self.info = info
        self.layout = layout
        self._execution = execution
        self._budget = budget
        self._device = device
        self._progress = progress
        self._kv_caches: KvCaches = []
        self._batch: InputBatch | None = None
        # Of the rank that samples.
        self.grammars = CompiledGrammars(info.vocab_size) if distributed.rank() == 0 else None
        self._masks: GrammarMasks | None = None
        self._last_launched: StepInFlight | None = None
        self._num_in_flight = 0
        self._has_garbage = False

    @property
    def is_warm(self) -> bool:
        """Whether KV memory stands and steps can run."""
        return self._batch is not None

    @property
    def overlaps(self) -> bool:
        """Whether a step may be launched before the one ahead of it is finished."""
        return self._execution.overlaps

    @torch.inference_mode()
    def warm_up(self, limits: WarmUpLimits) -> int:
        """Run the worst case, then allocate KV memory; answers the number of its blocks.

        Raises WarmUpError when the limits do not fit.
        """
        assert self._batch is None, "KV memory is allocated once"
        limits.check(self.info.max_position_embeddings)
        if self._device.type == "cpu":
            # What steps take is not part of the budget there, and how long they can be depends on the KV memory.
            num_blocks = num_kv_blocks(limits, self.layout, self._budget, self._device)
            self._run_worst_case(self._batch_limits(limits, num_blocks))
        else:
            longest = limits.max_sequence_length or self.info.max_position_embeddings
            self._run_worst_case(self._batch_limits(limits, -(-longest // self.layout.block_size)))
            num_blocks = num_kv_blocks(limits, self.layout, self._budget, self._device)
        batch_limits = self._batch_limits(limits, num_blocks)
        self._kv_caches = allocate_kv_caches(self.layout, num_blocks, self._device)
        self._execution.start(batch_limits, self._kv_caches)
        self._batch = InputBatch(batch_limits, has_device_tables=self._execution.has_tables)
        if self.grammars is not None:
            self._masks = GrammarMasks(self.grammars, batch_limits.max_num_sequences)
        # What stands now stays for good. From here on garbage is collected between steps only.
        gc.collect()
        gc.freeze()
        gc.disable()
        return num_blocks

    def _run_worst_case(self, limits: BatchLimits) -> None:
        started = time.perf_counter_ns()
        run_worst_case(self._execution, limits, self.layout, self._device)
        self._progress.note_worst_case(time.perf_counter_ns() - started, compiles_kernels=self._device.type == "cuda")

    def _batch_limits(self, limits: WarmUpLimits, num_blocks: int) -> BatchLimits:
        longest = limits.max_sequence_length or self.info.max_position_embeddings
        return BatchLimits(
            vocab_size=self.info.vocab_size,
            block_size=self.layout.block_size,
            num_blocks=num_blocks,
            max_num_sequences=limits.max_num_sequences,
            max_step_tokens=limits.max_step_tokens,
            max_sequence_length=min(longest, num_blocks * self.layout.block_size),
        )

    def run_step(self, plan: StepPlan) -> StepResult:
        """Launch a step and finish it."""
        return self.finish(self.launch(plan))

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> StepInFlight:
        """Give the device a step. Raises PlanError for a plan against the protocol; what else it raises is fatal."""
        started = time.perf_counter_ns()
        batch = self._batch
        assert batch is not None, "warm-up comes first"
        self.choose_tokens()
        failures = batch.apply(plan)
        self._follow_grammars(plan, failures)
        if batch.sampling.has_row_changes:
            self._execution.update_rows(batch)
        inputs = batch.prepare(plan)
        if inputs is None:
            self._progress.start(plan.step, 0, 0)
            step = StepInFlight(plan.step, failures, started)
        else:
            self._progress.start(plan.step, inputs.num_tokens, int(inputs.sequence_lengths.sum(dtype=np.int64)))
            sequence_ids = batch.sequence_ids[inputs.sampling_rows]
            masks = self._masks.of_step(sequence_ids) if self._masks is not None else None
            self._progress.enter(Operation.FORWARD_PASS)
            running = self._execution.launch(inputs, batch, masks)
            batch.advance(inputs)
            self._has_garbage = True
            step = StepInFlight(plan.step, failures, started, inputs, sequence_ids, running, masks)
        self._last_launched = step
        if not self._num_in_flight:
            self.choose_tokens()
        self._num_in_flight += 1
        return step

    def _follow_grammars(self, plan: StepPlan, failures: dict[int, str]) -> None:
        """Follow the new sequences that have a grammar, and no longer those that have gone."""
        if self._masks is None:
            return
        self._masks.remove(plan.removed_sequence_ids.tolist())
        for sequence in plan.new_sequences:
            if sequence.grammar and sequence.sequence_id not in failures:
                generated = sequence.token_ids[sequence.num_prompt_tokens :]
                self._masks.add(sequence.sequence_id, sequence.grammar, generated)

    @torch.inference_mode()
    def choose_tokens(self) -> None:
        """Let the last launched step sample, if it waits for masks: the tokens before it must be known by now."""
        if self._last_launched is not None and self._last_launched.running is not None:
            self._progress.enter(Operation.CHOICE_OF_TOKENS)
            self._last_launched.running.choose_tokens()

    def finish(self, step: StepInFlight) -> StepResult:
        """The result of a launched step; steps are finished in the order in which they were launched."""
        failures = step.failures
        self._num_in_flight -= 1
        if step.running is None:
            self._progress.end()
            return StepResult(step.step, failures=failures, step_ns=time.perf_counter_ns() - step.started_ns)
        assert self._batch is not None
        assert step.inputs is not None
        assert step.sequence_ids is not None
        if step is self._last_launched:
            self.choose_tokens()
        self._progress.enter(Operation.DEVICE)
        output = step.running.wait()
        is_told = self._batch.settle(step.inputs, step.sequence_ids, output.token_ids, output.is_valid)
        self._progress.end()
        failures.update(dict.fromkeys(step.sequence_ids[is_told & ~output.is_valid].tolist(), NOT_FINITE))
        mask_ns = self._go_on(step, output, failures)
        is_sampled = is_told & output.is_valid
        top_tokens = output.top_tokens
        return StepResult(
            step=step.step,
            sequence_ids=step.sequence_ids[is_sampled],
            token_ids=output.token_ids[is_sampled].astype(np.int32),
            logprobs=output.logprobs[is_sampled],
            failures=failures,
            top_tokens=None if top_tokens is None else select_rows(top_tokens, is_sampled),
            prompt_scores=output.prompt_scores,
            num_tokens=step.inputs.num_tokens,
            forward_ns=output.forward_ns,
            sample_ns=output.sample_ns,
            step_ns=time.perf_counter_ns() - step.started_ns,
            idle_ns=output.idle_ns,
            mask_ns=mask_ns,
        )

    def _go_on(self, step: StepInFlight, output: StepOutput, failures: dict[int, str]) -> int:
        """Have the masks of the next tokens made; answers how long the work on this step's took."""
        if self._masks is None or step.masks is None:
            return 0
        assert step.sequence_ids is not None
        for sequence_id, reason in step.masks.failures().items():
            if sequence_id in failures:
                failures[sequence_id] = reason
        mask_ns = self._masks.take_work_ns()
        self._masks.accept(step.sequence_ids, output.token_ids, output.is_valid)
        self._masks.remove(step.sequence_ids[~output.is_valid].tolist())
        return mask_ns

    def clear(self) -> None:
        """Drop every sequence; the KV memory stays."""
        if self._batch is not None:
            self._batch.clear()
        if self._masks is not None:
            self._masks.clear()

    def collect_garbage(self) -> None:
        """Collect what steps left behind; called when there is nothing else to do."""
        if self._has_garbage:
            gc.collect()
            self._has_garbage = False

    def report_failure(self) -> None:
        """Show in the progress file that this rank is lost."""
        self._progress.fail()
