"""Streamed answers: server-sent events, kept alive in silence, with errors as events once the status is sent."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterable, Mapping
from types import TracebackType

from aiohttp import web

from text_generation_router.api.generation import CLIENT_LEFT, Generation, GenerationRequest
from text_generation_router.api.responses import as_router_error, error_event
from text_generation_router.token_stream import TokenOutput

KEEP_ALIVE_S = 15.0


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
        self._num_writers = 0  # tasks inside `send`: while a client does not read, they wait there
        self._timer: asyncio.TimerHandle | None = None
        self._keep_alive: asyncio.Task[None] | None = None

    @property
    def is_started(self) -> bool:
        """Whether the status is sent."""
        return self.response.prepared

    async def send(self, events: bytes) -> None:
        """Write events; several tasks may."""
        self._num_writers += 1
        try:
            if not self.response.prepared:
                async with self._prepare_lock:
                    if not self.response.prepared:
                        await self.response.prepare(self._request)
            await self.response.write(events)
        finally:
            self._num_writers -= 1
            self._last_sent_s = self._loop.time()

    async def send_all(
        self, generation: Generation, render: Callable[[list[TokenOutput]], bytes], before: Iterable[bytes] = ()
    ) -> None:
        """Write the events of all tokens of a generation, as they come.

        `render` makes events of tokens, or none; when it meets the last, the generation has its finish reason.
        `before` makes those that come before, once there is a token; between them those of other streams go on.
        """

        for events in before if await generation.has_begun() else ():
            await self.send(events)
            await asyncio.sleep(0)
        outputs = await generation.read()
        while outputs and not (first := render(outputs)):
            outputs = await generation.read()
        if not outputs:
            return
        await self.send(first)  # with the headers
        connection, time_s = self._request.protocol, self._loop.time
        is_chunked = "Transfer-Encoding" in self.response.headers

        def take(outputs: list[TokenOutput]) -> bool:
            transport = connection.transport
            if self._num_writers or connection.writing_paused or transport is None or transport.is_closing():
                return False  # the client does not keep up, or is gone
            if not (events := render(outputs)):
                return True  # an empty chunk would end the response
            # What the response's own `write` does, at a fifth of its cost.
            transport.write(b"%x\r\n%b\r\n" % (len(events), events) if is_chunked else events)
            self._last_sent_s = time_s()
            return True

        while outputs := await generation.read(take):
            if events := render(outputs):
                await self.send(events)

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
        if self._num_writers or silence_s >= KEEP_ALIVE_S:
            silence_s = 0.0
            # What a client does not read needs no comment behind it; nor is there ever more than one on its way.
            if not self._num_writers:
                self._keep_alive = self._loop.create_task(self._send_keep_alive())
        self._timer = self._loop.call_later(KEEP_ALIVE_S - silence_s, self._check_silence)

    async def _send_keep_alive(self) -> None:
        # A client that is gone is noticed by the handler itself.
        with contextlib.suppress(ConnectionError):
            await self.send(b":\n\n")


async def stream_answer(
    record: GenerationRequest,
    num_characters: int,
    send_all: Callable[[EventStream], Awaitable[None]],
    keeps_status: tuple[type[Exception], ...],
) -> web.StreamResponse:
    """Run `send_all`, which writes the events of an answer; an error becomes an event, the last one.

    Errors of the types in `keeps_status` are raised instead, for an answer of their own, until the status is sent.
    """
    await asyncio.sleep(0)  # the engine has just been woken: its plan leaves before anything else is done
    headers = {"x-compute-type": record.context.compute_type, "x-compute-characters": str(num_characters)}
    async with EventStream(record.http, headers) as events:
        try:
            await send_all(events)
        except CLIENT_LEFT:
            raise
        except Exception as error:
            if isinstance(error, keeps_status) and not events.is_started:
                raise
            record.fail(error)
            await events.send(error_event(as_router_error(error), record.http.path))
    return events.response
