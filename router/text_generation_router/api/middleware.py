"""What happens around every handler: CORS, the API key, and the one place where errors become answers."""

import hashlib
import hmac
from collections.abc import Awaitable, Callable

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from text_generation_router.api.context import CONTEXT_KEY, IGNORED_KEY, Context
from text_generation_router.api.responses import (
    DRAIN_RETRY_AFTER_S,
    as_router_error,
    error_body,
    error_response,
    json_response,
)
from text_generation_router.errors import ShuttingDown

ResponseSignal = Callable[[web.Request, web.StreamResponse], Awaitable[None]]


@web.middleware
async def answer_preflight(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer CORS preflight requests, which carry no key, for every path."""
    headers = request.headers
    if request.method != "OPTIONS" or "Origin" not in headers or "Access-Control-Request-Method" not in headers:
        return await handler(request)
    return web.Response(
        headers={"Access-Control-Allow-Methods": "GET,POST", "Access-Control-Allow-Headers": "content-type"}
    )


def answer_headers(allowed_origins: tuple[str, ...]) -> ResponseSignal:
    """Headers that every answer carries, streams included: the allowed origin, and the ignored parameters."""

    async def add_headers(request: web.Request, response: web.StreamResponse) -> None:
        origin = request.headers.get("Origin")
        if not allowed_origins or "*" in allowed_origins:
            response.headers["Access-Control-Allow-Origin"] = "*"
        else:
            response.headers["Vary"] = "Origin"
            if origin in allowed_origins:
                response.headers["Access-Control-Allow-Origin"] = origin
        if (ignored := request.get(IGNORED_KEY)) is not None:
            response.headers["x-ignored-parameters"] = ignored
        response.headers.popall("Server", None)  # versions are nobody's business

    return add_headers


def require_api_key(api_key: str, open_routes: set[web.AbstractRoute]) -> Middleware:
    """Refuse whatever comes without the key, unknown paths included, except on `open_routes`.

    Digests are compared, in constant time, so neither the key's length nor its content shows in the duration.
    """
    expected = hashlib.sha256(api_key.encode()).digest()

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        scheme, _, key = request.headers.get("Authorization", "").partition(" ")
        given = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
        has_key = hmac.compare_digest(given, expected) and scheme.lower() == "bearer"
        if not has_key and request.match_info.route not in open_routes:
            return web.Response(status=401)
        return await handler(request)

    return middleware


@web.middleware
async def answer_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn whatever a handler raises into an answer of the route's dialect; a bug shows no internals."""
    try:
        return await handler(request)
    except web.HTTPException as error:
        kind = error.reason.lower().replace(" ", "_")
        headers = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else None
        return json_response(error_body(error.reason, kind, None, request.path), headers, error.status)
    except ConnectionError:
        raise  # the client is gone
    except Exception as error:
        shown = as_router_error(error)
        if request.writer.output_size > 0:
            raise ConnectionError("the answer has begun, no other can be sent") from error
        return error_response(shown, request.path, _retry_after_s(shown, request.app[CONTEXT_KEY]))


def _retry_after_s(error: Exception, context: Context) -> int:
    return DRAIN_RETRY_AFTER_S if isinstance(error, ShuttingDown) else context.permits.retry_after_s()
