"""What both OpenAI routes share: sampling parameters, names, usage and finish reasons."""

import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

from aiohttp import web

from text_generation_router.api.context import Context
from text_generation_router.api.event_stream import EventStream, stream_answer
from text_generation_router.api.fields import Fields
from text_generation_router.api.generation import Generation, GenerationRequest, prompts_of
from text_generation_router.api.grammars import read_grammar
from text_generation_router.api.openai_schema import MAX_MODEL_NAME_CHARACTERS, MAX_USER_CHARACTERS
from text_generation_router.api.options import read_shared_options
from text_generation_router.api.request_id import new_request_id
from text_generation_router.generation_options import GenerationOptions
from text_generation_router.token_stream import FinishReason
from text_generation_router.validation import MAX_LOGIT_BIASES

DONE = b"data: [DONE]\n\n"
MAX_TOKEN_ID_DIGITS = 10
_FINISH_REASONS = {
    FinishReason.LENGTH: "length",
    FinishReason.EOS_TOKEN: "stop",
    FinishReason.STOP_SEQUENCE: "stop",
}


def read_options(
    body: Fields,
    is_stream: bool,
    names: dict[str, str],
    top_n_tokens: int | None = None,
    user: str | None = None,
) -> GenerationOptions:
    """Read the parameters that both routes know. These routes sample unless the temperature is 0.

    `user` is another name for the end user.
    """
    shared = read_shared_options(body, is_stream)
    max_new_tokens, max_tokens_name = _read_max_tokens(body)
    return replace(
        shared,
        max_new_tokens=max_new_tokens,
        do_sample=shared.temperature != 0,
        is_greedy=shared.temperature == 0,
        temperature=shared.temperature or None,
        top_k=None if shared.top_k in (0, -1) else shared.top_k,  # both mean off to clients of these routes
        top_p=None if shared.top_p == 1 else shared.top_p,
        min_p=body.number("min_p"),
        keep_stop_string=False,
        frequency_penalty=body.number("frequency_penalty"),
        presence_penalty=body.number("presence_penalty"),
        logit_bias=_read_logit_bias(body),
        min_tokens=body.integer("min_tokens"),
        stop_token_ids=_read_stop_token_ids(body),
        n=body.integer("n"),
        top_n_tokens=top_n_tokens,
        grammar=read_grammar(body.object("response_format")),
        unsupported=tuple(body.refused()),
        user=read_user(body, "user") or user,
        names={"max_new_tokens": max_tokens_name, "grammar": "response_format", **names},
    )


def _read_logit_bias(body: Fields) -> dict[int, float]:
    """Token ids, which JSON's names can only be as text, to numbers."""
    biases = body.mapping("logit_bias") or {}
    if len(biases) > MAX_LOGIT_BIASES:
        raise body.error("logit_bias", f"may name at most {MAX_LOGIT_BIASES} tokens")
    for name, value in biases.items():
        if not (name.isascii() and name.isdecimal() and len(name) <= MAX_TOKEN_ID_DIGITS):
            raise body.error("logit_bias", "names must be token ids, as text")
        if type(value) is not int and type(value) is not float:
            raise body.error("logit_bias", "values must be numbers")
    return {int(name): float(value) for name, value in biases.items()}


def _read_stop_token_ids(body: Fields) -> tuple[int, ...]:
    token_ids = body.items("stop_token_ids") or []
    if not all(type(token_id) is int for token_id in token_ids):
        raise body.error("stop_token_ids", "must be a list of integers")
    return tuple(token_ids)


def read_user(body: Fields, name: str) -> str | None:
    """A name for the end user, bounded for the log."""
    user = body.string(name)
    if user is not None and len(user) > MAX_USER_CHARACTERS:
        raise body.error(name, f"must have at most {MAX_USER_CHARACTERS} characters")
    return user


def _read_max_tokens(body: Fields) -> tuple[int | None, str]:
    """Both names of the limit; two that differ are a mistake."""
    old, new = body.integer("max_tokens"), body.integer("max_completion_tokens")
    if old is not None and new is not None and old != new:
        raise body.error("max_completion_tokens", "and `max_tokens` must not differ")
    return (new, "max_completion_tokens") if new is not None else (old, "max_tokens")


def read_includes_usage(body: Fields) -> bool:
    """Whether a stream ends with an event of its own for usage."""
    options = body.object("stream_options")
    if options is None:
        return False
    for name in options.refused():
        raise options.error(name, "is not supported by this server")
    return options.boolean("include_usage")


def read_model_name(body: Fields) -> str | None:
    """The client's name for the model; any is served by the one model."""
    name = body.string("model")
    if name is not None and len(name) > MAX_MODEL_NAME_CHARACTERS:
        raise body.error("model", f"must have at most {MAX_MODEL_NAME_CHARACTERS} characters")
    return name or None


class AnswerHead:
    """The fields that open every object of one answer."""

    def __init__(self, context: Context, kind: str, id_prefix: str, model: str) -> None:
        self._fields = {
            "object": kind,
            "id": f"{id_prefix}-{new_request_id()}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": context.system_fingerprint,
        }

    def body(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None) -> dict[str, Any]:
        """One object of the answer."""
        return {**self._fields, "choices": choices, "usage": usage}


def finish_reason(generation: Generation) -> str:
    """The finish reason in OpenAI's words."""
    return _FINISH_REASONS[generation.finish_reason]


def usage(generations: Sequence[Generation], is_prompt_only: bool = False) -> dict[str, Any]:
    """Token counts, summed over the prompts and over all runs of them."""
    prompts = prompts_of(generations)
    num_prompt = sum(stream.num_prompt_tokens for stream in prompts)
    num_cached = sum(stream.num_cached_tokens for stream in prompts)
    num_generated = 0 if is_prompt_only else sum(one.stream.num_generated_tokens for one in generations)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_generated,
        "total_tokens": num_prompt + num_generated,
        "prompt_tokens_details": {"cached_tokens": num_cached},
        "recomputed_tokens": sum(one.stream.num_recomputed_tokens for one in generations),
    }


async def stream_until_done(
    record: GenerationRequest, num_characters: int, send_all: Callable[[EventStream], Awaitable[None]]
) -> web.StreamResponse:
    """Stream an answer as these routes do: errors keep their status until the first event, [DONE] is the last."""

    async def send(events: EventStream) -> None:
        await send_all(events)
        await events.send(DONE)

    return await stream_answer(record, num_characters, send, keeps_status=(Exception,))
