"""One HTTP/1.1 connection of the load client: sends a request, hands on the parts of its answer as they come.

Lean, because client and server share a machine: what it does to a part happens in the event loop's own call.
"""

import asyncio
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

LINE_END, HEAD_END = b"\r\n", b"\r\n\r\n"
STATUS_LINE = re.compile(rb"HTTP/1\.(\d) (\d{3})\b")
HEX_DIGITS = b"0123456789abcdefABCDEF"
STATUSES_WITHOUT_BODY = (204, 304)

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
        status_line, *lines = text.split(LINE_END)
        fields = [(name.lower(), value.strip().lower()) for name, _, value in (line.partition(b":") for line in lines)]
        values, matched = dict(fields), STATUS_LINE.match(status_line)
        length = values.get(b"content-length")
        if matched is None or (length is not None and not length.isdigit()):
            raise BrokenAnswer(f"not an answer of HTTP: {text[:100]!r}")
        status, is_chunked = int(matched[2]), values.get(b"transfer-encoding") == b"chunked"
        num_bytes = None if is_chunked or length is None else int(length)
        if status in STATUSES_WITHOUT_BODY:
            is_chunked, num_bytes = False, 0
        options = {option.strip() for name, value in fields if name == b"connection" for option in value.split(b",")}
        is_last = b"close" in options or (matched[1] == b"0" and b"keep-alive" not in options)
        return cls(status, is_chunked, num_bytes, is_last or (num_bytes is None and not is_chunked))


class Connection(asyncio.Protocol):
    """The protocol of one connection. It is used again once an answer is complete, unless that was its last."""

    def __init__(self, silence_timeout_s: float) -> None:
        self._silence_timeout_s = silence_timeout_s
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._bytes, self._position = b"", 0  # read, and used up to there
        self._head: Head | None = None
        self._take: TakePart | None = None
        self._done: asyncio.Future[int] | None = None  # the status, of the request that is open
        self._last_read_s = 0.0
        self._timer: asyncio.TimerHandle | None = None

    async def exchange(self, message: bytes, take: TakePart) -> int:
        """Send a request, and return its answer's status once that is complete.

        Raises OSError (TimeoutError for a silent server), BrokenAnswer, and what `take` raises.

        The first byte is written before anything is awaited.
        """
        assert self._transport is not None, "not connected"
        self._take, self._done, self._last_read_s = take, self._loop.create_future(), self._loop.time()
        self._transport.write(message)
        self._timer = self._loop.call_later(self._silence_timeout_s, self._check_silence)
        try:
            return await self._done
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
        head = self._head
        if exc is None and head is not None and head.num_bytes is None and not head.is_chunked:
            self._end(head)
        else:
            self._fail(exc or ConnectionResetError("the server closed the connection"))

    def data_received(self, data: bytes) -> None:
        """Something came."""
        now_ns = time.monotonic_ns()
        self._last_read_s = self._loop.time()
        self._bytes, self._position = self._bytes[self._position :] + data, 0
        try:
            while self._position < len(self._bytes) and self._read_on(now_ns):
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
        start = self._position
        if head.num_bytes is None:
            self._position = len(self._bytes)
            self._take(head.status, self._bytes[start:], now_ns)
            return False
        self._position = min(start + head.num_bytes, len(self._bytes))
        head.num_bytes -= self._position - start
        self._take(head.status, self._bytes[start : self._position], now_ns)
        if not head.num_bytes:
            self._end(head)
        return True

    def _read_head(self) -> bool:
        end = self._bytes.find(HEAD_END, self._position)
        if end < 0:
            return False
        head = Head.parse(self._bytes[self._position : end])
        self._position = end + len(HEAD_END)
        if head.status >= 200:  # those before it only say that the answer will come
            self._head = head
            if head.num_bytes == 0:
                self._end(head)
        return True

    def _read_chunk(self, head: Head, take: TakePart, now_ns: int) -> bool:
        line_end = self._bytes.find(LINE_END, self._position)
        if line_end < 0:
            return False
        digits = self._bytes[self._position : line_end].partition(b";")[0].rstrip()
        if not digits or digits.strip(HEX_DIGITS):
            raise BrokenAnswer(f"not the size of a chunk: {digits[:100]!r}")
        size = int(digits, 16)
        if not size:
            end = self._bytes.find(HEAD_END, line_end)  # behind trailers, if there are any
            if end < 0:
                return False
            self._position = end + len(HEAD_END)
            self._end(head)
            return True
        start = line_end + len(LINE_END)
        end = start + size
        if len(self._bytes) < end + len(LINE_END):
            return False
        if not self._bytes.startswith(LINE_END, end):
            raise BrokenAnswer(f"not the end of a chunk: {self._bytes[end : end + 100]!r}")
        self._position = end + len(LINE_END)
        take(head.status, self._bytes[start:end], now_ns)
        return True

    def _end(self, head: Head) -> None:
        """The answer is complete."""
        self._head = None
        if self._done is not None and not self._done.done():
            self._done.set_result(head.status)
        if head.is_last:
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
