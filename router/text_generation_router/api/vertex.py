"""POST /vertex: Vertex AI's route, several prompts or conversations at once, each answered by a plain text."""

from dataclasses import dataclass
from typing import Any

from aiohttp import web

from text_generation_router.api.body import read_body
from text_generation_router.api.chat_request import answer_options, render_prompt
from text_generation_router.api.chat_request import read_call as read_chat_call
from text_generation_router.api.chat_schema import CHAT_BODY
from text_generation_router.api.fields import Fields
from text_generation_router.api.generate import read_call
from text_generation_router.api.generate_schema import GENERATE_BODY
from text_generation_router.api.generation import GenerationRequest, timing_headers
from text_generation_router.api.responses import json_response
from text_generation_router.api.runs import read_runs
from text_generation_router.api.schema import Kind, ObjectSchema, Parameter
from text_generation_router.errors import BatchSizeExceeded
from text_generation_router.generation_options import GenerationOptions

# Fields that a plain text has no use for.
_LEFT_OUT = ("stream", "stream_options", "logprobs", "top_logprobs", "n")
CHAT_INSTANCE = CHAT_BODY.without("VertexChatInstance", *_LEFT_OUT)
VERTEX_BODY = ObjectSchema(
    "VertexRequest",
    "Prompts and conversations to continue.",
    (
        Parameter(
            "instances",
            Kind.LIST,
            "At most `--max-client-batch-size` (4) prompts with `parameters`, which sample by default, or "
            "conversations with the parameters of a chat.",
            is_required=True,
            json={"items": {"anyOf": [GENERATE_BODY.reference, CHAT_INSTANCE.reference]}, "minItems": 1},
        ),
    ),
)


@dataclass(frozen=True)
class _Prompt:
    """One instance, ready to be encoded."""

    text: str
    options: GenerationOptions
    adds_special_tokens: bool


async def vertex(request: web.Request) -> web.StreamResponse:
    """Answer every instance by its generated text, as the model wrote it."""
    async with GenerationRequest(request) as record:
        body = Fields(await read_body(request), VERTEX_BODY)
        instances = body.items("instances")
        if not instances:
            raise body.error("instances", "must hold at least one instance")
        most = record.context.config.max_client_batch_size
        if len(instances) > most:
            raise BatchSizeExceeded(
                f"`instances` may hold at most {most} instances. Given: {len(instances)}", "instances"
            )
        record.admit(len(instances))
        prompts = [await _read_instance(record, body, instance) for instance in instances]
        for name in ("n", "best_of"):
            if any((getattr(one.options, name) or 1) > 1 for one in prompts):
                raise body.error("instances", f"are answered once each: `{name}` above 1 is not supported here")
        left_out = [f"instances.{name}" for name in _LEFT_OUT if any(name in instance for instance in instances)]
        record.note_ignored(body, *left_out)
        valid = [await record.validate(one.text, one.options, one.adds_special_tokens) for one in prompts]
        generations = [record.submit(one, prompt.options) for one, prompt in zip(valid, prompts, strict=True)]
        texts = [run.text for run in await read_runs(generations)]
        record.succeed()
        headers = timing_headers(generations, record.context.compute_type, sum(len(one.text) for one in prompts))
        return json_response({"predictions": texts}, headers)


async def _read_instance(record: GenerationRequest, body: Fields, instance: Any) -> _Prompt:
    if not isinstance(instance, dict) or instance.get("messages") is None:
        call = read_call(body.child("instances", instance, GENERATE_BODY), samples_by_default=True)
        return _Prompt(call.inputs, call.options, adds_special_tokens=True)
    context = record.context
    kept = {name: value for name, value in instance.items() if name not in _LEFT_OUT}
    chat = read_chat_call(body.child("instances", kept, CHAT_BODY), context.chat_template.family)
    prompt = await record.in_time(render_prompt(context, chat.conversation))
    return _Prompt(prompt, answer_options(context, chat, prompt), adds_special_tokens=False)
