"""GET /ui, the live page, and /ui/state, its data."""

from aiohttp import web

from text_generation_router.api.context import CONTEXT_KEY
from text_generation_router.api.responses import json_response
from text_generation_router.ui import CONTENT_SECURITY_POLICY, PAGE


async def page(request: web.Request) -> web.Response:
    """The page without any data, so that it can ask for the key that the data needs."""
    headers = {
        "Content-Security-Policy": CONTENT_SECURITY_POLICY,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }
    return web.Response(text=PAGE, content_type="text/html", headers=headers)


async def state(request: web.Request) -> web.Response:
    """How the server stands, the last five minutes and the last steps."""
    context = request.app[CONTEXT_KEY]
    assert context.live is not None, "the route is there only with the page"
    return json_response(
        {
            "model": context.served_name,
            "device": context.compute_type,
            "version": context.version,
            "is_healthy": context.engine.is_healthy(),
            **context.live.state(),
        },
        {"Cache-Control": "no-store"},
    )
