"""One client's connection: aiohttp's protocol, and what it leaves open.

A client that stops reading is given up, a body that breaks its own framing ends at once, and what aiohttp refuses
before any handler runs is refused in our error body.
"""

import asyncio
import contextlib
import fcntl
import logging
import struct
import termios
from collections.abc import Callable
from typing import Any

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError, InvalidURLError
from aiohttp.streams import StreamReader

from text_generation_router.api.responses import as_router_error, error_response
from text_generation_router.errors import MalformedRequest, RouterError
from text_generation_router.request_metrics import RequestMetrics

logger = logging.getLogger(__name__)

# A client that has taken nothing for so long, while more is ready for it than the socket holds, has left.
WRITE_STALL_S = 60.0
# From the connection to the end of its first request's headers. Between requests aiohttp limits the idle time.
HEADER_TIMEOUT_S = 30.0


def connection_factory(server: web.Server, metrics: RequestMetrics) -> Callable[[], "Connection"]:
    """What makes a connection's protocol, for the event loop."""
    return lambda: Connection(server, metrics)


class Connection(web.RequestHandler):
    """The protocol of one connection of `server`."""

    __slots__ = ("_header_timer", "_metrics", "_newest_body", "_num_untaken_bytes", "_stall_timer")

    def __init__(self, server: web.Server, metrics: RequestMetrics) -> None:
        super().__init__(
            server,
            loop=asyncio.get_running_loop(),
            auto_decompress=False,
            access_log=None,  # type: ignore[arg-type] # None means that there is none
        )
        self._metrics = metrics
        self._header_timer: asyncio.TimerHandle | None = None
        self._newest_body: StreamReader | None = None
        self._num_untaken_bytes = 0
        self._stall_timer: asyncio.TimerHandle | None = None

    # Clients that connect and send nothing, or never end their headers.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The connection is open."""
        super().connection_made(transport)
        self._header_timer = asyncio.get_running_loop().call_later(HEADER_TIMEOUT_S, self._give_up_headers)

    def _give_up_headers(self) -> None:
        self._metrics.rejected("header_time")
        if self.transport is not None:
            self.transport.close()

    def _stop_waiting_for_headers(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    # Clients that stop reading. Handlers wait in a write only between these two calls of the transport.

    def pause_writing(self) -> None:
        """The transport has more to send than it likes."""
        super().pause_writing()
        assert self.transport is not None, "a transport pauses while it is open"
        self._watch(self.transport)

    def resume_writing(self) -> None:
        """The client has read on."""
        super().resume_writing()
        self._stop_watching()

    def connection_lost(self, exc: BaseException | None) -> None:
        """The connection is closed."""
        self._stop_waiting_for_headers()
        self._stop_watching()
        super().connection_lost(exc)

    def _watch(self, transport: asyncio.Transport) -> None:
        self._num_untaken_bytes = _num_untaken_bytes(transport)
        self._stall_timer = asyncio.get_running_loop().call_later(WRITE_STALL_S, self._check_progress, transport)

    def _check_progress(self, transport: asyncio.Transport) -> None:
        if _num_untaken_bytes(transport) < self._num_untaken_bytes:
            self._watch(transport)
        else:
            logger.info("A client has read nothing for %g s; its connection is closed", WRITE_STALL_S)
            transport.abort()

    def _stop_watching(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    # Bodies whose framing breaks.

    def data_received(self, data: bytes) -> None:
        """Parse; a new message before the end of the last body can only be the parser's refusal of that body."""
        super().data_received(data)
        if not self._messages:
            return
        self._stop_waiting_for_headers()
        body, self._newest_body = self._newest_body, self._messages[-1][1]
        if body is not None and body is not self._newest_body and not body.is_eof():
            body.set_exception(web.RequestPayloadError("malformed chunk"))
            body.feed_eof()
            self.close()  # once the handler has answered

    def log_exception(self, *args: Any, **kwargs: Any) -> None:
        """A body that breaks when its answer has been sent already is the client's affair."""
        if not isinstance(kwargs.get("exc_info"), web.RequestPayloadError):
            super().log_exception(*args, **kwargs)

    # Refusals that no handler makes.

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """The answer to what is no HTTP, or to an error outside of the handlers; the connection ends with it."""
        if request.writer.output_size > 0:
            raise ConnectionError("the answer has begun, no other can be sent")
        error = _refusal(exc) if isinstance(exc, Exception) else as_router_error(RuntimeError(message))
        if isinstance(error, MalformedRequest):
            self._metrics.rejected("http")
        response = error_response(error, request.path, retry_after_s=0)
        response.force_close()
        response.headers["Server"] = "text-generation-router"  # else aiohttp adds its version
        return response


def _num_untaken_bytes(transport: asyncio.Transport) -> int:
    """What the client has not acknowledged: the kernel takes more from us only once much of its part is gone."""
    num_bytes = transport.get_write_buffer_size()
    if (sock := transport.get_extra_info("socket")) is not None:
        with contextlib.suppress(OSError):  # a system that does not tell
            num_bytes += struct.unpack("i", fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4)))[0]
    return num_bytes


def _refusal(error: Exception) -> RouterError:
    if not isinstance(error, HttpProcessingError):
        return as_router_error(error)
    # The parser's own text goes on with what it was given.
    reason = "bad URL" if isinstance(error, InvalidURLError) else error.message.partition(":")[0]
    return MalformedRequest(f"the request is not valid HTTP: {reason}")
