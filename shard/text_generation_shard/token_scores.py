"""Log-probabilities beside the chosen token's: the most likely tokens, and what the model made of a prompt."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from text_generation_kernels.reference_sampling import log_probabilities
from text_generation_proto.columns import Float32Array, Int32Array

from text_generation_shard.step import PromptScores, TopTokens
from text_generation_shard.step_buffers import to_device
from text_generation_shard.step_inputs import Int64Array, PromptInputs

# Candidates beyond the n-th that may tie with it and are then told too.
MAX_TIES = 16
# Rows of logits that are widened to float32 and scored at once.
PROMPT_ROWS_AT_ONCE = 32


class Candidates(NamedTuple):
    """The best tokens of some rows, more than are told, in no certain order among equals."""

    logprobs: torch.Tensor  # [k, n] float32
    token_ids: torch.Tensor  # [k, n] int64


def find_candidates(logprobs: torch.Tensor, most: int) -> Candidates:
    """The best `most` tokens of each row and some that may tie with the last."""  # [k, V]
    return Candidates(*logprobs.topk(min(most + MAX_TIES, logprobs.shape[1]), dim=-1))


def tell_top_tokens(
    logprobs: Float32Array,  # [k, n] as in Candidates
    token_ids: Int64Array,
    samples: Int64Array,  # [k] which of the step's rows these are
    wanted: Int32Array,  # [k] how many of each
    num_samples: int,
) -> TopTokens:
    """Each row's best tokens and all that tie with the last of them; among equals low ids come first."""
    order = np.lexsort((token_ids, -logprobs), axis=-1)
    logprobs = np.take_along_axis(logprobs, order, axis=-1)
    last = np.minimum(wanted, logprobs.shape[1]) - 1
    is_told = (logprobs >= logprobs[np.arange(len(last)), last][:, None]) & (logprobs > -np.inf)
    num_tokens = np.zeros(num_samples, np.int32)
    num_tokens[samples] = is_told.sum(axis=1)
    told_ids = np.take_along_axis(token_ids, order, axis=-1)[is_told]
    return TopTokens(num_tokens, told_ids.astype(np.int32), logprobs[is_told])


def select_rows(top: TopTokens, is_selected: np.ndarray) -> TopTokens:
    """The same of some rows alone."""
    is_kept = np.repeat(is_selected, top.num_tokens)
    return TopTokens(top.num_tokens[is_selected], top.token_ids[is_kept], top.logprobs[is_kept])


class ScoredTokens(NamedTuple):
    """On the device: what the model made of a step's prompt tokens."""

    logprobs: torch.Tensor  # [total] float32
    top_logprobs: torch.Tensor  # [total, n] float32, best first
    top_token_ids: torch.Tensor  # [total, n] int64


def score_prompt(
    compute_logits: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor, prompt: PromptInputs
) -> ScoredTokens:
    """Log-probabilities of prompt tokens in the model's own distribution, unfiltered; every rank must call it."""
    indices, token_ids = to_device(prompt.indices, hidden.device), to_device(prompt.token_ids, hidden.device)
    pieces = []
    for start in range(0, len(indices), PROMPT_ROWS_AT_ONCE):
        piece = slice(start, start + PROMPT_ROWS_AT_ONCE)
        logprobs = log_probabilities(compute_logits(hidden[indices[piece]]))
        own = logprobs.gather(1, token_ids[piece].unsqueeze(1)).squeeze(1)
        top = logprobs.topk(min(prompt.top_n_tokens, logprobs.shape[1]), dim=-1)
        pieces.append((own, top.values, top.indices))
    return ScoredTokens(*(torch.cat(columns) for columns in zip(*pieces, strict=True)))


def tell_prompt_scores(prompt: PromptInputs, scored: ScoredTokens) -> PromptScores:
    """What is answered, once the scores are on the host."""
    return PromptScores(
        sequence_ids=prompt.sequence_ids,
        first_positions=prompt.first_positions,
        num_tokens=prompt.num_tokens,
        logprobs=scored.logprobs.numpy(),
        top_token_ids=scored.top_token_ids.numpy().astype(np.int32),
        top_logprobs=scored.top_logprobs.numpy(),
    )
