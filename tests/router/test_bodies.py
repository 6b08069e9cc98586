"""Request bodies: malformed, of the wrong shape, too deep, too long."""

import asyncio

import pytest

DEEP = b'{"inputs":' + b"[" * 200 + b"]" * 200 + b"}"
BAD_BODIES = [
    (b"", {}, 400, "the body is not JSON"),
    (b"{", {}, 400, "the body is not JSON"),
    (b'{"inputs": NaN}', {}, 400, "the body is not JSON"),
    (b'{"inputs":"a","parameters":{"temperature":1e999}}', {}, 400, "the body is not JSON"),
    (b'{"inputs":"\xff"}', {}, 400, "the body is not JSON"),
    (b"[" * 5000 + b"]" * 5000, {}, 400, "the body is not JSON"),
    (DEEP, {}, 400, "the body must be nested at most 128 levels"),
    (b"[]", {}, 422, "the body must be a JSON object"),
    (b'"text"', {}, 422, "the body must be a JSON object"),
    (b"{}", {}, 422, "`inputs` is missing"),
    (b'{"inputs":null}', {}, 422, "`inputs` is missing"),
    (b'{"inputs":1}', {}, 422, "`inputs` must be a string"),
    (b'{"inputs":["a"]}', {}, 422, "`inputs` must be a string"),
    (b'{"inputs":""}', {}, 422, "`inputs` cannot be empty"),
    (b'{"inputs":"a","parameters":[]}', {}, 422, "`parameters` must be an object"),
    (b'{"inputs":"a","parameters":{"top_k":1.5}}', {}, 422, "`top_k` must be an integer"),
    (b'{"inputs":"a","parameters":{"top_k":true}}', {}, 422, "`top_k` must be an integer"),
    (b'{"inputs":"a","parameters":{"temperature":"1"}}', {}, 422, "`temperature` must be a number"),
    (b'{"inputs":"a","parameters":{"do_sample":1}}', {}, 422, "`do_sample` must be a boolean"),
    (b'{"inputs":"a","parameters":{"stop":[1]}}', {}, 422, "`stop` must be a string or a list"),
    (b'{"inputs":"a","parameters":{"seed":18446744073709551616}}', {}, 422, "`seed` must be an integer"),
    (b'{"inputs":"a","parameters":{"grammar":"x"}}', {}, 422, "`grammar` must be an object"),
    (b'{"inputs":"a"}', {"Content-Encoding": "gzip"}, 415, "compressed request bodies"),
    (b'{"inputs":"' + b"a" * 3000 + b'"}', {}, 413, "the body must have at most 2500 bytes"),
]


@pytest.mark.parametrize(("content", "headers", "status", "text"), BAD_BODIES)
def test_bad_bodies(serving, content, headers, status, text):
    async def run():
        async with serving(payload_limit=20_000 if len(content) == 10_000 else 2500) as served:
            post = served.client.post("/generate", data=content, headers={"Content-Type": "text/plain"} | headers)
            async with post as response:
                assert response.status == status
                answer = await response.json()
            assert answer["error"].startswith(f"Input validation error: {text}")
            assert answer["error_type"] == "validation"
            async with served.client.post("/generate", json={"inputs": "a"}) as response:
                assert response.status == 200

    asyncio.run(run())


def test_a_body_without_length_is_limited_too(serving):
    async def chunks():
        for _ in range(10):
            yield b" " * 1000

    async def run():
        async with (
            serving(payload_limit=2500) as served,
            served.client.post("/generate", data=chunks()) as response,
        ):
            assert response.status == 413
            assert (await response.json())["error_type"] == "validation"

    asyncio.run(run())
