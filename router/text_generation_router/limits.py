"""The limits on requests and steps: what the user set, or what model and KV memory allow."""

from dataclasses import dataclass

from text_generation_router.config import RouterConfig
from text_generation_router.scheduler import SchedulerLimits
from text_generation_router.shard_client import ShardInfo
from text_generation_router.step_budget import default_step_tokens, equal_context

DEFAULT_MAX_NUM_SEQUENCES = 1024


# Of the KV memory: prompt tokens that may wait.
DEFAULT_QUEUED_SHARE = 4


class InvalidLimits(Exception):
    """Limits that contradict each other, the model or the memory; the text names the flag and what fits."""


@dataclass(frozen=True)
class Limits:
    """What a request may ask for, known once the shards are warm."""

    max_input_tokens: int
    max_total_tokens: int
    vocab_size: int  # the logits' width: every token id is below it
    device_name: str


@dataclass(frozen=True)
class QueueLimits:
    """How much may wait, and for how long; None: without limit."""

    max_prompt_tokens: int | None = None
    queue_timeout_s: float | None = None
    request_timeout_s: float | None = None


def queue_limits(config: RouterConfig, max_kv_tokens: int) -> QueueLimits:
    """The limits on waiting; raises InvalidLimits."""
    for flag, seconds in (("--queue-timeout", config.queue_timeout), ("--request-timeout", config.request_timeout)):
        if seconds is not None and seconds <= 0:
            raise InvalidLimits(f"{flag} must be more than 0 seconds")
    max_prompt_tokens = config.max_queued_tokens or DEFAULT_QUEUED_SHARE * max_kv_tokens
    return QueueLimits(max_prompt_tokens, config.queue_timeout, config.request_timeout)


def step_limits(config: RouterConfig, info: ShardInfo) -> SchedulerLimits:
    """What a step and the batch may hold: a full batch of decodes leaves at least a third of the budget to prefill."""
    derived = default_step_tokens(info.device_name, info.num_layer_weights)
    bounds = (derived, info.max_position_embeddings, config.max_batch_total_tokens)
    budget = config.max_batch_prefill_tokens or min(bound for bound in bounds if bound)
    max_num_sequences = max(1, min(config.max_batch_size or DEFAULT_MAX_NUM_SEQUENCES, budget * 2 // 3))
    return SchedulerLimits(budget, max_num_sequences, equal_context(info.num_layer_weights, info.num_context_features))


def derive_limits(config: RouterConfig, info: ShardInfo, num_blocks: int) -> Limits:
    """Fit the limits on requests to the model and the KV memory; raises InvalidLimits."""
    max_kv_tokens = num_blocks * info.block_size
    max_total = config.max_total_tokens
    if max_total is None:
        max_total = min(info.max_position_embeddings, max_kv_tokens)
        if config.max_input_tokens is not None and config.max_input_tokens >= max_total:
            raise InvalidLimits(
                f"--max-input-tokens {config.max_input_tokens} does not fit: sequences may have {max_total} tokens"
            )
    if max_total > info.max_position_embeddings:
        raise InvalidLimits(
            f"--max-total-tokens {max_total} is more than the {info.max_position_embeddings} positions of the model"
        )
    if max_total > max_kv_tokens:
        raise InvalidLimits(f"--max-total-tokens {max_total} is more than the {max_kv_tokens} tokens of KV memory")
    max_input = max_total - 1 if config.max_input_tokens is None else config.max_input_tokens
    if not 1 <= max_input < max_total:
        raise InvalidLimits(f"--max-input-tokens {max_input} must be below --max-total-tokens {max_total}")
    return Limits(max_input, max_total, info.vocab_size, info.device_name)
