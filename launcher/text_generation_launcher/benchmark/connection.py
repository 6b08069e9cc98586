"""One HTTP/1.1 connection of the load client: sends a request, hands on the parts of its answer as they come.

Lean, because client and server share a machine: what it does to a part happens in the event loop's own call.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

HEAD_END = b"\r\n\r\n"

# Takes a part of an answer's body, with the answer's status and when the part was read, monotonic nanoseconds.
TakePart = Callable[[int, bytes, int], None]


class BrokenAnswer(ValueError):
    """What came is no HTTP."""


@dataclass(slots=True)
class Head:
    """What is needed of an answer's status line and headers."""

    status: int
    is_chunked: bool
    num_bytes: int | None  # of the body; None: it is chunked, or ends with the connection
    is_last: bool  # the connection ends with this answer

    @classmethod
    def parse(cls, text: bytes) -> "Head":
        """Read everything before the empty line; raises BrokenAnswer."""
        status_line, *lines = text.split(b"\r\n")
        fields = {name.lower(): value.strip() for name, _, value in (line.partition(b":") for line in lines)}
        try:
            status, length = int(status_line.split(maxsplit=2)[1]), fields.get(b"content-length")
            is_chunked = fields.get(b"transfer-encoding", b"").lower() == b"chunked"
            num_bytes = None if is_chunked or length is None else int(length)
        except (ValueError, IndexError):
            raise BrokenAnswer(f"not an answer of HTTP: {text[:100]!r}") from None
        is_last = fields.get(b"connection", b"").lower() == b"close" or (num_bytes is None and not is_chunked)
        return cls(status, is_chunked, num_bytes, is_last)


class Connection(asyncio.Protocol):
    """The protocol of one connection. It is used again once an answer is complete, unless that was its last."""

    def __init__(self, silence_timeout_s: float) -> None:
        self._silence_timeout_s = silence_timeout_s
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._bytes = b""  # read, not used yet
        self._head: Head | None = None
        self._take: TakePart | None = None
        self._done: asyncio.Future[None] | None = None  # of the request that is open
        self._last_read_s = 0.0
        self._timer: asyncio.TimerHandle | None = None

    async def exchange(self, message: bytes, take: TakePart) -> None:
        """Send a request, and return once its answer is complete; raises OSError and what `take` raises.

        The first byte is written before anything is awaited.
        """
        assert self._transport is not None, "not connected"
        self._take, self._done, self._last_read_s = take, self._loop.create_future(), self._loop.time()
        self._transport.write(message)
        self._timer = self._loop.call_later(self._silence_timeout_s, self._check_silence)
        try:
            await self._done
        except BaseException:
            self.close()
            raise
        finally:
            self._timer.cancel()
            self._done = self._take = None

    @property
    def is_open(self) -> bool:
        """Whether another request can be sent."""
        return self._transport is not None and not self._transport.is_closing()

    def close(self) -> None:
        """End the connection."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The connection is open."""
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is closed: the end of an answer that has no other."""
        if self._head is not None and self._head.num_bytes is None and not self._head.is_chunked:
            self._end()
        else:
            self._fail(exc or ConnectionResetError("the server closed the connection"))

    def data_received(self, data: bytes) -> None:
        """Something came."""
        now_ns = time.monotonic_ns()
        self._last_read_s = self._loop.time()
        self._bytes = self._bytes + data if self._bytes else data
        try:
            while self._bytes and self._read_on(now_ns):
                pass
        except Exception as error:
            self._fail(error)
            self.close()

    def _read_on(self, now_ns: int) -> bool:
        """Use up one piece of what was read; answers whether there may be another."""
        if self._done is None or self._take is None or self._done.done():
            raise BrokenAnswer("more than one answer came to a request")
        head = self._head
        if head is None:
            return self._read_head()
        if head.is_chunked:
            return self._read_chunk(head, self._take, now_ns)
        if head.num_bytes is None:
            part, self._bytes = self._bytes, b""
            self._take(head.status, part, now_ns)
            return False
        part, self._bytes = self._bytes[: head.num_bytes], self._bytes[head.num_bytes :]
        head.num_bytes -= len(part)
        self._take(head.status, part, now_ns)
        if not head.num_bytes:
            self._end()
        return True

    def _read_head(self) -> bool:
        text, end, rest = self._bytes.partition(HEAD_END)
        if not end:
            return False
        self._bytes, head = rest, Head.parse(text)
        if head.status >= 200:  # those before it only say that the answer will come
            self._head = head
            if head.num_bytes == 0:
                self._end()
        return True

    def _read_chunk(self, head: Head, take: TakePart, now_ns: int) -> bool:
        line, end, rest = self._bytes.partition(b"\r\n")
        if not end:
            return False
        try:
            size = int(line.partition(b";")[0], 16)
        except ValueError:
            raise BrokenAnswer(f"not the size of a chunk: {line[:100]!r}") from None
        if not size:
            # Nobody sends trailers: the empty line follows.
            if len(rest) < 2:
                return False
            self._bytes = rest[2:]
            self._end()
            return True
        if len(rest) < size + 2:
            return False
        self._bytes = rest[size + 2 :]
        take(head.status, rest[:size], now_ns)
        return True

    def _end(self) -> None:
        """The answer is complete."""
        is_last, self._head = self._head is not None and self._head.is_last, None
        if self._done is not None and not self._done.done():
            self._done.set_result(None)
        if is_last:
            self.close()

    def _fail(self, error: Exception) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(error)

    def _check_silence(self) -> None:
        silence_s = self._loop.time() - self._last_read_s
        if silence_s >= self._silence_timeout_s:
            self._fail(TimeoutError(f"nothing came for {self._silence_timeout_s:g} s"))
        else:
            self._timer = self._loop.call_later(self._silence_timeout_s - silence_s, self._check_silence)
