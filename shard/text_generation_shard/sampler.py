"""Logits -> token ids and log-probabilities, the same on every rank. Rows stand alone: one cannot hurt another."""

from dataclasses import dataclass

import numpy as np
import torch
from text_generation_kernels import reference
from text_generation_proto.columns import Float32Array

from text_generation_shard import distributed
from text_generation_shard.input_batch import BoolArray, InputBatch, Int64Array, StepInputs

# Stands for the token of a row that has none.
NO_TOKEN = -1


@dataclass(frozen=True, slots=True)
class SampledTokens:
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
    # The step's one read from the device; a double holds every token id and every float32 exactly.
    chosen = torch.stack((tokens.double(), logprobs.double())).cpu().numpy()
    token_ids = chosen[0].astype(np.int64)
    return SampledTokens(token_ids, chosen[1].astype(np.float32), token_ids != NO_TOKEN)


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
    )
    return torch.where(reference.finite_rows(logits), tokens, NO_TOKEN), logprobs
