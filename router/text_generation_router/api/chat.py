"""POST /v1/chat/completions."""

from typing import Any

from aiohttp import web

from text_generation_router.api.body import read_body
from text_generation_router.api.chat_request import (
    ChatCall,
    answer_options,
    answer_parser,
    read_call,
    render_prompt,
)
from text_generation_router.api.chat_schema import CHAT_BODY
from text_generation_router.api.event_stream import EventStream
from text_generation_router.api.fields import Fields
from text_generation_router.api.generation import Generation, GenerationRequest, timing_headers
from text_generation_router.api.openai import AnswerHead, finish_reason, stream_until_done, usage
from text_generation_router.api.responses import TextEvent, event, json_response
from text_generation_router.chat_output.deltas import (
    Answer,
    CallArguments,
    CallStart,
    Content,
    Delta,
    Parser,
    Reasoning,
)
from text_generation_router.token_stream import FinishReason, TokenOutput


async def chat_completions(request: web.Request) -> web.StreamResponse:
    """Answer a conversation, streamed or whole."""
    async with GenerationRequest(request) as record:
        return await answer_chat(record, await read_body(request))


async def answer_chat(record: GenerationRequest, values: dict[str, Any]) -> web.StreamResponse:
    """Answer a body of this route."""
    context = record.context
    family = context.chat_template.family
    body = Fields(values, CHAT_BODY)
    call = read_call(body, family)
    record.note_ignored(body)
    record.admit()
    context.validator.check_options(call.options)
    prompt = await render_prompt(context, call.conversation)
    options = answer_options(context, call, prompt)
    # The template writes the special tokens itself.
    generation = record.submit(await record.validate(prompt, options, add_special_tokens=False), options)
    answer = _Answer(record, call, generation, answer_parser(family, call, prompt), len(prompt))
    return await (answer.stream() if options.is_stream else answer.whole())


class _Answer:
    """Renders one generation in this route's shape."""

    def __init__(
        self,
        record: GenerationRequest,
        call: ChatCall,
        generation: Generation,
        parser: Parser | None,
        num_characters: int,
    ) -> None:
        self._record = record
        self._call = call
        self._generation = generation
        self._parser = parser
        self._has_called = False
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
        choice = {
            "index": 0,
            "message": self._message(outputs),
            "logprobs": self._logprobs(outputs),
            "finish_reason": self._finish_reason(),
        }
        self._record.succeed()
        headers = timing_headers([generation], self._record.context.compute_type, self._num_characters)
        return json_response(self._head.body([choice], usage([generation])), headers)

    def _message(self, outputs: list[TokenOutput]) -> dict[str, Any]:
        if self._parser is None:
            return {"role": "assistant", "content": "".join(output.text for output in outputs)}
        answer = Answer()
        for output in outputs:
            answer.add(self._parser.push(output.text))
        answer.add(self._parser.end())
        self._has_called = bool(answer.calls)
        message: dict[str, Any] = {"role": "assistant", "content": answer.content}
        if answer.reasoning:
            message["reasoning_content"] = answer.reasoning
        if answer.calls:
            message["content"] = answer.content or None
            message["tool_calls"] = [
                {
                    "id": call.call_id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in answer.calls
            ]
        return message

    async def stream(self) -> web.StreamResponse:
        """The answer as a chunk for each token; with a parser, for each part that tokens make known."""
        return await stream_until_done(self._record, self._num_characters, self._send_chunks)

    async def _send_chunks(self, events: EventStream) -> None:
        generation = self._generation
        text_chunk = TextEvent(lambda text: self._chunk(_content_body(text), None))

        def render(outputs: list[TokenOutput]) -> bytes:
            is_end = generation.stream.finish_reason is not None
            if self._parser is not None:
                bodies = self._parsed_chunks(outputs, is_end, self._parser)
            elif is_end or self._call.has_logprobs:
                bodies = [self._chunk(_content_body(output.text), self._logprobs([output])) for output in outputs]
            else:
                return text_chunk.render_all(outputs)
            if is_end:
                bodies[-1]["choices"][0]["finish_reason"] = self._finish_reason()
                if self._call.includes_usage:
                    bodies.append(self._head.body([], usage([generation])))
            return b"".join(map(event, bodies))

        await events.send_all(generation, render)
        self._record.succeed()

    def _parsed_chunks(self, outputs: list[TokenOutput], is_end: bool, parser: Parser) -> list[dict[str, Any]]:
        """A chunk for each part; a token without one has a chunk when it is the last, or its log-probability counts."""
        bodies = []
        for position, output in enumerate(outputs, 1):
            is_last = is_end and position == len(outputs)
            deltas = parser.push(output.text) + (parser.end() if is_last else [])
            logprobs = self._logprobs([output])
            for delta in deltas or ([Content("")] if is_last or logprobs is not None else []):
                self._has_called |= isinstance(delta, CallStart)
                bodies.append(self._chunk(_delta_body(delta), logprobs))
                logprobs = None
        return bodies

    def _chunk(self, delta: dict[str, Any], logprobs: dict[str, Any] | None) -> dict[str, Any]:
        return self._head.body([{"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": None}], None)

    def _finish_reason(self) -> str:
        if self._has_called and self._generation.finish_reason is not FinishReason.LENGTH:
            return "tool_calls"
        return finish_reason(self._generation)

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


def _content_body(text: str) -> dict[str, Any]:
    # TGI's Python client cannot do without the last key.
    return {"role": "assistant", "content": text, "tool_calls": None}


def _delta_body(delta: Delta) -> dict[str, Any]:
    match delta:
        case Content(text):
            return _content_body(text)
        case Reasoning(text):
            return {"role": "assistant", "reasoning_content": text}
        case CallStart(index, call_id, name):
            return _call_body(index, call_id, name, "")
        case CallArguments(index, text):
            # Clients join the ids and names of all chunks.
            return _call_body(index, "", None, text)


def _call_body(index: int, call_id: str, name: str | None, arguments: str) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    call = {"index": index, "id": call_id, "type": "function", "function": function}
    return {"role": "assistant", "tool_calls": [call]}
