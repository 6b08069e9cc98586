"""Routes about the server itself: health, what it serves, metrics."""

from aiohttp import web

from text_generation_router.api.context import CONTEXT_KEY, DOCUMENT_KEY
from text_generation_router.api.docs_page import CONTENT_SECURITY_POLICY, html_page
from text_generation_router.api.responses import json_response
from text_generation_router.errors import NotOffered, Unhealthy
from text_generation_router.exposition import CONTENT_TYPE


async def health(request: web.Request) -> web.Response:
    """GET /health, /health/ready, /ping and /: whether requests can be served now. It never waits for work."""
    if not request.app[CONTEXT_KEY].engine.is_healthy():
        raise Unhealthy
    return web.Response()


async def live(request: web.Request) -> web.Response:
    """GET /health/live: whether it makes sense to let the server go on; also while shards restart or it drains."""
    if not request.app[CONTEXT_KEY].engine.is_alive():
        raise Unhealthy
    return web.Response()


async def info(request: web.Request) -> web.Response:
    """GET /info: the model and the limits."""
    context = request.app[CONTEXT_KEY]
    config, limits = context.config, context.engine.limits
    return json_response(
        {
            "model_id": context.served_name,
            "model_sha": config.model_sha,
            "model_pipeline_tag": config.model_pipeline_tag,
            "max_concurrent_requests": config.max_concurrent_requests,
            "max_best_of": config.max_best_of,
            "max_stop_sequences": config.max_stop_sequences,
            "max_input_tokens": limits.max_input_tokens,
            "max_total_tokens": limits.max_total_tokens,
            "validation_workers": config.validation_workers,
            "max_client_batch_size": config.max_client_batch_size,
            "router": "text-generation-router",
            "version": context.version,
            "sha": config.build_sha,
            "docker_label": config.docker_label,
        }
    )


async def models(request: web.Request) -> web.Response:
    """GET /v1/models: the one model."""
    name = request.app[CONTEXT_KEY].served_name
    model = {"id": name, "object": "model", "created": 0, "owned_by": name}
    return json_response({"object": "list", "data": [model]})


async def metrics(request: web.Request) -> web.Response:
    """GET /metrics: Prometheus text 0.0.4, whatever format is asked for."""
    text = request.app[CONTEXT_KEY].metrics.text()
    return web.Response(body=text.encode(), headers={"Content-Type": CONTENT_TYPE})


async def not_offered(request: web.Request) -> web.Response:
    """POST /v1/responses and /v1/embeddings: refused by name, so that nobody looks for a mistyped path."""
    raise NotOffered(f"{request.path} is not offered by this server; it has /v1/chat/completions and /v1/completions")


async def openapi(request: web.Request) -> web.Response:
    """GET /api-doc/openapi.json: the document of these routes."""
    return json_response(request.app[DOCUMENT_KEY])


async def docs(request: web.Request) -> web.Response:
    """GET /docs: the same as a page."""
    headers = {"Content-Security-Policy": CONTENT_SECURITY_POLICY}
    return web.Response(text=html_page(request.app[DOCUMENT_KEY]), content_type="text/html", headers=headers)
