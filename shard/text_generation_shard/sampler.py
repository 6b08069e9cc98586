"""Logits -> tokens and log-probabilities on a CPU, on every rank the same. Rows stand alone: none can hurt another."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from text_generation_kernels import reference_sampling as reference
from text_generation_kernels.token_masks import mask_tokens, num_words
from text_generation_proto.columns import Float32Array, Int32Array

from text_generation_shard import distributed
from text_generation_shard.changed_logits import ChangedLogits
from text_generation_shard.few_tokens import FewTokens
from text_generation_shard.grammar_masks import StepMasks
from text_generation_shard.input_batch import InputBatch
from text_generation_shard.step import TopTokens
from text_generation_shard.step_inputs import BoolArray, Int64Array, StepInputs
from text_generation_shard.token_scores import find_candidates, tell_top_tokens

# Stands for the token of a row that has none.
NO_TOKEN = -1


class SampledTokens(NamedTuple):
    """One token for each sampling row of a step."""

    token_ids: Int64Array  # [num_samples]
    logprobs: Float32Array  # [num_samples]; zeros on other ranks than 0
    is_valid: BoolArray  # [num_samples]; False where the logits were not finite
    top_tokens: TopTokens | None  # None: no row asked, or another rank than 0


def sample_tokens(
    logits: torch.Tensor | None,
    batch: InputBatch,
    inputs: StepInputs,
    changed: ChangedLogits,
    masks: StepMasks | None = None,
) -> SampledTokens:
    """Rank 0 chooses, the others learn its choice. `logits` is [num_samples, vocab_size], None if no row samples."""
    if logits is None:
        return SampledTokens(np.empty(0, np.int64), np.empty(0, np.float32), np.empty(0, np.bool_), None)
    top_tokens = None
    if distributed.rank() == 0:
        if batch.sampling.has_special:
            tokens, logprobs, top_tokens = _choose_specially(logits, batch, inputs, changed, masks)
        else:
            tokens, logprobs = _choose(logits, batch, inputs, _wait(masks, logits.shape[1]))
    else:
        tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
        logprobs = torch.zeros(len(logits), device=logits.device)
    tokens = distributed.broadcast(tokens)
    token_ids = tokens.numpy()
    return SampledTokens(token_ids, logprobs.numpy(), token_ids != NO_TOKEN, top_tokens)


@dataclass(frozen=True)
class _MadeMasks:
    """A step's masks, once they are made."""

    words: Int32Array  # [M, num_words]
    mask_rows: Int32Array  # [num_samples] which mask a row has, or NO_MASK

    def apply(self, logits: torch.Tensor, samples: Int64Array) -> None:
        """Exclude tokens, in place, from some of the step's rows, whose logits these are."""  # [len(samples), V]
        mask_tokens(logits, torch.from_numpy(self.words), torch.from_numpy(self.mask_rows[samples]))


def _wait(masks: StepMasks | None, vocab_size: int) -> _MadeMasks | None:
    if masks is None:
        return None
    words = np.empty((len(masks), num_words(vocab_size)), np.int32)
    masks.wait(words)
    return _MadeMasks(words, masks.mask_rows)


def _choose(
    logits: torch.Tensor, batch: InputBatch, inputs: StepInputs, masks: _MadeMasks | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and log-probabilities of all rows; how a row is sampled depends on its own mask alone."""
    everything = np.arange(len(logits))
    if masks is None:
        return _sample(logits, batch, inputs, everything)
    few = FewTokens.find(masks.words, masks.mask_rows, logits.shape[1])
    others = np.setdiff1d(everything, few.samples)
    tokens, logprobs = torch.empty(len(logits), dtype=torch.int64), torch.empty(len(logits))
    if len(few.samples):
        places, logprobs[few.samples] = _sample(few.logits(logits), batch, inputs, few.samples)
        chosen = torch.from_numpy(few.token_ids(places.clamp(min=0).numpy()))
        tokens[few.samples] = torch.where(places == NO_TOKEN, NO_TOKEN, chosen)
        logits = logits[others]
    if len(others):
        masks.apply(logits, others)
        tokens[others], logprobs[others] = _sample(logits, batch, inputs, others)
    return tokens, logprobs


def _sample(
    logits: torch.Tensor, batch: InputBatch, inputs: StepInputs, samples: Int64Array
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and log-probabilities of some of the step's rows, whose logits these are."""
    rows = inputs.sampling_rows[samples]
    tokens, logprobs = reference.sample(
        logits,
        **_filters(batch, rows),
        seeds=torch.from_numpy(batch.sampling.seeds[rows].view(np.int64)),
        # The random number belongs to the token's place in its sequence: a recomputed sequence draws the same.
        positions=torch.from_numpy(inputs.sampling_positions[samples]),
    )
    return torch.where(reference.finite_rows(logits), tokens, NO_TOKEN), logprobs


def _choose_specially(
    logits: torch.Tensor, batch: InputBatch, inputs: StepInputs, changed: ChangedLogits, masks: StepMasks | None
) -> tuple[torch.Tensor, torch.Tensor, TopTokens | None]:
    """With what changes logits before, and the most likely tokens after."""
    batch_rows, sampling = inputs.sampling_rows, batch.sampling
    rows = torch.from_numpy(batch_rows.astype(np.int32))
    logits = changed.apply(
        logits,
        batch_rows,
        sampling.has_watermark[batch_rows],
        rows,
        torch.from_numpy(inputs.sampling_positions),
        torch.from_numpy(inputs.input_ids[inputs.sampling_indices]),
    )
    made = _wait(masks, logits.shape[1])
    tokens, logprobs = _choose(logits, batch, inputs, made)
    changed.count(tokens.clamp(min=0), batch_rows, rows)
    samples = np.flatnonzero(sampling.top_n_tokens[batch_rows])
    if not len(samples):
        return tokens, logprobs, None
    wanted = sampling.top_n_tokens[batch_rows[samples]]
    told = logits[torch.from_numpy(samples)]
    if made is not None:
        made.apply(told, samples)
    final = reference.final_logprobs(told, **_filters(batch, batch_rows[samples]))
    best = find_candidates(final, int(wanted.max()))
    top = tell_top_tokens(best.logprobs.numpy(), best.token_ids.numpy(), samples, wanted, len(batch_rows))
    return tokens, logprobs, top


def _filters(batch: InputBatch, rows: Int64Array) -> dict[str, torch.Tensor]:
    names = ("temperatures", "top_k", "top_p", "min_p", "typical_p")
    return {name: torch.from_numpy(getattr(batch.sampling, name)[rows]) for name in names}
