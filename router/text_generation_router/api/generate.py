"""TGI's own dialect: POST /generate, /generate_stream and /."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import orjson
from aiohttp import web

from text_generation_router.api.body import read_body
from text_generation_router.api.context import Tokenizer
from text_generation_router.api.event_stream import EventStream, stream_answer
from text_generation_router.api.fields import Fields
from text_generation_router.api.generate_schema import COMPATIBLE_BODY, GENERATE_BODY, GENERATE_PARAMETERS
from text_generation_router.api.generation import Generation, GenerationRequest, timing_headers
from text_generation_router.api.grammars import read_grammar
from text_generation_router.api.options import read_shared_options
from text_generation_router.api.responses import event, json_list, render, rendered_response
from text_generation_router.api.runs import Run, best_runs, read_runs, submit_runs
from text_generation_router.errors import Overloaded, ShuttingDown
from text_generation_router.generation_options import GenerationOptions
from text_generation_router.token_stream import TokenOutput


@dataclass(frozen=True)
class GenerateCall:
    """One request of this dialect."""

    inputs: str
    options: GenerationOptions
    return_full_text: bool
    has_details: bool

    @property
    def text_before(self) -> str:
        """What precedes the generated text in the answer."""
        return self.inputs if self.return_full_text else ""


async def generate(request: web.Request) -> web.StreamResponse:
    """POST /generate: the whole answer as one object."""
    async with GenerationRequest(request) as record:
        body = Fields(await read_body(request), GENERATE_BODY)
        call = read_call(body)
        record.note_ignored(body)
        return await _answer(record, call, as_list=False)


async def generate_stream(request: web.Request) -> web.StreamResponse:
    """POST /generate_stream: an event for each token."""
    async with GenerationRequest(request) as record:
        body = Fields(await read_body(request), GENERATE_BODY)
        call = read_call(body, is_stream=True)
        record.note_ignored(body)
        return await _stream(record, call)


async def compatible_generate(request: web.Request) -> web.StreamResponse:
    """POST /: the old inference API, streamed or not as the body says."""
    async with GenerationRequest(request) as record:
        return await answer_compatible(record, await read_body(request))


async def answer_compatible(record: GenerationRequest, values: dict[str, Any]) -> web.StreamResponse:
    """Answer a body of the old inference API; the whole answer is a list of one."""
    body = Fields(values, COMPATIBLE_BODY)
    is_stream = body.boolean("stream")
    full_text = record.context.config.model_pipeline_tag in (None, "text-generation")
    call = read_call(body, is_stream=is_stream, full_text_default=full_text)
    record.note_ignored(body)
    return await _stream(record, call) if is_stream else await _answer(record, call, as_list=True)


def read_call(
    body: Fields, is_stream: bool = False, full_text_default: bool = False, samples_by_default: bool = False
) -> GenerateCall:
    """Read the types of a body; ranges are the validator's. Without any parameters TGI samples."""
    inputs = body.required_string("inputs")
    given = body.object("parameters")
    parameters = given or Fields({}, GENERATE_PARAMETERS)
    options = replace(
        read_shared_options(parameters, is_stream),
        max_new_tokens=parameters.integer("max_new_tokens"),
        do_sample=parameters.boolean("do_sample", default=samples_by_default or given is None),
        keep_stop_string=True,
        # TGI's meaning on these routes; OpenAI's, on theirs, is another.
        share_penalty=parameters.number("frequency_penalty"),
        truncate=parameters.integer("truncate"),
        top_n_tokens=parameters.integer("top_n_tokens"),
        watermark=parameters.boolean("watermark"),
        prefill_details=parameters.boolean("decoder_input_details"),
        grammar=read_grammar(parameters.object("grammar")),
        unsupported=tuple(parameters.refused()),
        may_seed_runs=False,
        names={"share_penalty": "frequency_penalty"},
    )
    return GenerateCall(
        inputs=inputs,
        options=options,
        return_full_text=parameters.boolean("return_full_text", default=full_text_default),
        has_details=parameters.boolean("details") or options.prefill_details,
    )


async def _answer(record: GenerationRequest, call: GenerateCall, as_list: bool) -> web.Response:
    record.context.validator.check_options(call.options)
    record.admit(call.options.num_runs)
    generations = submit_runs(record, await record.validate(call.inputs, call.options), call.options)
    runs = best_runs(await read_runs(generations))

    def body() -> Any:
        whole = _whole_body(call, runs, record.context.tokenizer)
        return [whole] if as_list else whole

    content = await render(body, sum(map(_num_entries, runs)) if call.has_details else 0)
    record.succeed()
    return rendered_response(content, timing_headers(generations, record.context.compute_type, len(call.inputs)))


