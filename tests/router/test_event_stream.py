"""Streams: comments in silence, and errors before and after the status is sent."""

import asyncio
import json

import pytest
from text_generation_router.api.event_stream import EventStream
from text_generation_router.errors import GenerationError


def test_keep_alive_comment_after_silence(serving, make_engine, monkeypatch):
    monkeypatch.setattr("text_generation_router.api.event_stream.KEEP_ALIVE_S", 0.02)

    async def run():
        async with serving(make_engine(answer="a", is_hanging=True)) as served:
            async with served.client.post("/generate_stream", json={"inputs": "a"}) as response:
                content = b""
                while b"\n\n:\n\n" not in content:
                    content += await response.content.readany()
            assert content.startswith(b"data: ")

    asyncio.run(run())


class BlockedResponse:
    """A client that reads only while it is told to."""

    prepared = True

    def __init__(self):
        self.written = []
        self.reads = asyncio.Event()

    async def write(self, content):
        self.written.append(content)
        await self.reads.wait()

    async def write_eof(self):
        pass


def test_a_client_that_does_not_read_gets_one_comment_at_most(until, monkeypatch):
    monkeypatch.setattr("text_generation_router.api.event_stream.KEEP_ALIVE_S", 0.005)

    async def run():
        response = BlockedResponse()
        async with EventStream(None, {}) as events:
            events.response = response
            writing = asyncio.create_task(events.send(b"data"))
            await asyncio.sleep(0.05)
            assert response.written == [b"data"]
            response.reads.set()
            await writing
            await until(lambda: response.written[1:] == [b":\n\n"] * 3)
            response.reads.clear()
            num_written = len(response.written)
            await asyncio.sleep(0.05)
            assert len(response.written) == num_written + 1
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(run())


@pytest.mark.parametrize("is_started", [False, True])
def test_a_refusal_by_the_engine(serving, monkeypatch, is_started):
    """It has its own status until the stream has started, then it is an event, and the stream still ends well."""
    if is_started:
        monkeypatch.setattr("text_generation_router.api.event_stream.KEEP_ALIVE_S", 0.005)

    async def run():
        async with serving() as served:
            served.engine.end_all()
            is_commented = asyncio.Event()
            encode = served.context.tokenizer.encode

            async def wait_and_encode(*arguments):
                if is_started:
                    await is_commented.wait()
                return await encode(*arguments)

            served.context.tokenizer.encode = wait_and_encode
            async with served.client.post("/generate_stream", json={"inputs": "a"}) as response:
                if is_started:
                    assert await response.content.readuntil(b"\n\n") == b":\n\n"
                    is_commented.set()
                content = await response.read()
                assert response.status == (200 if is_started else 503)
            answer = json.loads(content.removeprefix(b"data: "))
            assert answer["error_type"] == "overloaded"
            assert served.counts()['tgi_request_failure{err="overloaded"}'] == 1
            assert served.context.permits.num_taken == 0

    asyncio.run(run())


def test_a_bug_after_the_status_is_sent_ends_the_connection(serving, make_engine, monkeypatch):
    """A second answer would be read as a part of the first."""

    def broken(*_):
        raise KeyError("secret")

    monkeypatch.setattr("text_generation_router.api.event_stream.error_event", broken)

    async def run():
        async with serving(make_engine(error=GenerationError("step failed"))) as served:
            reader, writer = await asyncio.open_connection("127.0.0.1", int(served.url.rsplit(":", 1)[1]))
            writer.write(b'POST /generate_stream HTTP/1.1\r\nHost: a\r\nContent-Length: 15\r\n\r\n{"inputs": "a"}')
            content = await reader.read()
            assert content.startswith(b"HTTP/1.1 200 OK\r\n")
            assert content.count(b"HTTP/1.1") == 1
            assert not content.endswith(b"0\r\n\r\n")
            assert b"secret" not in content
            writer.close()
            assert served.context.permits.num_taken == 0

    asyncio.run(run())
