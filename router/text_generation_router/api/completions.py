"""POST /v1/completions: one prompt or several, as text or token ids."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from aiohttp import web

from text_generation_router.api.body import read_body
from text_generation_router.api.completion_text import CompletionText, Piece, joined
from text_generation_router.api.event_stream import EventStream
from text_generation_router.api.fields import Fields
from text_generation_router.api.generation import Generation, GenerationRequest, timing_headers, together
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
from text_generation_router.api.responses import TextEvent, event, render, rendered_response
from text_generation_router.api.runs import Run, best_runs, read_runs, submit_runs
from text_generation_router.config import RouterConfig
from text_generation_router.errors import BatchSizeExceeded
from text_generation_router.generation_options import GenerationOptions
from text_generation_router.token_stream import TokenOutput


@dataclass(frozen=True)
class CompletionsCall:
    """One request of this route."""

    prompts: list[str | list[int]]
    options: GenerationOptions
    echo: bool
    num_top_logprobs: int | None  # None: no log-probabilities
    is_prompt_only: bool  # one token is generated all the same, and not shown
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
    record.context.validator.check_options(call.options)
    _check_num_runs(call, record.context.config)
    record.admit(len(call.prompts) * call.options.num_runs)
    requests = [await record.validate(prompt, call.options) for prompt in call.prompts]
    answer = _Answer(record, call, [run for valid in requests for run in submit_runs(record, valid, call.options)])
    return await (answer.stream() if call.options.is_stream else answer.whole())


def read_call(body: Fields, config: RouterConfig) -> CompletionsCall:
    """Read the types of a body; ranges are the validator's."""
    prompts = _read_prompts(body)
    _check_num_prompts(len(prompts), config)
    read_model_name(body)
    echo, num_top_logprobs = body.boolean("echo"), body.integer("logprobs")
    names = {"inputs": "prompt", "top_n_tokens": "logprobs"}
    options = read_options(body, body.boolean("stream"), names, top_n_tokens=num_top_logprobs)
    is_prompt_only = echo and options.max_new_tokens == 0
    return CompletionsCall(
        prompts=prompts,
        options=replace(
            options,
            scores_prompt=echo and num_top_logprobs is not None,
            max_new_tokens=1 if is_prompt_only else options.max_new_tokens,
        ),
        echo=echo,
        num_top_logprobs=num_top_logprobs,
        is_prompt_only=is_prompt_only,
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


def _check_num_runs(call: CompletionsCall, config: RouterConfig) -> None:
    num_runs, most = len(call.prompts) * call.options.num_runs, config.max_concurrent_requests
    if num_runs > most:
        raise BatchSizeExceeded(
            f"`prompt` may have at most {most} answers, `n` and `best_of` counted. Given: {num_runs}. "
            "Send fewer prompts in one request, or raise --max-concurrent-requests of the server",
            "prompt",
        )


def _are_token_ids(values: list[Any]) -> bool:
    return all(type(value) is int for value in values)


class _Answer:
    """Renders the runs of one request's prompts in this route's shape."""

    def __init__(self, record: GenerationRequest, call: CompletionsCall, generations: list[Generation]) -> None:
        self._record = record
        self._call = call
        self._generations = generations
        self._head = AnswerHead(record.context, "text_completion", "cmpl", record.context.served_name)

    async def whole(self) -> web.StreamResponse:
        """The answer as one object, choices in the order of the prompts."""
        runs = await read_runs(self._generations)
        content = await render(lambda: self._whole_body(runs), self._num_entries(runs))
        self._record.succeed()
        headers = timing_headers(self._generations, self._record.context.compute_type, self._call.num_characters)
        return rendered_response(content, headers)

    def _num_entries(self, runs: list[Run]) -> int:
        """Log-probabilities in the answer."""
        call = self._call
        if call.num_top_logprobs is None:
            return 0
        num_prompt_tokens = sum(one.stream.num_prompt_tokens for one in self._generations) if call.echo else 0
        return (num_prompt_tokens + sum(len(run.outputs) for run in runs)) * (1 + call.num_top_logprobs)

    def _whole_body(self, runs: list[Run]) -> dict[str, Any]:
        options, choices = self._call.options, list[dict[str, Any]]()
        for start in range(0, len(runs), options.num_runs):
            for run in best_runs(runs[start : start + options.num_runs])[: options.num_answers]:
                choices.append(self._whole_choice(len(choices), run))
        return self._head.body(choices, self._usage(self._generations))

    def _whole_choice(self, index: int, run: Run) -> dict[str, Any]:
        text = CompletionText(self._record.context.tokenizer, self._call.num_top_logprobs)
        pieces = [*self._prompt(index, text, run.generation)] if self._call.echo else []
        if not self._call.is_prompt_only:
            pieces.append(text.generated(run.outputs))
        return self._choice(index, joined(pieces), self._finish_reason(run.generation))

    def _finish_reason(self, generation: Generation) -> str:
        """Of a prompt that is only told, the token that nobody sees ends nothing."""
        return "length" if self._call.is_prompt_only else finish_reason(generation)

    def _prompt(self, index: int, text: CompletionText, generation: Generation) -> Iterator[Piece]:
        prompt = self._call.prompts[index // self._call.options.num_answers]
        return text.prompt(prompt, generation.request.token_ids, generation.first.stream.prompt_scores)

    async def stream(self) -> web.StreamResponse:
        """The answer as a chunk for each token, those of several choices as they come."""
        return await stream_until_done(self._record, self._call.num_characters, self._send_all)

    async def _send_all(self, events: EventStream) -> None:
        await together([self._send_chunks(index, events) for index in range(len(self._generations))])
        self._record.succeed()
        if self._call.includes_usage:
            await events.send(event(self._head.body([], self._usage(self._generations))))

    async def _send_chunks(self, index: int, events: EventStream) -> None:
        generation, call = self._generations[index], self._call
        text = CompletionText(self._record.context.tokenizer, call.num_top_logprobs)
        plain = TextEvent(lambda text: self._head.body([self._choice(index, Piece(text, None), None)], None))
        waiting: list[Piece] = []  # the prompt's last piece: it may also be the last of all

        def prompt_events() -> Iterator[bytes]:
            for piece in self._prompt(index, text, generation):
                if waiting:
                    yield event(self._head.body([self._choice(index, waiting.pop(), None)], None))
                waiting.append(piece)

        def token_events(outputs: list[TokenOutput]) -> bytes:
            is_end = generation.stream.finish_reason is not None
            if not waiting and not is_end and call.num_top_logprobs is None:
                return plain.render_all(outputs)
            pieces = [*waiting]
            waiting.clear()
            if not call.is_prompt_only:
                pieces += [text.generated([output]) for output in outputs]
            bodies = [self._head.body([self._choice(index, piece, None)], None) for piece in pieces]
            if is_end:
                bodies[-1]["choices"][0]["finish_reason"] = self._finish_reason(generation)
                bodies[-1]["usage"] = self._usage([generation])
            return b"".join(map(event, bodies))

        await events.send_all(generation, token_events, prompt_events() if call.echo else ())

    def _usage(self, generations: Sequence[Generation]) -> dict[str, Any]:
        return usage(generations, self._call.is_prompt_only)

    @staticmethod
    def _choice(index: int, piece: Piece, reason: str | None) -> dict[str, Any]:
        return {"index": index, "text": piece.text, "logprobs": piece.logprobs, "finish_reason": reason}
