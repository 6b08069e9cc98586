"""What crosses between scheduler and shards each step: the plan that goes out and the result that comes back."""

from dataclasses import dataclass, field

from text_generation_router.token_scores import PromptScore, TokenScore
from text_generation_router.valid_request import SamplingParameters

# One runs while the next one waits.
MAX_PLANS_IN_FLIGHT = 2


@dataclass(frozen=True, slots=True)
class NewSequence:
    """A sequence in full: sent when it joins the batch, and again when it returns after a preemption."""

    sequence_id: int
    token_ids: list[int]
    num_prompt_tokens: int
    num_computed_tokens: int
    block_ids: list[int]
    sampling: SamplingParameters
    grammar: str = ""
    scores_prompt: bool = False
    prompt_top_n_tokens: int = 0


@dataclass(slots=True)
class StepPlan:
    """One step, as differences from the one before (the fields of shard.proto's StepPlan)."""

    step: int
    removed_sequence_ids: list[int] = field(default_factory=list)
    new_sequences: list[NewSequence] = field(default_factory=list)
    grown_sequence_ids: list[int] = field(default_factory=list)
    grown_num_blocks: list[int] = field(default_factory=list)
    grown_block_ids: list[int] = field(default_factory=list)
    prefill_sequence_ids: list[int] = field(default_factory=list)
    prefill_num_tokens: list[int] = field(default_factory=list)
    # Known to the router alone: what the step computes.
    num_decode_tokens: int = 0
    num_prefill_tokens: int = 0
    prefill_cost_tokens: float = 0.0  # in tokens without context
    num_preempted: int = 0

    @property
    def is_empty(self) -> bool:
        """Whether the step computes nothing and only carries changes."""
        return not self.num_decode_tokens and not self.prefill_sequence_ids


@dataclass(frozen=True, slots=True)
class PlanInFlight:
    """A plan that was sent and has no result yet."""

    plan: StepPlan
    sent_ns: int
    is_held: bool = False  # it was held back until shortly before the running step's end


@dataclass(frozen=True, slots=True)
class ScoredTokens:
    """Prompt tokens of one sequence that a step scored."""

    sequence_id: int
    first_position: int
    scores: list[PromptScore]


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step produced: a token for each sequence that sampled, or why it has none."""

    step: int
    sequence_ids: list[int]
    token_ids: list[int]
    logprobs: list[float]
    failures: dict[int, str] = field(default_factory=dict)
    top_tokens: list[list[TokenScore]] | None = None  # of each row; None: no row asked
    scored_prompts: list[ScoredTokens] = field(default_factory=list)
    forward_ns: int = 0
    sample_ns: int = 0
    step_ns: int = 0
    idle_ns: int = 0  # how long the device had nothing to do before the step
    mask_ns: int = 0