def _num_entries(run: Run) -> int:
    """Log-probabilities in the details of a run."""
    stream, options = run.generation.first.stream, run.generation.options
    return len(stream.prompt_scores or ()) + len(run.outputs) * (1 + (options.top_n_tokens or 0))


def _whole_body(call: GenerateCall, runs: Sequence[Run], tokenizer: Tokenizer) -> dict[str, Any]:
    best, *others = runs
    body: dict[str, Any] = {"generated_text": call.text_before + best.text}
    if call.has_details:
        body["details"] = _details(best, tokenizer)
        if others:
            body["details"]["best_of_sequences"] = [
                {"generated_text": call.text_before + run.text, **_details(run, tokenizer)} for run in others
            ]
    return body


def _details(run: Run, tokenizer: Tokenizer) -> dict[str, Any]:
    generation, outputs = run.generation, run.outputs
    details: dict[str, Any] = {
        "finish_reason": generation.finish_reason,
        "generated_tokens": generation.stream.num_generated_tokens,
        "seed": generation.seed,
        "prefill": _prefill_bodies(generation, tokenizer),
        "tokens": json_list(token_body(output, tokenizer) for output in outputs),
    }
    if generation.options.top_n_tokens:
        details["top_tokens"] = json_list(top_bodies(output, tokenizer) for output in outputs)
    return details


def _prefill_bodies(generation: Generation, tokenizer: Tokenizer) -> orjson.Fragment:
    """The prompt's tokens, if they were asked for and are offered; the first has no log-probability."""
    scores = generation.first.stream.prompt_scores or []
    return json_list(
        {"id": token_id, "text": tokenizer.token_text(token_id), "logprob": None if score is None else score.logprob}
        for token_id, score in zip(generation.request.token_ids, scores, strict=False)
    )


async def _stream(record: GenerationRequest, call: GenerateCall) -> web.StreamResponse:
    record.admit()
    # The status of this route is 200 whatever the validation says; errors are events.
    return await stream_answer(
        record, len(call.inputs), partial(_send_tokens, record, call), keeps_status=(Overloaded, ShuttingDown)
    )


async def _send_tokens(record: GenerationRequest, call: GenerateCall, events: EventStream) -> None:
    generation = record.submit(await record.validate(call.inputs, call.options), call.options)
    pieces: list[str] = []

    def token_events(outputs: list[TokenOutput]) -> bytes:
        has_top = bool(call.options.top_n_tokens)
        bodies = stream_bodies(outputs, len(pieces) + 1, record.context.tokenizer, has_top)
        pieces.extend(output.text for output in outputs)
        if generation.stream.finish_reason is not None:
            bodies[-1]["generated_text"] = call.text_before + "".join(pieces)
            bodies[-1]["details"] = _stream_details(generation) if call.has_details else None
        return b"".join(map(event, bodies))

    await events.send_all(generation, token_events)
    record.succeed()


def _stream_details(generation: Generation) -> dict[str, Any]:
    return {
        "finish_reason": generation.finish_reason,
        "generated_tokens": generation.stream.num_generated_tokens,
        "seed": generation.seed,
        "input_length": generation.stream.num_prompt_tokens,
    }


def stream_bodies(
    outputs: Sequence[TokenOutput], first_index: int, tokenizer: Tokenizer, has_top_tokens: bool = False
) -> list[dict[str, Any]]:
    """The events of some tokens, counted from `first_index`."""
    bodies: list[dict[str, Any]] = [
        {"index": index, "token": token_body(output, tokenizer), "generated_text": None, "details": None}
        for index, output in enumerate(outputs, first_index)
    ]
    if has_top_tokens:
        for body, output in zip(bodies, outputs, strict=True):
            body["top_tokens"] = top_bodies(output, tokenizer)
    return bodies


def top_bodies(output: TokenOutput, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """The most likely tokens at the place of a token, by their own texts."""
    return [
        {
            "id": token_id,
            "text": tokenizer.token_text(token_id),
            "logprob": logprob,
            "special": tokenizer.is_special(token_id),
        }
        for token_id, logprob in output.top_tokens
    ]


def token_body(output: TokenOutput, tokenizer: Tokenizer) -> dict[str, Any]:
    """A token as this dialect shows it; a special token shows its own text."""
    text = output.text + tokenizer.token_text(output.token_id) if output.is_special else output.text
    return {"id": output.token_id, "text": text, "logprob": output.logprob, "special": output.is_special}
