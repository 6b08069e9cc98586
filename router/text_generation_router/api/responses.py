"""Answers: JSON bodies, errors in TGI's and OpenAI's shape, and server-sent events."""

import asyncio
import contextlib
import logging
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import orjson
from aiohttp import web

from text_generation_router.errors import (
    IncompleteGeneration,
    IncompleteGenerationStream,
    InternalError,
    RouterError,
)

logger = logging.getLogger(__name__)

KEEP_ALIVE_S = 15.0
# Retry-After while draining: by then a balancer has found another server.
DRAIN_RETRY_AFTER_S = 5


def json_response(body: Any, headers: Mapping[str, str] | None = None, status: int = 200) -> web.Response:
    """A JSON answer."""
    return web.Response(
        body=orjson.dumps(body), status=status, headers=headers, content_type="application/json", charset=None
    )


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
    return json_response(error_body(str(error), error.error_type, error.param, path), headers, error.status)


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


class EventStream:
    """A text/event-stream answer. Its headers leave with the first event, so errors before it keep their status.

    An async context manager: inside it a comment is sent after each 15 s of silence.
    """

    def __init__(self, request: web.Request, headers: Mapping[str, str]) -> None:
        self._request = request
        self.response = web.StreamResponse(
            headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        )
        self.response.headers.update(headers)
        self._prepare_lock = asyncio.Lock()
        self._loop = asyncio.get_running_loop()
        self._last_sent_s = self._loop.time()
        self._timer: asyncio.TimerHandle | None = None
        self._keep_alive: asyncio.Task[None] | None = None

    @property
    def is_started(self) -> bool:
        """Whether the status is sent."""
        return self.response.prepared

    async def send(self, events: bytes) -> None:
        """Write events; several tasks may."""
        self._last_sent_s = self._loop.time()
        if not self.response.prepared:
            async with self._prepare_lock:
                if not self.response.prepared:
                    await self.response.prepare(self._request)
        await self.response.write(events)

    async def __aenter__(self) -> "EventStream":
        self._timer = self._loop.call_later(KEEP_ALIVE_S, self._check_silence)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._keep_alive is not None and not self._keep_alive.done():
            self._keep_alive.cancel()
            await asyncio.wait({self._keep_alive})
        if error is None:
            await self.response.write_eof()

    def _check_silence(self) -> None:
        silence_s = self._loop.time() - self._last_sent_s
        if silence_s >= KEEP_ALIVE_S:
            self._keep_alive = self._loop.create_task(self._send_keep_alive())
            silence_s = 0.0
        self._timer = self._loop.call_later(KEEP_ALIVE_S - silence_s, self._check_silence)

    async def _send_keep_alive(self) -> None:
        # A client that is gone is noticed by the handler itself.
        with contextlib.suppress(ConnectionError):
            await self.send(b":\n\n")
