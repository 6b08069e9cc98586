"""Request bodies: from bytes to one JSON object, bounded in size, depth and time, and in the memory of all together."""

import asyncio

import orjson
from aiohttp import web

from text_generation_router.api.context import CONTEXT_KEY, TENANT_KEY
from text_generation_router.errors import (
    MalformedBody,
    MalformedRequest,
    PayloadTooLarge,
    RequestTimeout,
    UnsupportedContentEncoding,
    ValidationError,
)

# Deeper than any JSON schema that people write by hand, far from the stack of the parser.
MAX_DEPTH = 128
# From the end of the headers to the end of the body: so long, and a second more for so many bytes that have come, but
# in all not longer than the last. A small body that is never completed must not take its memory for long.
BODY_START_S = 10.0
MIN_BODY_BYTES_PER_S = 10_000
BODY_TIMEOUT_S = 60.0


async def read_body(request: web.Request) -> dict[str, object]:
    """Read the request's body as a JSON object, whatever its content type says. Raises ValidationError, Overloaded."""
    encoding = request.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise UnsupportedContentEncoding("compressed request bodies are not accepted")
    limit = request.client_max_size
    if request.content_length is not None and request.content_length > limit:
        raise PayloadTooLarge(f"the body must have at most {limit} bytes. Given: {request.content_length}")
    memory, tenant, content = request.app[CONTEXT_KEY].bodies, request.get(TENANT_KEY, ""), bytearray()
    started_s = asyncio.get_running_loop().time()
    try:
        async with asyncio.timeout(_allowed_s(0)) as deadline:
            while chunk := await request.content.readany():
                if len(content) + len(chunk) > limit:
                    raise PayloadTooLarge(f"the body must have at most {limit} bytes")
                memory.take(len(chunk), len(content), tenant)
                content += chunk
                deadline.reschedule(started_s + _allowed_s(len(content)))
        return _parse_object(content)
    except TimeoutError:
        allowed_s = _allowed_s(len(content))
        raise RequestTimeout(f"the body is not complete after {allowed_s:.3g} s and {len(content)} bytes") from None
    except web.RequestPayloadError as error:
        raise MalformedRequest(f"the body is not valid HTTP: {error}") from None
    finally:
        memory.give_back(len(content), tenant)


def _allowed_s(num_bytes: int) -> float:
    """In which a body must be complete of which so many bytes have come."""
    return min(BODY_START_S + num_bytes / MIN_BODY_BYTES_PER_S, BODY_TIMEOUT_S)


def _parse_object(content: bytearray) -> dict[str, object]:
    try:
        body = orjson.loads(content)  # refuses NaN, infinities, lone surrogates and more than 1024 levels
    except orjson.JSONDecodeError as error:
        raise MalformedBody(f"the body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise ValidationError("the body must be a JSON object")
    if content.count(b"[") + content.count(b"{") > MAX_DEPTH and _is_too_deep(body):
        raise MalformedBody(f"the body must be nested at most {MAX_DEPTH} levels deep")
    return body


def _is_too_deep(body: dict[str, object]) -> bool:
    level: list[dict[str, object] | list[object]] = [body]
    for _ in range(MAX_DEPTH):
        inner: list[object] = []
        for value in level:
            inner += value.values() if isinstance(value, dict) else value
        level = [value for value in inner if isinstance(value, (dict, list))]
        if not level:
            return False
    return True
