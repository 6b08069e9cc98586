"""POST /tokenize and /chat_tokenize: the tokens that a prompt or a conversation becomes.

They have as many permits as generation, but take none of it, and one thread for all their work, whose turns are theirs.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial

import orjson
from aiohttp import web

from text_generation_router.api.body import read_body
from text_generation_router.api.chat_request import plain_conversation
from text_generation_router.api.chat_request import read_call as read_chat_call
from text_generation_router.api.chat_schema import CHAT_BODY
from text_generation_router.api.context import CONTEXT_KEY, TENANT_KEY, Context
from text_generation_router.api.fields import Fields
from text_generation_router.api.generate import read_call
from text_generation_router.api.generate_schema import GENERATE_BODY
from text_generation_router.api.generation import GenerationRequest
from text_generation_router.api.responses import json_list, rendered_response
from text_generation_router.conversation import Conversation
from text_generation_router.generation_options import GenerationOptions
from text_generation_router.tokenizer import TokenSpan

TOKENIZE_PATHS = frozenset(("/tokenize", "/chat_tokenize"))


async def tokenize(request: web.Request) -> web.Response:
    """POST /tokenize: the very ids that /generate computes, a truncated prompt's last ones."""
    _check_permit(request)
    context = request.app[CONTEXT_KEY]
    call = read_call(Fields(await read_body(request), GENERATE_BODY))
    context.validator.check_options(GenerationOptions(truncate=call.options.truncate))
    return rendered_response(await _run(request, partial(_tokens, context, call.inputs, call.options.truncate)))


async def chat_tokenize(request: web.Request) -> web.Response:
    """POST /chat_tokenize: the rendered prompt of a conversation and its tokens."""
    async with GenerationRequest(request, takes_permit=False) as record:  # as TGI counts it: among the requests
        _check_permit(request)
        context = record.context
        call = read_chat_call(Fields(await read_body(request), CHAT_BODY), context.chat_template.family)
        answer = await _run(request, partial(_chat_tokens, context, call.conversation))
        record.succeed()
    return rendered_response(answer)


def _check_permit(request: web.Request) -> None:
    """Raise Overloaded before the body is read, if no permit is left."""
    request.app[CONTEXT_KEY].tokenize_permits.check(tenant=request.get(TENANT_KEY, ""))


async def _run(request: web.Request, work: Callable[[], bytes]) -> bytes:
    """What `work` returns, done with a permit; raises Overloaded."""
    context, tenant = request.app[CONTEXT_KEY], request.get(TENANT_KEY, "")
    context.tokenize_permits.take(1, tenant)
    waiting = [work]  # the thread's queue keeps what it was given, also for a client that has left: not the text
    try:
        return await asyncio.get_running_loop().run_in_executor(context.tokenize_thread, lambda: waiting.pop()())
    finally:
        waiting.clear()
        context.tokenize_permits.give_back(1, tenant)


def _tokens(context: Context, text: str, truncate: int | None) -> bytes:
    spans = context.tokenizer.spans_now(text)
    return orjson.dumps(_token_list(spans if truncate is None else deque(spans, truncate)))


def _chat_tokens(context: Context, conversation: Conversation) -> bytes:
    tokenizer = context.tokenizer
    prompt = context.chat_template.render_now(plain_conversation(tokenizer, conversation))
    tokens = _token_list(tokenizer.spans_now(prompt, add_special_tokens=False))
    return orjson.dumps({"tokenize_response": tokens, "templated_text": tokenizer.visible_text(prompt)})


def _token_list(spans: Iterable[TokenSpan]) -> orjson.Fragment:
    return json_list({"id": span.token_id, "text": span.text, "start": span.start, "stop": span.stop} for span in spans)
