"""Raw bytes over a socket: clients that stop reading or sending, broken framing, and what is no HTTP at all."""

import asyncio
import json
import logging
import socket

import pytest
from text_generation_router.api import connection as connection_module
from text_generation_router.api.connection import Connection
from text_generation_router.token_stream import TokenOutput

HEAD = b"POST %s HTTP/1.1\r\nHost: a\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
ROUTES = ["/", "/generate", "/generate_stream", "/v1/completions", "/v1/chat/completions"]


async def exchange(served, *pieces):
    """Send the pieces one by one, then read until the server closes; returns status, headers and JSON body."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(served.url.rsplit(":", 1)[1]))
    for piece in pieces:
        writer.write(piece)
        await writer.drain()
        await asyncio.sleep(0.02)
    async with asyncio.timeout(5):
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    status, *headers = head.decode().split("\r\n")
    names = dict(header.lower().split(": ", 1) for header in headers)
    return int(status.split()[1]), names, json.loads(body)


def check_refusal(answer, status, reason, path="/generate"):
    found, headers, body = answer
    assert found == status
    assert headers["content-type"] == "application/json"
    assert "aiohttp" not in headers.get("server", "")
    assert body["error_type"] == "validation"
    message = body["error"]["message"] if path.startswith("/v1/") else body["error"]
    assert message.startswith("Input validation error: ")
    assert reason in message


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("pieces", [(b'5\r\n{"inp\r\n', b"zz\r\n"), (b"zz\r\n",), (b"3\r\nabcdef\r\n",)])
def test_a_chunk_that_is_none_is_answered_at_once(serving, path, pieces):
    async def run():
        async with serving() as served:
            answer = await exchange(served, CHUNKED % path.encode(), *pieces)
            check_refusal(answer, 400, "not valid HTTP", path)
            assert answer[1]["connection"] == "close"
            assert served.counts()['tgi_request_failure{err="validation"}'] == 1
            assert served.counts()["tgi_request_running"] == 0
            assert served.context.permits.num_taken == 0

    asyncio.run(run())


def test_a_body_that_breaks_after_its_answer_makes_no_noise(serving, caplog):
    async def run():
        async with serving(payload_limit=100) as served:
            answer = await exchange(served, CHUNKED % b"/generate", b"%x\r\n%s\r\n" % (200, b" " * 200), b"zz\r\n")
            check_refusal(answer, 413, "at most 100 bytes")

    caplog.set_level(logging.INFO)
    asyncio.run(run())
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_whole_requests_behind_each_other_are_all_answered(serving, until):
    async def run():
        body = b'{"inputs": "a"}'
        request = HEAD % b"/generate" + b"Content-Length: %d\r\n\r\n" % len(body) + body
        async with serving() as served:
            reader, writer = await asyncio.open_connection("127.0.0.1", int(served.url.rsplit(":", 1)[1]))
            for number in range(1, 4):
                writer.write(request * number)
                for _ in range(number):
                    assert (await reader.readuntil(b"}")).startswith(b"HTTP/1.1 200 OK")
            writer.write(request)
            await until(lambda: len(served.engine.log) == 7)
            writer.write(b"no HTTP\r\n\r\n")
            assert (await reader.readuntil(b"}")).startswith(b"HTTP/1.1 200 OK")
            assert (await reader.read()).startswith(b"HTTP/1.0 400 ")
            writer.close()

    asyncio.run(run())


@pytest.mark.parametrize("path", ROUTES)
def test_a_body_that_does_not_come_is_408(serving, monkeypatch, path, until):
    monkeypatch.setattr("text_generation_router.api.body.BODY_TIMEOUT_S", 0.1)

    async def run():
        async with serving() as served:
            reader, writer = await asyncio.open_connection("127.0.0.1", int(served.url.rsplit(":", 1)[1]))
            writer.write(HEAD % path.encode() + b'Content-Length: 1000\r\n\r\n{"inputs": "Hel')
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            assert head.startswith("http/1.1 408 ")
            assert "\r\nconnection: close\r\n" in head
            body = json.loads(await reader.readuntil(b"}" if not path.startswith("/v1/") else b'n"}'))
            assert body["error_type"] == "validation"
            assert served.counts()['tgi_request_failure{err="validation"}'] == 1
            writer.close()

    asyncio.run(run())


NO_HTTP = [
    (b"FOO BAR\r\n\r\n", "Invalid method"),
    (b"BREW / HTTP/1.1\r\nHost: a\r\n\r\n", "Invalid method"),
    (b"\x16\x03\x01\x02\x00\x01\x00", "HTTPS"),
    (b"GET / HTTP/9.9\r\nHost: a\r\n\r\n", "status line"),
    (b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", "8190 bytes"),
    (b"GET http://[::1/ HTTP/1.1\r\nHost: a\r\n\r\n", "bad URL"),
    (b"GET / HTTP/1.1\r\n\r\n", "Host"),
    (HEAD % b"/generate" + b"X: " + b"a" * 20_000 + b"\r\n\r\n", "8190 bytes"),
    (HEAD % b"/generate" + b"X: a\r\n" * 300 + b"\r\n", "Too many headers"),
    (HEAD % b"/generate" + b"Content-Length: -4\r\n\r\n", "Content-Length"),
    (HEAD % b"/generate" + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n", "Transfer-Encoding"),
]


@pytest.mark.parametrize(("content", "reason"), NO_HTTP, ids=[reason for _, reason in NO_HTTP])
def test_what_is_no_http_is_refused_in_our_error_body(serving, caplog, content, reason):
    async def run():
        async with serving(api_key="k") as served:
            check_refusal(await exchange(served, content), 400, reason)

    asyncio.run(run())
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_refusals_on_the_metrics_port(serving):
    async def run():
        async with serving() as served:
            for method, path, status, kind in (
                ("GET", "/generate", 404, "not_found"),
                ("POST", "/metrics", 405, "method_not_allowed"),
            ):
                async with served.client.request(method, served.metrics_url + path) as response:
                    assert response.status == status
                    assert (await response.json())["error_type"] == kind
                    assert "Server" not in response.headers

    asyncio.run(run())


def wide_engine(make_engine, is_hanging):
    """An engine whose answers are far larger than what sockets hold."""

    class WideEngine(make_engine):
        async def _answer(self, request, stream):
            stream.write([TokenOutput(1, -0.5, "x" * 100_000, False) for _ in range(100)])
            await super()._answer(request, stream)

    return WideEngine(is_hanging=is_hanging)


@pytest.mark.parametrize(
    ("path", "is_hanging"), [("/generate_stream", True), ("/generate_stream", False), ("/", False)]
)
def test_a_client_that_stops_reading_is_given_up(serving, make_engine, monkeypatch, path, is_hanging, until):
    monkeypatch.setattr(connection_module, "WRITE_STALL_S", 0.1)

    async def run():
        async with serving(wide_engine(make_engine, is_hanging)) as served:
            with socket.socket() as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                client.setblocking(False)
                address = "127.0.0.1", int(served.url.rsplit(":", 1)[1])
                loop = asyncio.get_running_loop()
                await loop.sock_connect(client, address)
                body = b'{"inputs": "a"}'
                await loop.sock_sendall(client, HEAD % path.encode() + b"Content-Length: 15\r\n\r\n" + body)
                await until(lambda: served.engine.log)
                num_connections = len(served.server._runners[0].server.connections)
                assert num_connections == 1
                await until(lambda: not served.server._runners[0].server.connections)
            assert served.context.permits.num_taken == 0
            counts = served.counts()
            assert counts["tgi_request_running"] == 0
            assert counts['tgi_request_failure{err="dropped"}'] == (path == "/generate_stream")

    asyncio.run(run())


class SlowTransport(asyncio.Transport):
    """Says how much is left to send, from a list."""

    def __init__(self, sizes):
        super().__init__()
        self.sizes = sizes
        self.num_aborts = 0

    def get_write_buffer_size(self):
        return self.sizes.pop(0)

    def abort(self):
        self.num_aborts += 1


def test_a_client_that_reads_slowly_is_not_given_up(serving, monkeypatch, until):
    monkeypatch.setattr(connection_module, "WRITE_STALL_S", 0.005)

    async def run():
        async with serving() as served:
            connection = Connection(served.server._runners[0].server, served.context.metrics.requests)
            # One size when the watch begins, one at each look, and one more when the watch goes on.
            connection.transport = transport = SlowTransport([100, 99, 99, 50, 50, 50])
            connection.pause_writing()
            await until(lambda: not transport.sizes)
            assert transport.num_aborts == 1
            connection.resume_writing()
            transport.sizes = [100, 100]
            connection.pause_writing()
            connection.resume_writing()
            await asyncio.sleep(0.05)
            assert transport.num_aborts == 1
            assert transport.sizes == [100]

    asyncio.run(run())
