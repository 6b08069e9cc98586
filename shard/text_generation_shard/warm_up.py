"""The worst case the limits allow, run before KV memory is sized, and the number of blocks that then fit."""

import logging
from dataclasses import dataclass, replace

import torch

from text_generation_shard import distributed
from text_generation_shard.execution import Execution
from text_generation_shard.kv_cache import KvCaches, KvLayout, allocate_kv_caches, cpu_kv_bytes, cuda_kv_bytes
from text_generation_shard.step_inputs import BatchLimits

logger = logging.getLogger(__name__)

# Bounds of the limits themselves: columns of this many rows are allocated from them.
MAX_STEP_TOKENS = 2**20
MAX_NUM_SEQUENCES = 2**16 - 1  # as many programs as a launch has on its second axis


class WarmUpError(Exception):
    """The limits do not fit this rank's memory or this model; says which ones would."""


@dataclass(frozen=True)
class KvBudget:
    """How the memory for keys and values is bounded."""

    cpu_bytes: int = 0  # of this rank; 0: a default by the machine's memory
    cuda_memory_fraction: float = 1.0
    num_graph_sizes: int = 0  # on a GPU: graphs are recorded after the KV memory has been sized


@dataclass(frozen=True)
class WarmUpLimits:
    """What a step, the batch and a sequence may grow to."""

    max_step_tokens: int
    max_num_sequences: int
    max_sequence_length: int  # 0: no demand
    max_kv_tokens: int  # 0: as many as the memory holds

    def check(self, max_position_embeddings: int) -> None:
        """Refuse limits that no memory could help."""
        if not 1 <= self.max_step_tokens <= MAX_STEP_TOKENS:
            raise WarmUpError(f"max_step_tokens is {self.max_step_tokens}, allowed are 1 to {MAX_STEP_TOKENS}")
        if not 1 <= self.max_num_sequences <= MAX_NUM_SEQUENCES:
            raise WarmUpError(f"max_num_sequences is {self.max_num_sequences}, allowed are 1 to {MAX_NUM_SEQUENCES}")
        if self.max_sequence_length > max_position_embeddings:
            raise WarmUpError(
                f"sequences of {self.max_sequence_length} tokens are asked for, but the model was made for at most"
                f" {max_position_embeddings}"
            )


def run_worst_case(execution: Execution, limits: BatchLimits, layout: KvLayout, device: torch.device) -> None:
    """Run the largest steps on a cache of one block that all sequences share; raises WarmUpError."""
    caches = allocate_kv_caches(layout, 1, device)
    if _fits(execution, limits, caches):
        return
    raise WarmUpError(
        f"a step of {limits.max_step_tokens} tokens or {limits.max_num_sequences} sequences does not fit the memory"
        f" of {device}; lower max_batch_prefill_tokens or max_batch_size{_advice(execution, limits, caches)}"
    )


def _fits(execution: Execution, limits: BatchLimits, caches: KvCaches) -> bool:
    try:
        execution.run_worst_case(limits, caches)
    except torch.OutOfMemoryError:
        return False
    return True


def _advice(execution: Execution, limits: BatchLimits, caches: KvCaches) -> str:
    """The largest step that fits, found by trying: as a sentence's end. Ranks of a group cannot try on their own."""
    if distributed.world_size() > 1:
        return ""
    fitting, failing = 0, limits.max_step_tokens
    # As exact as it is worth: each try takes as long as a large step.
    while failing - fitting > max(1, limits.max_step_tokens // 32):
        middle = (fitting + failing) // 2
        if _fits(execution, replace(limits, max_step_tokens=middle), caches):
            fitting = middle
        else:
            failing = middle
    if fitting:
        return f": with {limits.max_num_sequences} sequences, {fitting} tokens fit"
    return f": {limits.max_num_sequences} sequences do not fit with any number of tokens"


def num_kv_blocks(limits: WarmUpLimits, layout: KvLayout, budget: KvBudget, device: torch.device) -> int:
    """How many blocks fit every rank, within the limits."""
    if device.type == "cpu":
        num_bytes = cpu_kv_bytes(budget.cpu_bytes, distributed.world_size())
    else:
        num_bytes = cuda_kv_bytes(budget.cuda_memory_fraction, budget.num_graph_sizes, device)
    num_blocks = distributed.all_reduce_min(num_bytes // layout.bytes_per_block)
    num_tokens = num_blocks * layout.block_size
    limit = "the memory for keys and values"
    if limits.max_kv_tokens and limits.max_kv_tokens < num_tokens:
        num_blocks = limits.max_kv_tokens // layout.block_size
        num_tokens, limit = num_blocks * layout.block_size, "max_batch_total_tokens"
    elif limits.max_kv_tokens > num_tokens:
        logger.warning(
            "max_batch_total_tokens %d does not fit: the memory holds %d tokens, which is the limit now",
            limits.max_kv_tokens,
            num_tokens,
        )
    if num_blocks == 0:
        raise WarmUpError(f"{limit} does not hold a single block of {layout.block_size} tokens")
    if limits.max_sequence_length > num_tokens:
        raise WarmUpError(
            f"sequences of {limits.max_sequence_length} tokens do not fit: {limit} holds {num_tokens} tokens,"
            f" so max_total_tokens can be at most {num_tokens}"
        )
    logger.info(
        "KV memory: %d blocks of %d tokens, %.2f GiB on this rank",
        num_blocks,
        layout.block_size,
        num_blocks * layout.bytes_per_block / 2**30,
    )
    return num_blocks
