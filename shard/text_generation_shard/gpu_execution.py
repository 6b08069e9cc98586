"""Steps on a GPU: sent ahead of their turn, replayed from CUDA graphs, read once when they have ended.

The batch lives on the device: block tables, and each row's last token. A step copies one buffer there, runs the layers
(recorded by padded number of tokens) and then head and sampling (recorded by padded number of sampling rows), and
copies the tokens back. Nothing waits for the host in between.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle

import numpy as np
import torch
from text_generation_kernels.attention_layout import MAX_NARROW_QUERY, AttentionLayout
from text_generation_kernels.attention_settings import AttentionShape, attention_layout
from text_generation_kernels.attention_work import plan_attention
from text_generation_kernels.paged_attention import AttentionWorkspace
from text_generation_kernels.sampling import Sampled, choose_best, sample
from text_generation_kernels.shared_prefix import SharedPrefix, find_shared_prefixes
from text_generation_kernels.token_exchange import (
    NUM_OUTPUT_COLUMNS,
    publish_tokens,
    read_tokens,
)
from text_generation_kernels.token_masks import NO_MASK, mask_tokens, num_words

from text_generation_shard import distributed
from text_generation_shard.changed_head import ChangedHead, TopTokensUnderway
from text_generation_shard.changed_logits import DEFAULT_WATERMARK, Watermark
from text_generation_shard.cuda_graphs import Recorder, Recordings
from text_generation_shard.execution import CausalModel
from text_generation_shard.forward_context import ForwardContext, KernelAttentionPlan, forward_context
from text_generation_shard.gpu_step import GpuStep, StepEvents
from text_generation_shard.grammar_masks import StepMasks
from text_generation_shard.input_batch import InputBatch
from text_generation_shard.kv_cache import KvCaches
from text_generation_shard.step_buffers import NUM_HOST_BUFFERS, Array, StepBuffers, to_host
from text_generation_shard.step_columns import (
    KINDS,
    MAX_TABLE_CHANGES,
    NO_SLOT,
    Kind,
    fill_samples,
    fill_tokens,
    first_mixed_column,
    plan_name,
    sampling_parameters,
    step_buffers,
)
from text_generation_shard.step_inputs import BatchLimits, PromptInputs, StepInputs
from text_generation_shard.token_scores import ScoredTokens, score_prompt

# Decoding sequences that share at least this many tokens of prefix read them as a group.
MIN_SHARED_TOKENS = 256
NO_TOKEN = -1

# Mixed steps of few tokens are rare: one recording serves them all.
LEAST_SIZES = {"short": 1, "mixed": 16}


@dataclass(frozen=True)
class GpuModel:
    """What an execution must know of the model besides how to call it."""

    model: CausalModel
    shape: AttentionShape
    hidden_size: int
    dtype: torch.dtype
    sliding_windows: Sequence[int | None]  # of each layer


class _StepKind:
    """Attention of steps of short queries or of mixed ones: its layout, plans and partial results."""

    def __init__(
        self, layout: AttentionLayout, model: GpuModel, buffers: StepBuffers, kind: Kind, device: torch.device
    ) -> None:
        self.layout = layout
        self.workspaces: dict[int | None, AttentionWorkspace] = {
            window: AttentionWorkspace(
                layout, model.shape.num_kv_heads, model.shape.head_dim, device, buffers.device[plan_name(kind, window)]
            )
            for window in set(model.sliding_windows)
        }


class GpuExecution:
    """See `Execution`. Runs on CPU tensors too where Triton interprets, which is how it is tested without a GPU."""

    overlaps = True
    has_tables = True

    def __init__(
        self,
        model: GpuModel,
        device: torch.device,
        recorder: Recorder,
        sizes: Sequence[int],
        watermark: Watermark = DEFAULT_WATERMARK,
    ) -> None:
        self._model = model
        self._device = device
        self._watermark = watermark
        self._recordings = Recordings(recorder, sizes)
        self._events_before: StepEvents | None = None

    def run_worst_case(self, limits: BatchLimits, kv_caches: KvCaches) -> None:
        """A step of as many tokens and samples as there can be, without a graph.

        Attention takes no more memory for longer sequences, and a block holds what all of them write.
        """
        self._allocate(limits)
        self._kv_caches = kv_caches
        self._run_layers("mixed", limits.max_step_tokens)
        num_rows, buffer = limits.max_num_sequences, self._buffers.device
        self._run_head(num_rows, has_random=True)
        logits = self._model.model.compute_logits(self._sampled_hidden[:num_rows])
        changed = self._changed_head.run_worst_case(
            logits, sampling_parameters(buffer, num_rows), buffer["sampling_rows"], self._last_tokens[:num_rows]
        )
        mask_tokens(changed, self._masks, buffer["mask_rows"][: len(changed)])

    def start(self, limits: BatchLimits, kv_caches: KvCaches) -> None:
        """Record the steps, the largest first: their memory serves the smaller ones."""
        self._kv_caches = kv_caches
        num_rows = limits.max_num_sequences
        self._block_tables = torch.zeros(
            num_rows, limits.max_blocks_per_sequence, dtype=torch.int32, device=self._device
        )
        for kind in reversed(KINDS):
            for size in self._recordings.sizes_within(self._kinds[kind].layout.max_tokens, LEAST_SIZES[kind]):
                self._recordings.record(kind, size, partial(self._run_layers, kind, size))
        for has_random in (True, False):
            for size in self._recordings.sizes_within(num_rows):
                self._recordings.record(has_random, size, partial(self._run_head, size, has_random))

    @property
    def num_recordings(self) -> int:
        """Graphs held."""
        return len(self._recordings)

    def _allocate(self, limits: BatchLimits) -> None:
        device, num_rows = self._device, limits.max_num_sequences
        max_tokens: dict[Kind, int] = {"short": num_rows, "mixed": max(limits.max_step_tokens, num_rows)}
        layouts = {
            kind: attention_layout(self._model.shape, device, max_tokens[kind], num_rows, kind == "mixed")
            for kind in KINDS
        }
        self._limits = limits
        self._buffers = step_buffers(num_rows, layouts, set(self._model.sliding_windows), device)
        # Before the first step, and while steps are recorded, nothing is written.
        self._buffers.device["slots"].fill_(NO_SLOT)
        self._first_mixed_column = first_mixed_column(self._buffers)
        self._kinds = {kind: _StepKind(layouts[kind], self._model, self._buffers, kind, device) for kind in KINDS}
        # The last row takes what padded rows write.
        self._last_tokens = torch.zeros(num_rows + 1, dtype=torch.int64, device=device)
        self._block_tables = torch.zeros(num_rows, limits.max_blocks_per_sequence, dtype=torch.int32, device=device)
        self._sampled_hidden = torch.zeros(num_rows, self._model.hidden_size, dtype=self._model.dtype, device=device)
        self._masks = torch.zeros(num_rows, num_words(limits.vocab_size), dtype=torch.int32, device=device)
        self._host_masks: Iterator[torch.Tensor] | None = None
        self._changed_head = ChangedHead(num_rows, limits.vocab_size, device, self._watermark)
        self._output = torch.zeros(NUM_OUTPUT_COLUMNS, num_rows, dtype=torch.int32, device=device)
        self._host_outputs = cycle(
            [
                (StepEvents(device), torch.zeros_like(self._output, device="cpu", pin_memory=device.type == "cuda"))
                for _ in range(NUM_HOST_BUFFERS)
            ]
        )

    def launch(self, inputs: StepInputs, batch: InputBatch, masks: StepMasks | None) -> GpuStep:
        """Send a step: one copy there, the layers, the head, one copy back; the head later where it has masks."""
        groups = self._shared_prefixes(inputs, batch)
        kind = self._kind(inputs, has_groups=bool(groups))
        step_kind = self._kinds[kind]
        num_tokens = self._recordings.padded_size(inputs.num_tokens, step_kind.layout.max_tokens, LEAST_SIZES[kind])
        num_samples = self._recordings.padded_size(inputs.num_samples, self._limits.max_num_sequences)
        turn, host = self._buffers.next_host()
        fill_tokens(host, inputs, num_tokens)
        fill_samples(host, inputs, batch, num_samples, padding_row=self._limits.max_num_sequences)
        host["mask_rows"][:num_samples] = NO_MASK
        if masks is not None:
            host["mask_rows"][: inputs.num_samples] = masks.mask_rows
        for window in step_kind.workspaces:
            plan_attention(
                step_kind.layout, host[plan_name(kind, window)], inputs.query_starts, inputs.sequence_lengths,
                window, groups, inputs.rows,
            )  # fmt: skip
        events, host_output = next(self._host_outputs)
        before, self._events_before = self._events_before, events
        events.mark(0)
        self._send(turn, host, batch, kind)
        scores = None
        if inputs.prompt is not None:
            scores = inputs.prompt, self._score_prompt(inputs.prompt, self._run_layers(kind, num_tokens))
        else:
            (self._recordings.find(kind, num_tokens) or partial(self._run_layers, kind, num_tokens))()
        events.mark(1)
        launch_head = partial(self._launch_head, events, host_output, inputs, batch, num_samples, masks)
        step = GpuStep(events, before, host_output, inputs.num_samples, launch_head, scores)
        if masks is None:
            step.choose_tokens()
        return step

    def update_rows(self, batch: InputBatch) -> None:
        """In stream order: steps that were launched before see the rows as they were."""
        self._changed_head.update(batch.sampling.take_row_changes())

    def _launch_head(
        self,
        events: StepEvents,
        host_output: torch.Tensor,
        inputs: StepInputs,
        batch: InputBatch,
        num_samples: int,
        masks: StepMasks | None,
    ) -> TopTokensUnderway | None:
        """Masks apply in the recordings that sample at random, greedy rows among them."""
        top_tokens = None
        if masks is not None:
            self._send_masks(masks)
        if inputs.num_samples:
            if batch.sampling.has_special:
                top_tokens = self._run_changed_head(inputs, batch)
            else:
                is_general = masks is not None or bool((batch.sampling.temperatures[inputs.sampling_rows] > 0).any())
                head = self._recordings.find(is_general, num_samples)
                (head or partial(self._run_head, num_samples, is_general))()
            host_output.copy_(self._output, non_blocking=True)
        events.mark(2)
        return top_tokens

    def _send_masks(self, masks: StepMasks) -> None:
        if self._host_masks is None:  # where no request has a grammar, the host keeps no memory for any
            is_gpu = self._device.type == "cuda"
            buffers = [torch.zeros_like(self._masks, device="cpu", pin_memory=is_gpu) for _ in range(NUM_HOST_BUFFERS)]
            self._host_masks = cycle(buffers)
        host = next(self._host_masks)
        masks.wait(host.numpy())
        self._masks[: len(masks)].copy_(host[: len(masks)], non_blocking=True)

    def _kind(self, inputs: StepInputs, has_groups: bool) -> Kind:
        if has_groups or inputs.max_query_length > MAX_NARROW_QUERY:
            return "mixed"
        return "short" if inputs.num_tokens <= self._kinds["short"].layout.max_tokens else "mixed"

    def _send(self, turn: int, host: dict[str, Array], batch: InputBatch, kind: Kind) -> None:
        """Copy what was filled to the device, and bring the block tables there up to date."""
        places, blocks = batch.take_table_changes()
        count = min(len(places), MAX_TABLE_CHANGES)
        host["changed_places"][:count] = places[:count]
        host["changed_blocks"][:count] = blocks[:count]
        self._buffers.send(turn, until=self._first_mixed_column if kind == "short" else None)
        tables = self._block_tables.view(-1)
        if count:
            changed = self._buffers.device
            tables.index_copy_(0, changed["changed_places"][:count], changed["changed_blocks"][:count])
        if count < len(places):  # many long sequences joined at once
            rest = (torch.from_numpy(column[count:]).to(self._device) for column in (places, blocks))
            tables.index_copy_(0, *rest)

    def _shared_prefixes(self, inputs: StepInputs, batch: InputBatch) -> list[SharedPrefix]:
        if len(inputs.rows) < 2 or inputs.max_sequence_length <= MIN_SHARED_TOKENS:
            return []
        query_lengths = np.diff(inputs.query_starts)
        return find_shared_prefixes(
            batch.tables(inputs), query_lengths, inputs.sequence_lengths, self._limits.block_size, MIN_SHARED_TOKENS
        )

    def _run_layers(self, kind: Kind, num_tokens: int) -> torch.Tensor:
        """Hidden states of the step's tokens; those of the rows that may sample are kept for the head."""
        buffer = self._buffers.device
        slots, workspaces = buffer["slots"][:num_tokens], self._kinds[kind].workspaces
        plan = KernelAttentionPlan(slots, self._block_tables, workspaces)
        with forward_context(ForwardContext(self._kv_caches, plan)):
            token_ids = read_tokens(buffer["input_ids"][:num_tokens], self._last_tokens)
            hidden = self._model.model(token_ids, buffer["positions"][:num_tokens])
        num_gathered = min(num_tokens, self._limits.max_num_sequences)
        indices = buffer["sampling_indices"][:num_gathered]
        torch.index_select(hidden, 0, indices, out=self._sampled_hidden[:num_gathered])
        return hidden

    def _score_prompt(self, prompt: PromptInputs, hidden: torch.Tensor) -> ScoredTokens:
        return ScoredTokens(*map(to_host, score_prompt(self._model.model.compute_logits, hidden, prompt)))

    def _run_head(self, num_samples: int, has_random: bool) -> None:
        """Tokens of the rows that sample: kept for the next step, and laid out for the host."""
        buffer = self._buffers.device
        rows = buffer["sampling_rows"][:num_samples]
        logits = self._model.model.compute_logits(self._sampled_hidden[:num_samples])
        if has_random:
            mask_tokens(logits, self._masks, buffer["mask_rows"][:num_samples])
            sampled = sample(logits, sampling_parameters(buffer, num_samples))
        else:
            sampled = choose_best(logits)
        publish_tokens(*_as_rank_0(sampled), rows, self._last_tokens, self._output)

    def _run_changed_head(self, inputs: StepInputs, batch: InputBatch) -> TopTokensUnderway | None:
        """The same where rows change their logits or want the most likely tokens told; no row is padding."""
        count, buffer = inputs.num_samples, self._buffers.device
        rows, mask_rows = buffer["sampling_rows"][:count], buffer["mask_rows"][:count]
        logits = self._model.model.compute_logits(self._sampled_hidden[:count])
        previous = read_tokens(buffer["input_ids"][buffer["sampling_indices"][:count]], self._last_tokens)

        def mask(logits: torch.Tensor, piece: slice) -> None:
            mask_tokens(logits, self._masks, mask_rows[piece])

        def publish(sampled: Sampled, piece: slice) -> torch.Tensor:
            sampled = _as_rank_0(sampled)
            publish_tokens(*sampled, rows[piece], self._last_tokens, self._output[:, piece])
            return sampled.tokens

        return self._changed_head.choose(
            logits,
            sampling_parameters(buffer, count),
            rows,
            previous,
            inputs.sampling_rows,
            batch.sampling,
            mask,
            publish,
        )


def _as_rank_0(sampled: Sampled) -> Sampled:
    """Rank 0's tokens on every rank, and which of its rows were finite.

    Every rank samples from the same logits, but the masks are rank 0's alone.
    """
    if distributed.world_size() == 1:
        return sampled
    tokens = distributed.broadcast(torch.where(sampled.is_finite, sampled.tokens, NO_TOKEN))
    return sampled._replace(tokens=tokens.clamp(min=0), is_finite=tokens != NO_TOKEN)
