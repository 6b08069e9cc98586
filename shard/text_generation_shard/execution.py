"""How a step's forward pass and sampling run on a device: what the runner asks of a CPU and of a GPU alike."""

from dataclasses import dataclass
from typing import Protocol

import torch
from text_generation_proto.columns import Float32Array

from text_generation_shard.grammar_masks import StepMasks
from text_generation_shard.input_batch import InputBatch
from text_generation_shard.kv_cache import KvCaches
from text_generation_shard.step import PromptScores, TopTokens
from text_generation_shard.step_inputs import BatchLimits, BoolArray, Int64Array, StepInputs


class CausalModel(Protocol):
    """What an execution asks of a model."""

    def __call__(
        self, input_ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Hidden states of the step's tokens, [num_tokens, hidden_size], or of those that `rows` names in its order."""
        ...

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits, [num_rows, vocab_size], on every rank."""
        ...


@dataclass(frozen=True, slots=True)
class StepOutput:
    """One token for each sampling row of a step, and where its time went."""

    token_ids: Int64Array  # [num_samples]
    logprobs: Float32Array  # [num_samples]
    is_valid: BoolArray  # [num_samples]; False where the logits were not finite
    forward_ns: int
    sample_ns: int
    idle_ns: int = 0  # how long the device had nothing to do before it
    top_tokens: TopTokens | None = None  # None: no row asked
    prompt_scores: PromptScores | None = None


class RunningStep(Protocol):
    """A step that the device has been given."""

    def choose_tokens(self) -> None:
        """Launch what needs the step's masks, once the tokens of the steps before it are known; then without effect."""
        ...

    def is_done(self) -> bool:
        """Whether `wait` would return at once."""
        ...

    def wait(self) -> StepOutput:
        """Its tokens; waits for the device."""
        ...


class Execution(Protocol):
    """Runs steps on one device, in order."""

    # Whether a step can be given to the device before the one ahead of it has ended.
    overlaps: bool
    # Whether it keeps its own copy of the block tables, and takes the batch's changes of them.
    has_tables: bool

    def run_worst_case(self, limits: BatchLimits, kv_caches: KvCaches) -> None:
        """The largest steps within the limits, on a cache of one block that all sequences share.

        Raises torch.OutOfMemoryError.
        """
        ...

    def start(self, limits: BatchLimits, kv_caches: KvCaches) -> None:
        """Get ready for steps within the limits on these caches; called once."""
        ...

    def update_rows(self, batch: InputBatch) -> None:
        """Take in what the batch says of rows that change logits."""
        ...

    def launch(self, inputs: StepInputs, batch: InputBatch, masks: StepMasks | None) -> RunningStep:
        """Give the device a step; one with masks is complete only after `choose_tokens`."""
        ...
