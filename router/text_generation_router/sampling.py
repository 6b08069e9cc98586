"""From what a client asked for to how its tokens are chosen; the values are checked already."""

import hashlib
import secrets
from collections.abc import Iterable
from dataclasses import replace

from text_generation_router.generation_options import GenerationOptions
from text_generation_router.valid_request import LogitsChanges, SamplingParameters, ValidRequest

# Beyond these a factor of the logits changes nothing but overflows float32.
MIN_FACTOR, MAX_FACTOR = 1e-6, 1e6
# A smaller share could become 0 as the shards' 32-bit number, which means something else; it keeps one token anyhow.
MIN_SHARE = 1e-6
# Seeds that are made here: reported, they survive clients that read numbers as doubles.
SEED_BITS = 53


def sampling_parameters(
    options: GenerationOptions, vocab_size: int, eos_token_ids: Iterable[int], max_new_tokens: int
) -> SamplingParameters:
    """How the tokens of a request of `max_new_tokens` are chosen."""
    ends = {token_id for token_id in eos_token_ids if token_id < vocab_size}
    changes = _logits_changes(options, ends, max_new_tokens)
    if not is_sampled(options):
        return SamplingParameters(changes=changes, top_n_tokens=options.top_n_tokens or 0)
    seed = secrets.randbits(SEED_BITS) if options.seed is None else options.seed
    top_k = options.top_k or 0
    return SamplingParameters(
        temperature=1.0 if options.temperature is None else _bounded(options.temperature),
        top_k=top_k if top_k < vocab_size else 0,
        top_p=1.0 if options.top_p is None else max(options.top_p, MIN_SHARE),
        min_p=options.min_p or 0.0,
        typical_p=1.0 if options.typical_p is None else max(options.typical_p, MIN_SHARE),
        seed=seed,
        changes=changes,
        top_n_tokens=options.top_n_tokens or 0,
    )


def is_sampled(options: GenerationOptions) -> bool:
    """Sampling is on when asked for, or when a parameter is set that only sampling honours."""
    filters = (options.top_k, options.top_p, options.typical_p, options.min_p or None)
    is_wanted = options.do_sample or any(value is not None for value in filters)
    return not options.is_greedy and (is_wanted or options.temperature not in (None, 1.0))


def request_of_run(request: ValidRequest, number: int) -> ValidRequest:
    """A further run of a request: with a seed of its own, and without the scores that the first run has."""
    sampling = request.sampling
    if sampling.temperature > 0:
        key = sampling.seed.to_bytes(8, "little") + number.to_bytes(8, "little")
        seed = int.from_bytes(hashlib.sha256(key).digest()[:8], "little") % 2**SEED_BITS
        sampling = replace(sampling, seed=seed)
    return replace(request, sampling=sampling, scores_prompt=False)


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
