"""The client's connection against the standard library's reader of HTTP, however the answer is cut."""

import asyncio
import http.client
import io

import pytest
from text_generation_launcher.benchmark.connection import BrokenAnswer, Connection

EVENTS = b'data: {"a": 1}\n\ndata: [DONE]\n\n'
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nf;x=y\r\n%b\r\nF\r\n%b\r\n0\r\n\r\n" % (
    EVENTS[:15],
    EVENTS[15:],
)
COUNTED = b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: 30\r\n\r\n" + EVENTS
EMPTY = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n"
TO_THE_END = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n" + EVENTS
CONTINUED = b"HTTP/1.1 100 Continue\r\n\r\n" + CHUNKED
LAST = CHUNKED.replace(b"OK\r\n", b"OK\r\nConnection: close\r\n")
TRAILED = CHUNKED[:-2] + b"Digest: x\r\nDate: y\r\n\r\n"
EMPTY_CHUNKED = b"HTTP/1.1 503 Service Unavailable\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
NO_CONTENT = b"HTTP/1.1 204 No Content\r\n\r\n"
NOT_MODIFIED = b"HTTP/1.1 304 Not Modified\r\nContent-Length: 30\r\n\r\n"


class Transport(asyncio.Transport):
    """Keeps what is written; `abort` closes at once."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.is_closed = False

    def write(self, data: bytes) -> None:
        self.written += data

    def abort(self) -> None:
        self.is_closed = True

    def is_closing(self) -> bool:
        return self.is_closed


async def exchange(
    pieces: list[bytes], ends: bool = True, error: Exception | None = None, silence_s: float = 2.0
) -> tuple[int, bytes, Transport]:
    """One request answered by these pieces and, if it `ends`, by the end of the connection: a good one, or an error."""
    connection, transport, parts, statuses = Connection(silence_s), Transport(), [], set()

    def take(status: int, part: bytes, now_ns: int) -> None:
        statuses.add(status)
        parts.append(part)

    connection.connection_made(transport)
    open_request = asyncio.create_task(connection.exchange(b"POST", take))
    await asyncio.sleep(0)
    for piece in pieces:
        connection.data_received(piece)
    if ends:
        connection.connection_lost(error)
    status = await open_request
    assert statuses <= {status}
    return status, b"".join(parts), transport


def by_http_client(answer: bytes) -> tuple[int, bytes, bool]:
    """Status, body, and whether the connection ends with it."""

    class Socket:
        def makefile(self, mode: str) -> io.BytesIO:
            return io.BytesIO(answer)

    response = http.client.HTTPResponse(Socket())
    response.begin()
    return response.status, response.read(), bool(response.will_close)


SELF_DELIMITED = [CHUNKED, COUNTED, CONTINUED, LAST, TRAILED, EMPTY, EMPTY_CHUNKED, NO_CONTENT, NOT_MODIFIED]


@pytest.mark.parametrize("answer", [*SELF_DELIMITED, TO_THE_END])
def test_an_answer_is_read_wherever_it_is_cut(answer):
    ends = answer is TO_THE_END
    for cut in range(len(answer)):
        status, body, transport = asyncio.run(exchange([answer[:cut], answer[cut:]], ends))
        assert (status, body, transport.is_closed) == by_http_client(answer)
    status, body, transport = asyncio.run(exchange([answer[i : i + 1] for i in range(len(answer))], ends))
    assert (status, body, transport.is_closed) == by_http_client(answer)
    assert transport.written == b"POST"


@pytest.mark.parametrize("version", [b"HTTP/1.0", b"HTTP/1.1"])
@pytest.mark.parametrize("options", [b"close", b"Close", b"keep-alive", b"Keep-Alive", b"keep-alive, close", b"x"])
def test_the_connection_ends_with_the_answer_that_says_so(version, options):
    answer = COUNTED.replace(b"HTTP/1.1", version).replace(b"content", b"Connection: %b\r\ncontent" % options)
    _, _, transport = asyncio.run(exchange([answer], ends=False))
    # Of keep-alive together with close, the standard library sees only the former in HTTP/1.0.
    assert transport.is_closed is (by_http_client(answer)[2] or b"close" in options)


def test_more_than_the_answer_ends_the_connection():
    status, body, transport = asyncio.run(exchange([CHUNKED + EMPTY], ends=False))
    assert (status, body, transport.is_closed) == (200, EVENTS, True)


@pytest.mark.parametrize("answer", [CHUNKED, COUNTED])
def test_an_answer_that_breaks_off_is_an_error(answer):
    for end in range(len(answer)):
        with pytest.raises(ConnectionResetError):
            asyncio.run(exchange([answer[:end]]))


def test_an_answer_that_ends_with_the_connection_does_not_end_by_an_error():
    for end in range(len(TO_THE_END) + 1):
        with pytest.raises(ConnectionResetError, match="reset"):
            asyncio.run(exchange([TO_THE_END[:end]], error=ConnectionResetError("reset")))


@pytest.mark.parametrize(
    "answer",
    [
        b"hello\r\n\r\n",
        b"hello 200\r\n\r\n",
        COUNTED.replace(b"30", b"-5"),
        COUNTED.replace(b"30", b"3_0"),
        *(CHUNKED.replace(b"f;", size + b";") for size in (b"z", b"-5", b"0_f", b"0xf", b"+f", b"")),
        CHUNKED.replace(b"f;", b"e;"),
    ],
)
def test_what_is_no_answer_is_an_error(answer):
    with pytest.raises(BrokenAnswer):
        asyncio.run(exchange([answer[:60], answer[60:]], ends=False))


def test_a_silent_server_is_given_up():
    with pytest.raises(TimeoutError, match=r"0\.01 s"):
        asyncio.run(exchange([CHUNKED[:-5]], ends=False, silence_s=0.01))
