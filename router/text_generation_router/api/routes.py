"""Every route, declared once: who handles it, who may call it, what goes in and comes out."""

from dataclasses import dataclass
from typing import Any

from aiohttp.typedefs import Handler

from text_generation_router.api import examples, live_page, service
from text_generation_router.api.answer_schemas import reference
from text_generation_router.api.chat import chat_completions
from text_generation_router.api.chat_schema import CHAT_BODY
from text_generation_router.api.completions import completions
from text_generation_router.api.generate import compatible_generate, generate, generate_stream
from text_generation_router.api.generate_schema import COMPATIBLE_BODY, GENERATE_BODY
from text_generation_router.api.openai_schema import COMPLETIONS_BODY
from text_generation_router.api.sagemaker import invocations
from text_generation_router.api.schema import ObjectSchema
from text_generation_router.api.tokenize import chat_tokenize, tokenize
from text_generation_router.api.vertex import CHAT_INSTANCE, VERTEX_BODY, vertex

JSON, EVENTS, TEXT, HTML = "application/json", "text/event-stream", "text/plain", "text/html"


@dataclass(frozen=True)
class Route:
    """One path and verb."""

    method: str
    path: str
    handler: Handler
    summary: str
    # What a 200 holds, by media type; {}: an empty body.
    answers: dict[str, dict[str, Any]]
    # Bodies that it takes, the first one shown; (): it takes none.
    bodies: tuple[ObjectSchema, ...] = ()
    # Objects beside those that are part of `bodies`.
    other_objects: tuple[ObjectSchema, ...] = ()
    is_open: bool = False  # without a key
    is_generating: bool = True  # whether it may be overloaded or fail in a step
    # Bodies, from examples.py.
    examples: tuple[dict[str, Any], ...] = ()
    is_offered: bool = True
    is_live_page: bool = False  # missing with --disable-ui


def _events(*schemas: dict[str, Any], is_done_last: bool) -> dict[str, Any]:
    """What each event of a stream is: `data` with one of these as JSON, or [DONE]."""
    content = {"contentMediaType": "application/json", "contentSchema": {"anyOf": list(schemas)}}
    data = {"anyOf": [{"const": "[DONE]"}, content]} if is_done_last else content
    return {"type": "object", "properties": {"data": {"type": "string", **data}}, "required": ["data"]}


def _openai(name: str, chunk_name: str) -> dict[str, dict[str, Any]]:
    return {
        JSON: reference(name),
        EVENTS: _events(reference(chunk_name), reference("OpenAIError"), is_done_last=True),
    }


_TOKEN_EVENTS = _events(reference("StreamResponse"), reference("Error"), is_done_last=False)


def _open(path: str, handler: Handler, summary: str, answers: dict[str, dict[str, Any]]) -> Route:
    return Route("GET", path, handler, summary, answers, is_open=True, is_generating=False)


