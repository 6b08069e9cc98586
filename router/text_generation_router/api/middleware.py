"""What happens around every handler: ids, CORS, the API key, and the one place where errors become answers."""

import re
from collections.abc import Awaitable, Callable

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from text_generation_router.access import ApiKeys
from text_generation_router.api.context import (
    CLIENT_REQUEST_ID_KEY,
    CONTEXT_KEY,
    IGNORED_KEY,
    REQUEST_ID_KEY,
    TENANT_KEY,
    TRACE_KEY,
    Context,
)
from text_generation_router.api.request_id import new_request_id
from text_generation_router.api.responses import (
    DRAIN_RETRY_AFTER_S,
    as_router_error,
    error_body,
    error_response,
    json_response,
)
from text_generation_router.api.tokenize import TOKENIZE_PATHS
from text_generation_router.errors import ShuttingDown

# Ids that clients send are echoed when they are plain and short; others get ours.
_REQUEST_ID = re.compile(r"[!-~]{1,128}")
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
    """Headers that every answer carries, streams included: ids, the allowed origin, the ignored parameters."""

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
        if (trace := request.get(TRACE_KEY)) is not None:
            response.headers["traceresponse"] = trace
        request_id = request.get(CLIENT_REQUEST_ID_KEY) or request.get(REQUEST_ID_KEY)
        if request_id is not None:
            response.headers["x-request-id"] = request_id
        response.headers.popall("Server", None)  # versions are nobody's business

    return add_headers


def require_api_key(keys: ApiKeys, open_routes: set[web.AbstractRoute]) -> Middleware:
    """Refuse whatever comes without a key, unknown paths included, except on `open_routes`."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        owner = keys.owner(request.headers.get("Authorization", ""))
        if owner is None and request.match_info.route not in open_routes:
            request.app[CONTEXT_KEY].metrics.requests.rejected("api_key")
            return web.Response(status=401)
        request[TENANT_KEY] = owner or ""
        return await handler(request)

    return middleware


@web.middleware
async def identify(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Give the request an id of ours, and note the client's own, which is only ever echoed."""
    request[REQUEST_ID_KEY] = new_request_id()
    given = request.headers.get("x-request-id", "")
    if _REQUEST_ID.fullmatch(given):
        request[CLIENT_REQUEST_ID_KEY] = given
    return await handler(request)


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
        return error_response(shown, request.path, _retry_after_s(shown, request.path, request.app[CONTEXT_KEY]))


def _retry_after_s(error: Exception, path: str, context: Context) -> int:
    if isinstance(error, ShuttingDown):
        return DRAIN_RETRY_AFTER_S
    if path in TOKENIZE_PATHS:
        return context.tokenize_permits.retry_after_s(context.tokenize_permits.num_taken)
    return context.permits.retry_after_s(context.engine.num_waiting())
