"""POST /v1/completions: one prompt or several, as text or token ids."""

from dataclasses import dataclass
from typing import Any

from aiohttp import web

from text_generation_router.api.body import read_body
from text_generation_router.api.event_stream import EventStream
from text_generation_router.api.fields import Fields
from text_generation_router.api.generation import Generation, GenerationRequest, read_texts, timing_headers, together
from text_generation_router.api.openai import (
    AnswerHead,
    finish_reason,
    read_includes_usage,
    read_model_name,
    read_options,
    stream_until_done,
    usage,
)
from text_generation_router.api.openai_schema import COMPLETIONS_BODY
from text_generation_router.api.responses import TextEvent, event, json_response
from text_generation_router.config import RouterConfig
from text_generation_router.errors import BatchSizeExceeded
from text_generation_router.generation_options import GenerationOptions
from text_generation_router.token_stream import TokenOutput


@dataclass(frozen=True)
class CompletionsCall:
    """One request of this route."""

    prompts: list[str | list[int]]
    options: GenerationOptions
    includes_usage: bool

    @property
    def num_characters(self) -> int:
        """Length of the prompts that are text."""
        return sum(len(prompt) for prompt in self.prompts if isinstance(prompt, str))


async def completions(request: web.Request) -> web.StreamResponse:
    """POST /v1/completions: continue the prompts, streamed or whole."""
    async with GenerationRequest(request) as record:
        return await answer_completions(record, await read_body(request))


async def answer_completions(record: GenerationRequest, values: dict[str, Any]) -> web.StreamResponse:
    """Answer a body of this route."""
    body = Fields(values, COMPLETIONS_BODY)
    call = read_call(body, record.context.config)
    record.note_ignored(body)
    record.admit(len(call.prompts))
    requests = [await record.validate(prompt, call.options) for prompt in call.prompts]
    answer = _Answer(record, call, [record.submit(valid, call.options) for valid in requests])
    return await (answer.stream() if call.options.is_stream else answer.whole())


def read_call(body: Fields, config: RouterConfig) -> CompletionsCall:
    """Read the types of a body; ranges are the validator's."""
    prompts = _read_prompts(body)
    _check_num_prompts(len(prompts), config)
    read_model_name(body)
    return CompletionsCall(
        prompts=prompts,
        options=read_options(body, body.boolean("stream"), names={"inputs": "prompt"}),
        includes_usage=read_includes_usage(body),
    )


def _read_prompts(body: Fields) -> list[str | list[int]]:
    """A string, a list of strings, a list of token ids, or a list of such lists."""
    prompt = body.any("prompt")
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, list) and prompt:
        if _are_token_ids(prompt):
            return [prompt]
        if all(isinstance(item, str) or (isinstance(item, list) and _are_token_ids(item)) for item in prompt):
            return prompt
    raise body.error("prompt", "must be a string, a list of strings, a list of token ids or a list of such lists")


def _check_num_prompts(num_prompts: int, config: RouterConfig) -> None:
    """Refuse a list that cannot be served however often it is sent: each prompt counts as a request."""
    for most, flag in (
        (config.max_client_batch_size, "--max-client-batch-size"),
        (config.max_concurrent_requests, "--max-concurrent-requests"),
    ):
        if num_prompts > most:
            raise BatchSizeExceeded(
                f"`prompt` may hold at most {most} prompts. Given: {num_prompts}. "
                f"Send fewer in one request, or raise {flag} of the server",
                "prompt",
            )


def _are_token_ids(values: list[Any]) -> bool:
    return all(type(value) is int for value in values)


class _Answer:
    """Renders the generations of one request in this route's shape."""

    def __init__(self, record: GenerationRequest, call: CompletionsCall, generations: list[Generation]) -> None:
        self._record = record
        self._call = call
        self._generations = generations
        self._head = AnswerHead(record.context, "text_completion", "cmpl", record.context.served_name)

    async def whole(self) -> web.StreamResponse:
        """The answer as one object, choices in the order of the prompts."""
        generations = self._generations
        texts = await read_texts(generations)
        self._record.succeed()
        choices = [
            self._choice(index, texts[index], finish_reason(generation)) for index, generation in enumerate(generations)
        ]
        headers = timing_headers(generations, self._record.context.compute_type, self._call.num_characters)
        return json_response(self._head.body(choices, usage(generations)), headers)

    async def stream(self) -> web.StreamResponse:
        """The answer as a chunk for each token, those of several prompts as they come."""
        return await stream_until_done(self._record, self._call.num_characters, self._send_all)

    async def _send_all(self, events: EventStream) -> None:
        await together([self._send_chunks(index, events) for index in range(len(self._generations))])
        self._record.succeed()
        if self._call.includes_usage:
            await events.send(event(self._head.body([], usage(self._generations))))

    async def _send_chunks(self, index: int, events: EventStream) -> None:
        generation = self._generations[index]
        chunk = TextEvent(lambda text: self._head.body([self._choice(index, text, None)], None))

        def render(outputs: list[TokenOutput]) -> bytes:
            if generation.stream.finish_reason is None:
                return chunk.render_all(outputs)
            choice = self._choice(index, outputs[-1].text, finish_reason(generation))
            last = event(self._head.body([choice], usage([generation])))
            return chunk.render_all(outputs[:-1]) + last

        await events.send_all(generation, render)

    @staticmethod
    def _choice(index: int, text: str, reason: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": reason}