ROUTES: tuple[Route, ...] = (
    Route(
        "POST",
        "/generate",
        generate,
        "Continue a prompt; the whole answer at once.",
        {JSON: reference("GenerateResponse")},
        (GENERATE_BODY,),
        examples=examples.GENERATE_EXAMPLES,
    ),
    Route(
        "POST",
        "/generate_stream",
        generate_stream,
        "Continue a prompt; an event for each token. Errors are events too, behind a status of 200.",
        {EVENTS: _TOKEN_EVENTS},
        (GENERATE_BODY,),
        examples=(examples.GENERATE,),
    ),
    Route(
        "POST",
        "/",
        compatible_generate,
        "The older form of both: streamed if the body says so, else a list with one answer.",
        {
            JSON: {"type": "array", "items": reference("GenerateResponse"), "minItems": 1, "maxItems": 1},
            EVENTS: _TOKEN_EVENTS,
        },
        (COMPATIBLE_BODY,),
        examples=(examples.GENERATE, {**examples.GENERATE, "stream": True}),
    ),
    Route(
        "POST",
        "/v1/chat/completions",
        chat_completions,
        "Answer a conversation, in OpenAI's dialect. A stream ends with `data: [DONE]`.",
        _openai("ChatCompletion", "ChatCompletionChunk"),
        (CHAT_BODY,),
        examples=examples.CHAT_EXAMPLES,
    ),
    Route(
        "POST",
        "/v1/completions",
        completions,
        "Continue prompts, in OpenAI's dialect. A stream ends with `data: [DONE]`.",
        _openai("Completion", "Completion"),
        (COMPLETIONS_BODY,),
        examples=examples.COMPLETION_EXAMPLES,
    ),
    Route(
        "POST",
        "/tokenize",
        tokenize,
        "The tokens of a prompt, as /generate has them; `start` and `stop` count bytes of UTF-8.",
        {JSON: reference("TokenizeResponse")},
        (GENERATE_BODY,),
        is_generating=False,
        examples=(examples.TOKENIZE,),
    ),
    Route(
        "POST",
        "/chat_tokenize",
        chat_tokenize,
        "The prompt that the model's template makes of a conversation, and its tokens.",
        {JSON: reference("ChatTokenizeResponse")},
        (CHAT_BODY,),
        is_open=True,
        is_generating=False,
        examples=(examples.CHAT_TOKENIZE,),
    ),
    Route(
        "POST",
        "/invocations",
        invocations,
        "Amazon SageMaker's route: a body of `/`, of a chat (with `messages`) or of a completion (with `prompt`), "
        "answered as there; errors have the shape of `/`.",
        {
            JSON: {
                "anyOf": [
                    {"type": "array", "items": reference("GenerateResponse")},
                    reference("ChatCompletion"),
                    reference("Completion"),
                ]
            },
            EVENTS: _events(
                *map(reference, ("StreamResponse", "ChatCompletionChunk", "Completion", "Error")), is_done_last=True
            ),
        },
        (COMPATIBLE_BODY, CHAT_BODY, COMPLETIONS_BODY),
        examples=(examples.GENERATE, examples.CHAT, examples.COMPLETION),
    ),
    Route(
        "POST",
        "/vertex",
        vertex,
        "Google Vertex AI's route: several prompts or conversations, each answered by its text.",
        {JSON: reference("VertexResponse")},
        (VERTEX_BODY,),
        other_objects=(GENERATE_BODY, CHAT_INSTANCE),
        examples=(examples.VERTEX,),
    ),
    _open("/", service.health, "Whether requests can be served: an empty 200, else 503.", {}),
    _open("/health", service.health, "The same.", {}),
    _open("/ping", service.health, "The same.", {}),
    _open("/health/ready", service.health, "The same, for Kubernetes' readiness probe.", {}),
    _open(
        "/health/live",
        service.live,
        "Whether the server should go on, for Kubernetes' liveness probe: 200 also while shards restart and while it "
        "drains.",
        {},
    ),
    _open("/info", service.info, "The model and the limits.", {JSON: reference("Info")}),
    _open("/v1/models", service.models, "The one model.", {JSON: reference("ModelList")}),
    _open("/metrics", service.metrics, "Metrics for Prometheus.", {TEXT: {"type": "string"}}),
    _open("/docs", service.docs, "This reference as a page.", {HTML: {"type": "string"}}),
    _open(
        "/api-doc/openapi.json", service.openapi, "This reference as an OpenAPI document.", {JSON: {"type": "object"}}
    ),
    Route(
        "GET",
        "/ui",
        live_page.page,
        "The live page: how the server stands, its last steps, and a chat. Without data, which is at /ui/state.",
        {HTML: {"type": "string"}},
        is_open=True,
        is_generating=False,
        is_live_page=True,
    ),
    Route(
        "GET",
        "/ui/state",
        live_page.state,
        "The live page's data: a sample a second of the last five minutes, and the last steps. May change at any time.",
        {JSON: {"type": "object"}},
        is_generating=False,
        is_live_page=True,
    ),
    Route("POST", "/v1/responses", service.not_offered, "Not offered: 501.", {}, is_offered=False),
    Route("POST", "/v1/embeddings", service.not_offered, "Not offered: 501.", {}, is_offered=False),
)
