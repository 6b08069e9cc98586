"""Draining: what was admitted is served, new requests are refused, what is left ends with an error."""

import asyncio
import json

import aiohttp
import pytest

GENERATE = {"inputs": "abc"}


def hold_encoding(served):
    """Let no prompt be encoded until the event that is returned is set."""
    tokenizer, is_encoded = served.context.tokenizer, asyncio.Event()
    encode = tokenizer.encode

    async def wait_and_encode(*arguments, **options):
        await is_encoded.wait()
        return await encode(*arguments, **options)

    tokenizer.encode = wait_and_encode
    return is_encoded


def test_draining(serving, make_engine, until):
    async def run():
        async with serving(make_engine(answer="ab", is_hanging=True), graceful_termination_timeout_s=0.3) as served:
            streaming = await served.client.post("/generate_stream", json=GENERATE)
            waiting = asyncio.create_task(served.client.post("/v1/completions", json={"prompt": "a"}))
            await until(lambda: len(served.engine.log) == 2)
            stopping = asyncio.create_task(served.server.stop())
            await until(lambda: served.engine.is_draining)
            for path, status in (("/health", 503), ("/health/ready", 503), ("/health/live", 200)):
                async with served.client.get(path) as response:
                    assert response.status == status
            for path in ("/generate", "/generate_stream"):
                async with served.client.post(path, json=GENERATE) as response:
                    assert response.status == 503
                    assert int(response.headers["Retry-After"]) >= 1
                    assert (await response.json())["error_type"] == "overloaded"
            response = await waiting
            assert response.status == 500
            assert (await response.json())["error_type"] == "incomplete_generation"
            last = (await streaming.read()).decode().removesuffix("\n\n").split("\n\n")[-1]
            assert json.loads(last.removeprefix("data: "))["error_type"] == "incomplete_generation_stream"
            await stopping
            with pytest.raises(aiohttp.ClientConnectorError):
                await served.client.get("/health")
            counts = served.counts()
            assert counts['tgi_request_failure{err="incomplete"}'] == 2
            assert counts["tgi_request_running"] == 0

    asyncio.run(run())


def test_draining_lets_requests_finish(serving, make_engine):
    async def run():
        async with serving(make_engine(answer="x" * 60), graceful_termination_timeout_s=30.0) as served:
            streaming = await served.client.post("/generate_stream", json=GENERATE)
            await served.server.stop()
            events = (await streaming.read()).decode().removesuffix("\n\n").split("\n\n")
            assert json.loads(events[-1].removeprefix("data: "))["generated_text"] == "x" * 60
            assert served.counts()["tgi_request_success"] == 1

    asyncio.run(run())


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", GENERATE),
        ("/generate_stream", GENERATE),
        ("/v1/completions", {"prompt": ["a", "b"]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "stream": True}),
    ],
)
def test_a_request_whose_prompt_is_being_encoded_is_served(serving, until, path, body):
    async def run():
        async with serving(graceful_termination_timeout_s=30.0) as served:
            is_encoded = hold_encoding(served)
            asked = asyncio.create_task(served.client.post(path, json=body))
            await until(lambda: served.context.permits.num_taken)
            stopping = asyncio.create_task(served.server.stop())
            await until(lambda: served.engine.is_draining)
            async with served.client.post(path, json=body) as response:
                assert response.status == 503
            assert not stopping.done()
            is_encoded.set()
            async with await asked as response:
                assert response.status == 200
                assert "error" not in (await response.text())
            await stopping
            assert served.counts()["tgi_request_success"] == len(body.get("prompt", "a"))

    asyncio.run(run())


@pytest.mark.parametrize(("path", "status"), [("/generate", 503), ("/generate_stream", 503)])
def test_a_prompt_that_is_encoded_after_the_grace_is_refused(serving, until, path, status):
    async def run():
        async with serving(graceful_termination_timeout_s=0.05) as served:
            is_encoded = hold_encoding(served)
            asked = asyncio.create_task(served.client.post(path, json=GENERATE))
            await until(lambda: served.context.permits.num_taken)
            stopping = asyncio.create_task(served.server.stop())
            await until(lambda: served.engine.is_over)
            is_encoded.set()
            async with await asked as response:
                assert response.status == status
                assert int(response.headers["Retry-After"]) >= 1
                assert (await response.json())["error_type"] == "overloaded"
            await stopping
            assert served.engine.log == []

    asyncio.run(run())


def test_after_a_failure_nobody_is_waited_for(serving, make_engine, until):
    async def run():
        async with serving(make_engine(is_hanging=True), graceful_termination_timeout_s=1000.0) as served:
            asked = asyncio.create_task(served.client.post("/generate", json=GENERATE))
            await until(lambda: served.engine.log)
            await served.server.stop(grace_s=0.0)
            async with await asked as response:
                assert response.status == 500

    asyncio.run(run())
