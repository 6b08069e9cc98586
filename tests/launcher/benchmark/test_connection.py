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


async def exchange(pieces: list[bytes], ends: bool = True, silence_s: float = 10.0) -> tuple[int, bytes, Transport]:
    """One request answered by these pieces and, if it `ends`, by the end of the connection."""
    connection, transport, parts, statuses = Connection(silence_s), Transport(), [], []

    def take(status: int, part: bytes, now_ns: int) -> None:
        statuses.append(status)
        parts.append(part)

    connection.connection_made(transport)
    open_request = asyncio.create_task(connection.exchange(b"POST", take))
    await asyncio.sleep(0)
    for piece in pieces:
        connection.data_received(piece)
    if ends:
        connection.connection_lost(None)
    await open_request
    return max(statuses, default=0), b"".join(parts), transport


def by_http_client(answer: bytes) -> tuple[int, bytes]:
    class Socket:
        def makefile(self, mode: str) -> io.BytesIO:
            return io.BytesIO(answer)

    response = http.client.HTTPResponse(Socket())
    response.begin()
    return response.status, response.read()


@pytest.mark.parametrize("answer", [CHUNKED, COUNTED, TO_THE_END, CONTINUED, LAST])
def test_an_answer_is_read_wherever_it_is_cut(answer):
    for cut in range(1, len(answer)):
        status, body, _ = asyncio.run(exchange([answer[:cut], answer[cut:]]))
        assert (status, body) == by_http_client(answer)
    status, body, transport = asyncio.run(exchange([answer[i : i + 1] for i in range(len(answer))]))
    assert (status, body) == by_http_client(answer)
    assert transport.written == b"POST"


@pytest.mark.parametrize(
    ("answer", "is_closed"), [(CHUNKED, False), (COUNTED, False), (EMPTY, False), (LAST, True), (CHUNKED + EMPTY, True)]
)
def test_a_complete_answer_ends_the_connection_only_if_it_says_so_or_more_follows(answer, is_closed):
    _, _, transport = asyncio.run(exchange([answer], ends=False))
    assert transport.is_closed is is_closed


@pytest.mark.parametrize("answer", [CHUNKED, COUNTED])
def test_an_answer_that_breaks_off_is_an_error(answer):
    for end in range(len(answer)):
        with pytest.raises(ConnectionResetError):
            asyncio.run(exchange([answer[:end]]))


@pytest.mark.parametrize("answer", [b"hello\r\n\r\n", CHUNKED.replace(b"f;", b"z;")])
def test_what_is_no_answer_is_an_error(answer):
    with pytest.raises(BrokenAnswer):
        asyncio.run(exchange([answer[:60], answer[60:]], ends=False))


def test_a_silent_server_is_given_up():
    with pytest.raises(TimeoutError, match=r"0\.01 s"):
        asyncio.run(exchange([CHUNKED[:-5]], ends=False, silence_s=0.01))
