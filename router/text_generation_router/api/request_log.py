"""The log lines of requests: one for each prompt that was answered, one for each request that was not.

As text a line is a word and `name=value` pairs; as JSON the same values are `fields`. What clients wrote stands in no
line but the one of `--log-prompts`: of a refusal for what a request says, only the type and the field at fault.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from text_generation_router.errors import GenerationError, RouterError
from text_generation_router.token_stream import TokenStream

logger = logging.getLogger(__name__)

_MAX_PROMPT_CHARACTERS = 10_000


@dataclass(frozen=True)
class Identity:
    """Who asked for what; "-" where there is nothing to tell."""

    request_id: str
    client_request_id: str
    tenant: str
    route: str

    def fields(self) -> dict[str, Any]:
        """As they stand in a line."""
        return dict(vars(self))


def log_success(
    identity: Identity, stream: TokenStream, finish_reason: str, seed: int | None, parameters: Mapping[str, Any]
) -> None:
    """A prompt was answered; `parameters` holds nothing that a client wrote."""
    ended_ns = stream.timings.finished_ns
    fields = {
        **identity.fields(),
        **_sizes([stream]),
        "finish_reason": str(finish_reason),
        **_times([stream], stream.timings.received_ns, ended_ns),
        "seed": seed,
        "parameters": parameters,
    }
    _write(logging.INFO, "Success", fields)


def log_end(
    identity: Identity, streams: Sequence[TokenStream], received_ns: int, ended_ns: int, error: BaseException | None
) -> None:
    """A request has ended with `error`; None: its client left."""
    fields = {**identity.fields(), **_sizes(streams), **_times(streams, received_ns, ended_ns)}
    if error is None:
        _write(logging.INFO, "Client left", fields)
        return
    status = error.status if isinstance(error, RouterError) else 500
    fields |= {"status": status, "error_type": getattr(error, "error_type", "internal_error")}
    if getattr(error, "param", None):
        fields["param"] = error.param  # type: ignore[attr-defined] # it is a RouterError
    if isinstance(error, RouterError) and error.failure_label not in ("validation", "template"):
        fields["reason"] = str(error)
    is_ours = status >= 500 or isinstance(error, GenerationError)
    _write(logging.WARNING if is_ours else logging.INFO, "Refused" if _is_refusal(error) else "Failed", fields)


def log_prompt(identity: Identity, prompt: str | list[int]) -> None:
    """What `--log-prompts` asks for: the text, or the token ids, of a prompt."""
    shown = prompt[:_MAX_PROMPT_CHARACTERS]
    _write(logging.INFO, "Prompt", {"request_id": identity.request_id, "prompt": shown})


def _is_refusal(error: BaseException) -> bool:
    return isinstance(error, RouterError) and bool(error.rejection)


def _sizes(streams: Sequence[TokenStream]) -> dict[str, int]:
    return {
        "input_tokens": sum(stream.num_prompt_tokens for stream in streams),
        "cached_tokens": sum(stream.num_cached_tokens for stream in streams),
        "generated_tokens": sum(stream.num_generated_tokens for stream in streams),
        "recomputed_tokens": sum(stream.num_recomputed_tokens for stream in streams),
    }


def _times(streams: Sequence[TokenStream], received_ns: int, ended_ns: int) -> dict[str, float]:
    """Milliseconds; of several prompts those of the first, and none for what has not happened."""
    times = {"total_time_ms": _ms(received_ns, ended_ns)}
    if not streams:
        return times
    timings = streams[0].timings
    times["validation_time_ms"] = _ms(received_ns, timings.queued_ns)
    times["queue_time_ms"] = _ms(timings.queued_ns, timings.first_scheduled_ns or ended_ns)
    if timings.first_token_ns:
        times["time_to_first_token_ms"] = _ms(received_ns, timings.first_token_ns)
    if timings.first_scheduled_ns:
        inference_ns = ended_ns - timings.first_scheduled_ns
        times["inference_time_ms"] = round(inference_ns / 1e6, 1)
        times["time_per_token_ms"] = round(inference_ns / 1e6 / max(streams[0].num_generated_tokens, 1), 2)
    return times


def _ms(start_ns: int, end_ns: int) -> float:
    return round((end_ns - start_ns) / 1e6, 1)


def _write(level: int, word: str, fields: Mapping[str, Any]) -> None:
    if logger.isEnabledFor(level):
        pairs = " ".join(f"{name}={_shown(value)}" for name, value in fields.items())
        logger.log(level, "%s %s", word, pairs, extra={"fields": fields})


def _shown(value: Any) -> str:
    """A value without spaces as it is, others as JSON."""
    if isinstance(value, str) and value and not any(character.isspace() or character == '"' for character in value):
        return value
    return str(value) if isinstance(value, int | float) else orjson.dumps(value).decode()
