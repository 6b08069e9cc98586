"""Answers: JSON bodies, errors in TGI's and OpenAI's shape, and the form of one server-sent event."""

import asyncio
import logging
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

import orjson
from aiohttp import web

from text_generation_router.errors import (
    IncompleteGeneration,
    IncompleteGenerationStream,
    InternalError,
    RouterError,
)
from text_generation_router.token_stream import TokenOutput

logger = logging.getLogger(__name__)

# Retry-After while draining: by then a balancer has found another server.
DRAIN_RETRY_AFTER_S = 5
# Work of a millisecond; a thread takes longer to begin and to end.
MAX_ENTRIES_AT_ONCE = 1000
_SLICE_ITEMS = 256
# Stands for the text that varies; nothing else in an answer can be the same, because no client can guess it.
_TEXT_MARK = f"text {secrets.token_hex(16)}"


def json_response(body: Any, headers: Mapping[str, str] | None = None, status: int = 200) -> web.Response:
    """A JSON answer."""
    return rendered_response(orjson.dumps(body), headers, status)


def rendered_response(body: bytes, headers: Mapping[str, str] | None = None, status: int = 200) -> web.Response:
    """An answer that is JSON already."""
    return web.Response(body=body, status=status, headers=headers, content_type="application/json", charset=None)


async def render(body: Callable[[], Any], num_entries: int) -> bytes:
    """What `body` makes, as JSON: in a thread if it is long, so that the events of streams go on in between.

    `num_entries` counts its tokens, and the best ones at the place of each.
    """
    if num_entries <= MAX_ENTRIES_AT_ONCE:
        return orjson.dumps(body())
    rendering = asyncio.ensure_future(asyncio.to_thread(lambda: orjson.dumps(body())))
    try:
        return await asyncio.shield(rendering)
    finally:
        await asyncio.wait((rendering,))  # the permit of a client that leaves is held as long as its answer


def json_list(items: Iterable[Any]) -> orjson.Fragment:
    """A list, rendered in slices: one call of the JSON library lets no other thread run."""
    left, slices = iter(items), list[bytes]()
    while part := list(islice(left, _SLICE_ITEMS)):
        slices.append(orjson.dumps(part)[1:-1])
    return orjson.Fragment(b"[%b]" % b",".join(slices))


def is_openai_path(path: str) -> bool:
    """Whether a route speaks OpenAI's dialect."""
    return path.startswith("/v1/")


def as_router_error(error: Exception) -> RouterError:
    """The error a client may see: an unexpected one is logged here and hidden."""
    if isinstance(error, RouterError):
        return error
    logger.error("Unexpected error", exc_info=error)
    return InternalError()


def error_body(message: str, error_type: str, param: str | None, path: str) -> dict[str, Any]:
    """An error in the dialect of `path`."""
    if is_openai_path(path):
        error = {"message": message, "type": error_type, "param": param, "code": None}
        return {"error": error, "error_type": error_type}
    return {"error": message, "error_type": error_type}


def error_response(error: RouterError, path: str, retry_after_s: int) -> web.Response:
    """An error as a whole answer."""
    headers = {"Retry-After": str(retry_after_s)} if error.error_type == "overloaded" else None
    response = json_response(error_body(str(error), error.error_type, error.param, path), headers, error.status)
    if error.ends_connection:
        response.force_close()
    return response


def error_event(error: RouterError, path: str) -> bytes:
    """An error inside a stream; OpenAI's shape also carries the status, as TGI's did there."""
    if isinstance(error, IncompleteGeneration):
        error = IncompleteGenerationStream(str(error).removeprefix(error.prefix))
    body = error_body(str(error), error.error_type, error.param, path)
    if is_openai_path(path):
        body["error"]["http_status_code"] = error.status
    return event(body)


def event(body: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + orjson.dumps(body) + b"\n\n"


class TextEvent:
    """An event of which the text alone varies: rendered once, and cut where the text stands."""

    def __init__(self, body: Callable[[str], Any]) -> None:
        self._before, self._after = event(body(_TEXT_MARK)).split(orjson.dumps(_TEXT_MARK))

    def render_all(self, outputs: Sequence[TokenOutput]) -> bytes:
        """An event with the text of each of `outputs`."""
        before, after, dumps = self._before, self._after, orjson.dumps
        if len(outputs) == 1:
            return before + dumps(outputs[0].text) + after
        return b"".join([before + dumps(output.text) + after for output in outputs])
