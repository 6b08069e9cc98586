"""What a shard is told to do in one step and what it answers: shard.proto's messages as plain arrays."""

from dataclasses import dataclass, field

import numpy as np
from text_generation_proto.columns import Float32Array, Int32Array

NO_INTS: Int32Array = np.empty(0, np.int32)
NO_FLOATS: Float32Array = np.empty(0, np.float32)


class PlanError(ValueError):
    """A plan that breaks the protocol; it ends the stream, for nothing that follows it can be trusted."""


@dataclass(frozen=True, slots=True)
class LogitsChanges:
    """What is done to a sequence's logits before a token is chosen."""

    bias_token_ids: Int32Array = field(default_factory=lambda: NO_INTS)
    bias_values: Float32Array = field(default_factory=lambda: NO_FLOATS)
    has_watermark: bool = False
    repetition_penalty: float = 1.0
    share_penalty: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    banned_token_ids: Int32Array = field(default_factory=lambda: NO_INTS)
    min_tokens: int = 0

    @property
    def has_penalties(self) -> bool:
        """Whether it matters which tokens the sequence has seen."""
        return self.repetition_penalty != 1.0 or bool(
            self.share_penalty or self.frequency_penalty or self.presence_penalty
        )

    @property
    def has_biases(self) -> bool:
        """Whether single tokens are named."""
        return bool(len(self.bias_token_ids) or len(self.banned_token_ids))


@dataclass(frozen=True, slots=True)
class NewSequence:
    """A sequence in full: when it joins the batch, and again when it returns after a preemption."""

    sequence_id: int
    token_ids: Int32Array
    num_prompt_tokens: int
    num_computed_tokens: int
    block_ids: Int32Array
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    min_p: float = 0.0
    typical_p: float = 1.0
    grammar: str = ""
    changes: LogitsChanges | None = None
    top_n_tokens: int = 0
    scores_prompt: bool = False
    prompt_top_n_tokens: int = 0


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step, as differences from the one before."""

    step: int
    removed_sequence_ids: Int32Array = field(default_factory=lambda: NO_INTS)
    new_sequences: tuple[NewSequence, ...] = ()
    grown_sequence_ids: Int32Array = field(default_factory=lambda: NO_INTS)
    grown_num_blocks: Int32Array = field(default_factory=lambda: NO_INTS)
    grown_block_ids: Int32Array = field(default_factory=lambda: NO_INTS)
    prefill_sequence_ids: Int32Array = field(default_factory=lambda: NO_INTS)
    prefill_num_tokens: Int32Array = field(default_factory=lambda: NO_INTS)


@dataclass(frozen=True, slots=True)
class TopTokens:
    """The most likely tokens of some rows, best first, ties with the last included; rows one after another."""

    num_tokens: Int32Array  # [num_rows]
    token_ids: Int32Array
    logprobs: Float32Array


@dataclass(frozen=True, slots=True)
class PromptScores:
    """What the model made of prompt tokens that a step computed; sequences one after another."""

    sequence_ids: Int32Array  # [num_sequences]
    first_positions: Int32Array  # [num_sequences] where in its sequence the first scored token stands
    num_tokens: Int32Array  # [num_sequences]
    logprobs: Float32Array  # [total]
    top_token_ids: Int32Array  # [total, most tokens that any sequence asked for], best first
    top_logprobs: Float32Array


@dataclass(frozen=True, slots=True)
class StepResult:
    """A token for each sequence that sampled, or why it has none."""

    step: int
    sequence_ids: Int32Array = field(default_factory=lambda: NO_INTS)
    token_ids: Int32Array = field(default_factory=lambda: NO_INTS)
    logprobs: Float32Array = field(default_factory=lambda: NO_FLOATS)
    failures: dict[int, str] = field(default_factory=dict)
    top_tokens: TopTokens | None = None  # of the rows of `sequence_ids`; None: no row asked
    prompt_scores: PromptScores | None = None
    num_tokens: int = 0  # computed by the step, prompt tokens included
    forward_ns: int = 0
    sample_ns: int = 0
    step_ns: int = 0
    idle_ns: int = 0  # of the device, before the step
    mask_ns: int = 0
