"""POST /v1/chat/completions."""

from collections.abc import Callable, Sequence
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
from text_generation_router.api.context import Tokenizer
from text_generation_router.api.event_stream import EventStream
from text_generation_router.api.fields import Fields
from text_generation_router.api.generation import Generation, GenerationRequest, timing_headers, together
from text_generation_router.api.openai import AnswerHead, finish_reason, stream_until_done, usage
from text_generation_router.api.responses import TextEvent, event, json_list, render, rendered_response
from text_generation_router.api.runs import Run, best_runs, read_runs, submit_runs
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
    context.validator.check_options(call.options)
    record.admit(call.options.num_runs)
    prompt = await record.in_time(render_prompt(context, call.conversation))
    options = answer_options(context, call, prompt)
    # The template writes the special tokens itself.
    generations = submit_runs(record, await record.validate(prompt, options, add_special_tokens=False), options)
    answer = _Answer(record, call, generations, lambda: answer_parser(family, call, prompt), len(prompt))
    return await (answer.stream() if options.is_stream else answer.whole())


class _Choice:
    """One choice of an answer, whole or in chunks."""

    def __init__(
        self, index: int, call: ChatCall, generation: Generation, parser: Parser | None, tokenizer: Tokenizer
    ) -> None:
        self._index = index
        self._call = call
        self._generation = generation
        self._parser = parser
        self._tokenizer = tokenizer
        self._has_called = False
        self.is_begun = False  # whether a chunk was made

    @property
    def is_plain(self) -> bool:
        """Whether a chunk is made of each token, of which nothing but the text is shown."""
        return self._parser is None and not self._call.has_logprobs

    def whole(self, outputs: list[TokenOutput]) -> dict[str, Any]:
        """The choice of an answer that is one object."""
        message = self._message(outputs)
        reason = self._finish_reason()
        return {"index": self._index, "message": message, "logprobs": self._logprobs(outputs), "finish_reason": reason}

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

    def chunks(self, outputs: list[TokenOutput], is_end: bool) -> list[dict[str, Any]]:
        """Chunks of some tokens, with the last of which the choice may end."""
        if self._parser is None:
            chunks = [self.chunk(_content_body(output.text), self._logprobs([output])) for output in outputs]
        else:
            chunks = self._parsed_chunks(outputs, is_end, self._parser)
        if is_end:
            chunks[-1]["finish_reason"] = self._finish_reason()
        return chunks

    def _parsed_chunks(self, outputs: list[TokenOutput], is_end: bool, parser: Parser) -> list[dict[str, Any]]:
        """A chunk for each part; a token without one has a chunk when it is the last, or its log-probability counts."""
        chunks = []
        for position, output in enumerate(outputs, 1):
            is_last = is_end and position == len(outputs)
            deltas = parser.push(output.text) + (parser.end() if is_last else [])
            logprobs = self._logprobs([output])
            for delta in deltas or ([Content("")] if is_last or logprobs is not None else []):
                self._has_called |= isinstance(delta, CallStart)
                chunks.append(self.chunk(_delta_body(delta), logprobs))
                logprobs = None
        return chunks

    def chunk(self, delta: dict[str, Any], logprobs: dict[str, Any] | None) -> dict[str, Any]:
        """A chunk that does not end the choice. Clients join the roles of all chunks, so one names it."""
        role = "" if self.is_begun else "assistant"
        self.is_begun = True
        return {
            "index": self._index,
            "delta": {"role": role, **delta},
            "logprobs": logprobs,
            "finish_reason": None,
        }

    def _finish_reason(self) -> str:
        if self._has_called and self._generation.finish_reason is not FinishReason.LENGTH:
            return "tool_calls"
        return finish_reason(self._generation)

    def _logprobs(self, outputs: list[TokenOutput]) -> dict[str, Any] | None:
        if not self._call.has_logprobs:
            return None
        return {"content": json_list(map(self._scored_body, outputs))}

    def _scored_body(self, output: TokenOutput) -> dict[str, Any]:
        # A tie with the last is one more than these routes promise.
        best = output.top_tokens[: self._call.options.top_n_tokens or 0]
        body = self._token_body(output.token_id, output.logprob)
        return {**body, "top_logprobs": [self._token_body(*score) for score in best]}

    def _token_body(self, token_id: int, logprob: float) -> dict[str, Any]:
        text, own_bytes = self._tokenizer.token_text(token_id), self._tokenizer.token_bytes(token_id)
        return {"token": text, "logprob": logprob, "bytes": list(own_bytes)}


