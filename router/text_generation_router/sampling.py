"""From what a client asked for to how its tokens are chosen; the values are checked already."""

import secrets
from collections.abc import Iterable

from text_generation_router.generation_options import GenerationOptions
from text_generation_router.valid_request import LogitsChanges, SamplingParameters

# Beyond these a factor of the logits changes nothing but overflows float32.
MIN_FACTOR, MAX_FACTOR = 1e-6, 1e6


def sampling_parameters(
    options: GenerationOptions, vocab_size: int, eos_token_ids: Iterable[int], max_new_tokens: int
) -> SamplingParameters:
    """How the tokens of a request of `max_new_tokens` are chosen.

    Sampling is on when asked for, or when a parameter is set that only sampling honours.
    """
    ends = {token_id for token_id in eos_token_ids if token_id < vocab_size}
    changes = _logits_changes(options, ends, max_new_tokens)
    temperature = 1.0 if options.temperature is None else options.temperature
    filters = (options.top_k, options.top_p, options.typical_p, options.min_p or None)
    is_sampled = options.do_sample or temperature != 1.0 or any(value is not None for value in filters)
    if options.is_greedy or not is_sampled:
        return SamplingParameters(changes=changes)
    # 53 bits: the reported seed survives clients that read numbers as doubles.
    seed = secrets.randbits(53) if options.seed is None else options.seed
    top_k = options.top_k or 0
    return SamplingParameters(
        temperature=_bounded(temperature),
        top_k=top_k if top_k < vocab_size else 0,
        top_p=1.0 if options.top_p is None else options.top_p,
        min_p=options.min_p or 0.0,
        typical_p=1.0 if options.typical_p is None else options.typical_p,
        seed=seed,
        changes=changes,
    )


def _bounded(factor: float) -> float:
    return min(max(factor, MIN_FACTOR), MAX_FACTOR)


def _logits_changes(options: GenerationOptions, ends: set[int], max_new_tokens: int) -> LogitsChanges | None:
    """None where the logits stay as they are."""
    banned: set[int] = set()
    if options.min_tokens:
        banned = set(options.stop_token_ids).union(() if options.ignore_eos else ends)
    changes = LogitsChanges(
        bias_token_ids=tuple(options.logit_bias),
        bias_values=tuple(options.logit_bias.values()),
        has_watermark=options.watermark,
        repetition_penalty=_bounded(options.repetition_penalty or 1.0),
        share_penalty=options.share_penalty or 0.0,
        frequency_penalty=options.frequency_penalty or 0.0,
        presence_penalty=options.presence_penalty or 0.0,
        banned_token_ids=tuple(sorted(banned)),
        min_tokens=min(options.min_tokens, max_new_tokens) if options.min_tokens and banned else 0,
    )
    return changes if changes != LogitsChanges() else None
