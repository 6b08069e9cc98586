"""Logits -> tokens and log-probabilities on a CPU, on every rank the same. Rows stand alone: none can hurt another."""

from typing import NamedTuple

import numpy as np
import torch
from text_generation_kernels import reference
from text_generation_proto.columns import Float32Array

from text_generation_shard import distributed
from text_generation_shard.input_batch import InputBatch
from text_generation_shard.step_inputs import BoolArray, Int64Array, StepInputs

# Stands for the token of a row that has none.
NO_TOKEN = -1


class SampledTokens(NamedTuple):
    """One token for each sampling row of a step."""

    token_ids: Int64Array  # [num_samples]
    logprobs: Float32Array  # [num_samples]; zeros on other ranks than 0
    is_valid: BoolArray  # [num_samples]; False where the logits were not finite


def sample_tokens(logits: torch.Tensor | None, batch: InputBatch, inputs: StepInputs) -> SampledTokens:
    """Rank 0 chooses, the others learn its choice. `logits` is [num_samples, vocab_size], None if no row samples."""
    if logits is None:
        return SampledTokens(np.empty(0, np.int64), np.empty(0, np.float32), np.empty(0, np.bool_))
    if distributed.rank() == 0:
        tokens, logprobs = _choose(logits, batch, inputs)
    else:
        tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
        logprobs = torch.zeros(len(logits), device=logits.device)
    tokens = distributed.broadcast(tokens)
    token_ids = tokens.numpy()
    return SampledTokens(token_ids, logprobs.numpy(), token_ids != NO_TOKEN)


def _choose(logits: torch.Tensor, batch: InputBatch, inputs: StepInputs) -> tuple[torch.Tensor, torch.Tensor]:
    rows = inputs.sampling_rows
    tokens, logprobs = reference.sample(
        logits,
        torch.from_numpy(batch.temperatures[rows]),
        torch.from_numpy(batch.top_k[rows]),
        torch.from_numpy(batch.top_p[rows]),
        torch.from_numpy(batch.seeds[rows].view(np.int64)),
        # The random number belongs to the token's place in its sequence: a recomputed sequence draws the same.
        torch.from_numpy(inputs.sampling_positions),
        torch.from_numpy(batch.min_p[rows]),
        torch.from_numpy(batch.typical_p[rows]),
    )
    return torch.where(reference.finite_rows(logits), tokens, NO_TOKEN), logprobs