class _Answer:
    """Renders the runs of one conversation in this route's shape."""

    def __init__(
        self,
        record: GenerationRequest,
        call: ChatCall,
        generations: list[Generation],
        make_parser: Callable[[], Parser | None],
        num_characters: int,
    ) -> None:
        self._record = record
        self._call = call
        self._generations = generations
        self._make_parser = make_parser
        self._num_characters = num_characters
        kind = "chat.completion.chunk" if call.options.is_stream else "chat.completion"
        served_name = record.context.served_name
        model = served_name if call.model in (None, "tgi") else call.model
        self._head = AnswerHead(record.context, kind, "chatcmpl", model)

    def _choice(self, index: int, generation: Generation) -> _Choice:
        return _Choice(index, self._call, generation, self._make_parser(), self._record.context.tokenizer)

    async def whole(self) -> web.StreamResponse:
        """The answer as one object."""
        best = best_runs(await read_runs(self._generations))[: self._call.options.num_answers]
        num_entries = sum(len(run.outputs) for run in best) * (1 + (self._call.options.top_n_tokens or 0))
        content = await render(lambda: self._whole_body(best), num_entries if self._call.has_logprobs else 0)
        self._record.succeed()
        headers = timing_headers(self._generations, self._record.context.compute_type, self._num_characters)
        return rendered_response(content, headers)

    def _whole_body(self, best: Sequence[Run]) -> dict[str, Any]:
        choices = [self._choice(index, run.generation).whole(run.outputs) for index, run in enumerate(best)]
        return self._head.body(choices, usage(self._generations))

    async def stream(self) -> web.StreamResponse:
        """The answer as a chunk for each token; with a parser, for each part that tokens make known."""
        return await stream_until_done(self._record, self._num_characters, self._send_all)

    async def _send_all(self, events: EventStream) -> None:
        await together([self._send_chunks(index, events) for index in range(len(self._generations))])
        self._record.succeed()
        if self._call.includes_usage:
            await events.send(event(self._head.body([], usage(self._generations))))

    async def _send_chunks(self, index: int, events: EventStream) -> None:
        generation = self._generations[index]
        choice = self._choice(index, generation)
        plain: TextEvent | None = None  # of a chunk that is not the first

        def token_events(outputs: list[TokenOutput]) -> bytes:
            nonlocal plain
            is_end = generation.stream.finish_reason is not None
            if choice.is_plain and choice.is_begun and not is_end:
                if plain is None:
                    plain = TextEvent(lambda text: self._head.body([choice.chunk(_content_body(text), None)], None))
                return plain.render_all(outputs)
            return b"".join(event(self._head.body([chunk], None)) for chunk in choice.chunks(outputs, is_end))

        await events.send_all(generation, token_events)


def _content_body(text: str) -> dict[str, Any]:
    # TGI's Python client cannot do without the last key.
    return {"content": text, "tool_calls": None}


def _delta_body(delta: Delta) -> dict[str, Any]:
    match delta:
        case Content(text):
            return _content_body(text)
        case Reasoning(text):
            return {"reasoning_content": text}
        case CallStart(index, call_id, name):
            return _call_body(index, call_id, name, "")
        case CallArguments(index, text):
            # Clients join the ids and names of all chunks.
            return _call_body(index, "", None, text)


def _call_body(index: int, call_id: str, name: str | None, arguments: str) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    call = {"index": index, "id": call_id, "type": "function", "function": function}
    return {"tool_calls": [call]}
