"""POST /tokenize and /chat_tokenize: the tokens that a prompt or a conversation becomes."""

from typing import Any

from aiohttp import web

from text_generation_router.api.body import read_body
from text_generation_router.api.chat_request import read_call as read_chat_call
from text_generation_router.api.chat_request import render_prompt
from text_generation_router.api.chat_schema import CHAT_BODY
from text_generation_router.api.context import CONTEXT_KEY
from text_generation_router.api.fields import Fields
from text_generation_router.api.generate import read_call
from text_generation_router.api.generate_schema import GENERATE_BODY
from text_generation_router.api.generation import GenerationRequest
from text_generation_router.api.responses import json_response
from text_generation_router.generation_options import GenerationOptions
from text_generation_router.tokenizer import TokenSpan


async def tokenize(request: web.Request) -> web.Response:
    """POST /tokenize: the very ids that /generate computes, a truncated prompt's last ones."""
    context = request.app[CONTEXT_KEY]
    call = read_call(Fields(await read_body(request), GENERATE_BODY))
    truncate = call.options.truncate
    context.validator.check_options(GenerationOptions(truncate=truncate))
    spans = await context.tokenizer.spans(call.inputs)
    return json_response(_token_bodies(spans if truncate is None else spans[-truncate:]))


async def chat_tokenize(request: web.Request) -> web.Response:
    """POST /chat_tokenize: the rendered prompt of a conversation and its tokens."""
    async with GenerationRequest(request, takes_permit=False) as record:  # as TGI counts it: among the requests
        context = record.context
        call = read_chat_call(Fields(await read_body(request), CHAT_BODY), context.chat_template.family)
        prompt = await render_prompt(context, call.conversation)
        spans = await context.tokenizer.spans(prompt, add_special_tokens=False)
        record.succeed()
    return json_response(
        {"tokenize_response": _token_bodies(spans), "templated_text": context.tokenizer.visible_text(prompt)}
    )


def _token_bodies(spans: list[TokenSpan]) -> list[dict[str, Any]]:
    return [{"id": span.token_id, "text": span.text, "start": span.start, "stop": span.stop} for span in spans]
