"""Sequence: one stream of token ids being extended. Only the scheduler changes its state."""

from enum import Enum, auto

from text_generation_router.step import MAX_PLANS_IN_FLIGHT
from text_generation_router.token_scores import PromptScores
from text_generation_router.valid_request import ValidRequest


class SequenceState(Enum):
    """Where a sequence is."""

    WAITING = auto()  # not in the batch: fresh, or preempted
    RUNNING = auto()  # in the batch
    DRAINING = auto()  # out of the batch, its last tokens still in flight
    FINISHED = auto()


class Sequence:
    """Token ids, how far they are computed, and the blocks that hold their keys and values.

    `num_computed_tokens` counts tokens whose computation was put into a plan, in flight or done;
    `num_pending_tokens` counts tokens that plans in flight will sample.
    """

    __slots__ = (
        "arrival",
        "awaited_key",
        "block_hashes",
        "block_table",
        "last_void_step",
        "max_tokens",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_found_blocks",
        "num_joined_tokens",
        "num_lost_tokens",
        "num_pending_tokens",
        "num_preemptions",
        "num_prompt_tokens",
        "num_recomputed_tokens",
        "num_registered_blocks",
        "num_restarts",
        "num_unsafe_tokens",
        "prompt_scores",
        "request",
        "sequence_id",
        "state",
        "step_last_planned",
        "token_ids",
    )

    def __init__(self, sequence_id: int, request: ValidRequest) -> None:
        self.sequence_id = sequence_id
        self.arrival = sequence_id  # ids count up, so they also order sequences by arrival
        self.request = request
        self.token_ids = list(request.token_ids)
        self.num_prompt_tokens = len(self.token_ids)
        self.max_tokens = self.num_prompt_tokens + request.max_new_tokens
        self.state = SequenceState.WAITING
        self.num_computed_tokens = 0
        self.num_pending_tokens = 0
        self.num_joined_tokens = 0  # tokens known when it joined the batch; beyond them it decodes
        self.num_cached_tokens = 0  # prompt tokens found in the prefix cache at first admission
        self.num_preemptions = 0
        self.num_lost_tokens = 0  # computed when it lost its blocks last
        self.num_recomputed_tokens = 0  # of all that it lost, what prefix hits did not give back
        self.num_restarts = 0  # times that it ran when the shards were lost
        self.num_unsafe_tokens = 0  # as long as it has no more, its next step may be the one that lost the shards
        self.num_registered_blocks = 0  # leading blocks of the table offered to the prefix cache
        self.num_found_blocks = 0  # leading blocks of the table that others had offered when it joined the batch
        self.step_last_planned = 0
        self.last_void_step = 0  # what steps up to this one computed of it counts for nothing
        self.awaited_key: bytes | None = None  # prefix-cache key of a block it waits for another to compute
        self.prompt_scores: PromptScores | None = [None] * self.num_prompt_tokens if request.scores_prompt else None
        self.block_table: list[int] = []
        self.block_hashes: list[bytes] = []  # keys of the full blocks of known tokens, as far as computed

    @property
    def num_wanted_tokens(self) -> int:
        """Tokens, known or about to be, that no plan computes yet: the one rule of scheduling."""
        return len(self.token_ids) + self.num_pending_tokens - self.num_computed_tokens

    @property
    def has_had_turn(self) -> bool:
        """Whether it was in the batch before: preempted, or restarted with the shards."""
        return self.num_preemptions > 0 or self.num_restarts > 0

    @property
    def is_suspect(self) -> bool:
        """Whether it has not yet got past the steps that were in flight when the shards were lost."""
        return len(self.token_ids) < self.num_unsafe_tokens

    def note_loss(self) -> None:
        """The shards were lost while it was in the batch: nothing of it is computed any more."""
        self.state = SequenceState.WAITING
        self.num_restarts += 1
        self.num_unsafe_tokens = len(self.token_ids) + MAX_PLANS_IN_FLIGHT
        self.num_lost_tokens = self.num_computed_tokens
        self.num_computed_tokens = 0
        self.num_pending_tokens = 0
        self.num_registered_blocks = 0
        self.block_table = []

    @property
    def is_prefilling(self) -> bool:
        """Whether tokens known when it joined the batch are still to be computed."""
        return self.num_computed_tokens < self.num_joined_tokens
