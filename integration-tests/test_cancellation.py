"""Clients that leave in the middle of their stream, and more clients than the server takes."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
from aiohttp import web

if TYPE_CHECKING:
    from conftest import Server

NUM_STREAMS = 200
NUM_TOKENS = 100


@contextlib.asynccontextmanager
async def proxy(server: Server) -> AsyncIterator[str]:
    """A reverse proxy, whose address this is; it keeps its own connections to the server for later requests."""
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(server.url, connector=connector) as upstream:

        async def forward(request: web.Request) -> web.StreamResponse:
            async with upstream.post(request.path, data=await request.read()) as answer:
                response = web.StreamResponse(status=answer.status)
                await response.prepare(request)
                async for piece in answer.content.iter_any():
                    await response.write(piece)
            return response

        app = web.Application()
        app.router.add_post("/{path}", forward)
        runner = web.AppRunner(app, handler_cancellation=True)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        try:
            host, port = runner.addresses[0][:2]
            yield f"http://{host}:{port}"
        finally:
            await runner.cleanup()


async def read_stream(session: aiohttp.ClientSession, url: str, number: int, leave_after: int | None) -> int:
    """Read a stream's events to the end, or leave after some; returns how many were read."""
    parameters = {"max_new_tokens": NUM_TOKENS, "ignore_eos": True}
    body = {"inputs": f"Stream number {number}", "parameters": parameters}
    num_events = 0
    async with session.post(f"{url}/generate_stream", json=body) as response:
        assert response.status == 200
        async for line in response.content:
            if num_events == leave_after:
                break
            num_events += line.startswith(b"data: ")
    return num_events


async def run_streams(server: Server, leave_after: list[int | None], is_proxied: bool) -> list[int]:
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    place = proxy(server) if is_proxied else contextlib.nullcontext(server.url)
    async with place as url, aiohttp.ClientSession(connector=connector) as session:
        streams = [read_stream(session, url, number, after) for number, after in enumerate(leave_after)]
        return await asyncio.gather(*streams)


def counters(server: Server) -> dict[str, float]:
    names = ("tgi_request_count", "tgi_request_success")
    labels = ("overloaded", "validation", "template", "generation", "incomplete", "dropped")
    counts = {name: server.metric(name) for name in names}
    return counts | {label: server.metric("tgi_request_failure", label) for label in labels}


@pytest.mark.parametrize("is_proxied", [False, True])
def test_half_of_the_clients_leave(tiny: Server, is_proxied: bool) -> None:
    choices = random.Random(0)
    leave_after = [choices.randrange(1, NUM_TOKENS // 2) if number % 2 else None for number in range(NUM_STREAMS)]
    before = counters(tiny)
    num_events = asyncio.run(run_streams(tiny, leave_after, is_proxied))
    assert num_events == [NUM_TOKENS if after is None else after for after in leave_after]
    tiny.check_books()
    moved = {name: value - before[name] for name, value in counters(tiny).items()}
    assert moved.pop("tgi_request_count") == NUM_STREAMS == sum(moved.values())
    # A client's leaving may cross with the last tokens of its stream.
    assert moved["tgi_request_success"] >= NUM_STREAMS / 2
    assert moved["dropped"] > 0
    assert moved["tgi_request_success"] + moved["dropped"] == NUM_STREAMS
    assert tiny.generate("Hello", max_new_tokens=3)["generated_text"]


def test_a_client_that_waits_for_a_whole_answer_leaves(tiny: Server) -> None:
    """Nothing is written to this client before the end, so only its closed connection tells."""

    async def leave_early() -> None:
        body = {"inputs": "Hello", "parameters": {"max_new_tokens": 8000, "ignore_eos": True}}
        async with aiohttp.ClientSession() as session:
            answer = asyncio.create_task(session.post(f"{tiny.url}/generate", json=body))
            while not await _metric(session, tiny, "tgi_batch_current_size"):
                assert not answer.done()
            answer.cancel()
            await asyncio.gather(answer, return_exceptions=True)

    steps = tiny.metric("tgi_batch_inference_count", "decode")
    asyncio.run(leave_early())
    tiny.check_books()
    assert tiny.metric("tgi_batch_inference_count", "decode") - steps < 7000


async def _metric(session: aiohttp.ClientSession, server: Server, name: str) -> float:
    async with session.get(f"{server.url}/metrics") as response:
        (line,) = (line for line in (await response.text()).splitlines() if line.startswith(f"{name} "))
    return float(line.split()[1])


def test_too_many_clients(serve: Any, tiny_model: Any) -> None:
    flags = ["--model-id", str(tiny_model), "--max-concurrent-requests", "1"]
    body = {"inputs": "Hello", "parameters": {"max_new_tokens": 8000, "ignore_eos": True}}
    short = {"inputs": "Hello", "parameters": {"max_new_tokens": 1}}
    with serve(*flags) as server:
        with server.stream("/generate_stream", body) as running:
            assert next(running).startswith("data: ")
            for path, rendered in (
                ("/generate", short),
                ("/generate_stream", short),
                ("/v1/completions", {"prompt": "a"}),
            ):
                reply = server.post(path, rendered)
                assert reply.status == 429, path
                assert reply.json()["error_type"] == "overloaded"
                assert int(reply.headers["retry-after"]) >= 1
            assert server.get("/health").status == 200
        server.check_books()
        assert server.post("/generate", short).status == 200
        assert server.metric("tgi_request_failure", "overloaded") == 3
