"""POST /v1/chat/completions."""

from dataclasses import dataclass
from typing import Any

from aiohttp import web

from text_generation_router.api.body import read_body
from text_generation_router.api.event_stream import EventStream
from text_generation_router.api.fields import Fields
from text_generation_router.api.generation import Generation, GenerationRequest, timing_headers
from text_generation_router.api.messages import read_messages
from text_generation_router.api.openai import (
    AnswerHead,
    asks_for_format,
    finish_reason,
    read_includes_usage,
    read_model_name,
    read_options,
    stream_until_done,
    usage,
)
from text_generation_router.api.responses import TextEvent, event, json_response
from text_generation_router.token_stream import TokenOutput
from text_generation_router.validation import GenerationOptions


@dataclass(frozen=True)
class ChatCall:
    """One request of this route."""

    messages: list[dict[str, Any]]
    model: str | None
    options: GenerationOptions
    has_logprobs: bool
    includes_usage: bool


async def chat_completions(request: web.Request) -> web.StreamResponse:
    """Answer a conversation, streamed or whole."""
    async with GenerationRequest(request) as record:
        body = await read_body(request)
        call = read_call(body)
        record.note_ignored(body)
        record.admit()
        context = record.context
        context.validator.check_options(call.options)
        prompt = await context.chat_template.render(context.tokenizer.as_plain_text(call.messages))
        # The template writes the special tokens itself.
        valid = await context.validator.validate(prompt, call.options, add_special_tokens=False)
        generation = record.submit(valid)
        answer = _Answer(record, call, generation, len(prompt))
        return await (answer.stream() if call.options.is_stream else answer.whole())


def read_call(body: Fields) -> ChatCall:
    """Read the types of a body; ranges are the validator's."""
    is_stream = body.boolean("stream")
    has_logprobs = body.boolean("logprobs")
    options = read_options(
        body,
        is_stream,
        _read_unsupported(body),
        names={"inputs": "messages", "top_n_tokens": "top_logprobs"},
        top_n_tokens=body.integer("top_logprobs"),
    )
    return ChatCall(
        messages=read_messages(body),
        model=read_model_name(body),
        options=options,
        has_logprobs=has_logprobs,
        includes_usage=read_includes_usage(body),
    )


def _read_unsupported(body: Fields) -> list[str]:
    names = []
    if asks_for_format(body):
        names.append("response_format")
    tool_choice = body.value("tool_choice")
    if tool_choice == "none":
        body.items("tools")  # leaves the tools out of the prompt
    else:
        if body.items("tools"):
            names.append("tools")
        if tool_choice is not None and tool_choice != "auto":
            names.append("tool_choice")
    body.string("tool_prompt")
    body.boolean("parallel_tool_calls")
    names += [name for name in ("functions", "function_call") if body.value(name) not in (None, [], "none")]
    return names


class _Answer:
    """Renders one generation in this route's shape."""

    def __init__(self, record: GenerationRequest, call: ChatCall, generation: Generation, num_characters: int) -> None:
        self._record = record
        self._call = call
        self._generation = generation
        self._num_characters = num_characters
        self._tokenizer = record.context.tokenizer
        kind = "chat.completion.chunk" if call.options.is_stream else "chat.completion"
        served_name = record.context.served_name
        model = served_name if call.model in (None, "tgi") else call.model
        self._head = AnswerHead(record.context, kind, "chatcmpl", model)

    async def whole(self) -> web.StreamResponse:
        """The answer as one object."""
        generation = self._generation
        outputs = await generation.read_all()
        self._record.succeed(self._call.options)
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": "".join(output.text for output in outputs)},
            "logprobs": self._logprobs(outputs),
            "finish_reason": finish_reason(generation),
        }
        headers = timing_headers([generation], self._record.context.compute_type, self._num_characters)
        return json_response(self._head.body([choice], usage([generation])), headers)

    async def stream(self) -> web.StreamResponse:
        """The answer as a chunk for each token."""
        return await stream_until_done(self._record, self._num_characters, self._send_chunks)

    async def _send_chunks(self, events: EventStream) -> None:
        generation = self._generation
        text_chunk = TextEvent(lambda text: self._chunk(TokenOutput(0, 0.0, text, False)))

        def render(outputs: list[TokenOutput]) -> bytes:
            if generation.stream.finish_reason is None and not self._call.has_logprobs:
                return b"".join([text_chunk.render(output.text) for output in outputs])
            bodies = [self._chunk(output) for output in outputs]
            if generation.stream.finish_reason is not None:
                bodies[-1]["choices"][0]["finish_reason"] = finish_reason(generation)
                if self._call.includes_usage:
                    bodies.append(self._head.body([], usage([generation])))
            return b"".join(map(event, bodies))

        await events.send_all(generation, render)
        self._record.succeed(self._call.options)

    def _chunk(self, output: TokenOutput) -> dict[str, Any]:
        choice = {
            "index": 0,
            "delta": {"role": "assistant", "content": output.text},
            "logprobs": self._logprobs([output]),
            "finish_reason": None,
        }
        return self._head.body([choice], None)

    def _logprobs(self, outputs: list[TokenOutput]) -> dict[str, Any] | None:
        if not self._call.has_logprobs:
            return None
        content = []
        for output in outputs:
            text = self._tokenizer.token_text(output.token_id)
            content.append(
                {
                    "token": text,
                    "logprob": output.logprob,
                    "bytes": list(self._tokenizer.token_bytes(output.token_id)),
                    "top_logprobs": [],
                }
            )
        return {"content": content}
