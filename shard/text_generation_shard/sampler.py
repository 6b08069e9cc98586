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
    """Rank 0 chooses, the others learn its choice. `logits` is [num_samples, vocab_size]; only rank 0 reads it."""
    num_samples = len(inputs.sampling_rows)
    token_ids = np.full(num_samples, NO_TOKEN, np.int64)
    logprobs = np.zeros(num_samples, np.float32)
    if distributed.rank() == 0:
        assert logits is not None, "rank 0 has the logits"
        token_ids, logprobs = _choose(logits, batch, inputs)
    if distributed.world_size() > 1:
        token_ids = distributed.broadcast(torch.from_numpy(token_ids)).numpy()
    return SampledTokens(token_ids, logprobs, token_ids != NO_TOKEN)


def _choose(logits: torch.Tensor, batch: InputBatch, inputs: StepInputs) -> tuple[Int64Array, Float32Array]:
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
    tokens = torch.where(reference.finite_rows(logits), tokens, NO_TOKEN)
    # The step's one read from the device; a double holds every token id and every float32 exactly.
    chosen = torch.stack((tokens.double(), logprobs.double())).cpu().numpy()
    return chosen[0].astype(np.int64), chosen[1].astype(np.float32)
