"""TGI's dialect over a real socket: shapes, headers, streams, and a table of bad input."""

import asyncio
import json

import pytest
from text_generation_router.errors import GenerationError, IncompleteGeneration
from text_generation_router.valid_request import LogitsChanges

GREEDY = {"do_sample": False}
END = {"id": 299, "text": "<|end|>", "logprob": -0.25, "special": True}


def tokens(text):
    return [{"id": ord(c), "text": c, "logprob": -0.5, "special": False} for c in text]


async def events_of(response):
    """Every event of a stream, decoded; the framing is checked byte by byte."""
    assert response.status == 200
    assert response.headers["Content-Type"] == "text/event-stream"
    content = (await response.read()).decode()
    assert content.endswith("\n\n")
    blocks = content[:-2].split("\n\n")
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks)
    return [json.loads(block.removeprefix("data: ")) for block in blocks]


def test_whole_answer_and_headers(serving):
    async def run():
        async with serving() as served:
            body = {"inputs": "abc", "parameters": {"details": True, "decoder_input_details": True}}
            async with served.client.post("/generate", json=body) as response:
                assert response.status == 200
                assert await response.json() == {
                    "generated_text": "Hi you",
                    "details": {
                        "finish_reason": "eos_token",
                        "generated_tokens": 7,
                        "seed": None,
                        "prefill": [],
                        "tokens": [*tokens("Hi you"), END],
                    },
                }
                headers = response.headers
            assert headers["x-prompt-tokens"] == "4"
            assert headers["x-generated-tokens"] == "7"
            assert headers["x-compute-characters"] == "3"
            assert headers["x-compute-type"] == "1-some-gpu-80gb"
            assert float(headers["x-compute-time"]) > 0
            for name in ("total", "validation", "queue", "inference"):
                assert headers[f"x-{name}-time"].isdigit()
            assert headers["x-time-per-token"].isdigit()

    asyncio.run(run())


def test_without_details_there_are_none(serving):
    async def run():
        async with serving() as served:
            async with served.client.post("/generate", json={"inputs": "abc", "parameters": {}}) as response:
                assert await response.json() == {"generated_text": "Hi you"}
            body = {"inputs": "abc", "parameters": {"return_full_text": True, "max_new_tokens": 2}}
            async with served.client.post("/generate", json=body) as response:
                assert await response.json() == {"generated_text": "abcHi"}
            body = {"inputs": "abc", "parameters": {"decoder_input_details": True}}
            async with served.client.post("/generate", json=body) as response:
                assert (await response.json())["details"]["prefill"] == []

    asyncio.run(run())


@pytest.mark.parametrize("tokens_at_once", [1, 2, 7])
def test_stream(serving, make_engine, tokens_at_once):
    async def run():
        engine = make_engine()
        engine.tokens_at_once = tokens_at_once
        async with serving(engine) as served:
            body = {"inputs": "abc", "parameters": {"details": True, "seed": 5, "temperature": 0.5}}
            async with served.client.post("/generate_stream", json=body) as response:
                events = await events_of(response)
                assert response.headers["x-accel-buffering"] == "no"
                assert response.headers["x-compute-characters"] == "3"
            assert [event["token"] for event in events] == [*tokens("Hi you"), END]
            assert [event["index"] for event in events] == list(range(1, 8))
            assert all(event["generated_text"] is None and event["details"] is None for event in events[:-1])
            assert events[-1]["generated_text"] == "Hi you"
            assert events[-1]["details"] == {
                "finish_reason": "eos_token",
                "generated_tokens": 7,
                "seed": 5,
                "input_length": 4,
            }

    asyncio.run(run())


def test_compatible_route(serving):
    async def run():
        async with serving() as served:
            async with served.client.post("/", json={"inputs": "abc"}) as response:
                assert await response.json() == [{"generated_text": "abcHi you"}]
            async with served.client.post("/", json={"inputs": "abc", "stream": True}) as response:
                assert (await events_of(response))[-1]["generated_text"] == "abcHi you"
        async with (
            serving(model_pipeline_tag="conversational") as served,
            served.client.post("/", json={"inputs": "abc", "stream": None}) as response,
        ):
            assert await response.json() == [{"generated_text": "Hi you"}]

    asyncio.run(run())


def test_parameters_reach_the_engine(serving):
    async def run():
        async with serving() as served:
            parameters = {
                "max_new_tokens": 3,
                "temperature": 0.5,
                "top_k": 4,
                "top_p": 0.75,
                "seed": 2**64 - 1,
                "stop": ["x", "yz"],
                "truncate": 2,
                "ignore_eos": True,
                "repetition_penalty": 1.25,
                "frequency_penalty": 0.5,
                "best_of": 1,
                "watermark": True,
                "grammar": None,
            }
            async with served.client.post("/generate", json={"inputs": "abcd", "parameters": parameters}) as response:
                assert response.status == 200
                assert "x-ignored-parameters" not in response.headers
            request = served.engine.log[0]
            assert request.token_ids == [ord("c"), ord("d")]
            assert request.max_new_tokens == 3
            sampling = request.sampling
            assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.5, 4, 0.75)
            assert sampling.seed == 2**64 - 1
            assert request.stop_strings == ("x", "yz")
            assert request.keep_stop_string
            assert request.ignore_eos
            # TGI's frequency penalty is that of the token's share of the whole text.
            assert sampling.changes == LogitsChanges(repetition_penalty=1.25, share_penalty=0.5, has_watermark=True)

    asyncio.run(run())


def test_unknown_fields_are_named(serving):
    async def run():
        async with serving() as served:
            parameters = {"min_tokens": 3, "a\r\nb": 1, "é" * 600: 2, "details": False}
            body = {"inputs": "a", "parameters": parameters, "priority": 1}
            async with served.client.post("/generate", json=body) as response:
                assert response.status == 200
                assert response.headers["x-ignored-parameters"].startswith(
                    "priority,parameters.min_tokens,parameters.ab"
                )
            body["parameters"] = {"x" * 5000: 1}
            async with served.client.post("/generate_stream", json=body) as response:
                assert len(response.headers["x-ignored-parameters"]) <= 512

    asyncio.run(run())


VALIDATION_ERRORS = [
    ("temperature", 0.0, "`temperature` must be strictly positive"),
    ("temperature", -1, "`temperature` must be strictly positive"),
    ("top_p", 0.0, "`top_p` must be > 0.0 and < 1.0"),
    ("top_p", 1.0, "`top_p` must be > 0.0 and < 1.0"),
    ("typical_p", 1.0, "`typical_p` must be > 0.0 and < 1.0"),
    ("top_k", 0, "`top_k` must be strictly positive"),
    ("repetition_penalty", 0.0, "`repetition_penalty` must be strictly positive"),
    ("frequency_penalty", 2.5, "`frequency_penalty` must be >= -2.0 and <= 2.0"),
    ("max_new_tokens", 0, "`max_new_tokens` must be strictly positive"),
    ("max_new_tokens", 97, "`inputs` tokens + `max_new_tokens` must be <= 100. Given: 4 `inputs` tokens and 97"),
    ("best_of", 0, "`best_of` must be >= 1 and <= 2"),
    ("best_of", 3, "`best_of` must be >= 1 and <= 2"),
    ("top_n_tokens", 6, "`top_n_tokens` must be >= 0 and <= 5"),
    ("truncate", 0, "`truncate` must be >= 1 and <= 64"),
    ("truncate", 65, "`truncate` must be >= 1 and <= 64"),
    ("seed", -1, "`seed` must be >= 0"),
    ("stop", ["a"] * 5, "`stop` takes at most 4"),
    ("stop", [""], "`stop` strings must have 1 to"),
    ("grammar", {"type": "regex", "value": "refused"}, "`grammar` cannot be used: it is refused"),
    ("adapter_id", "x", "`adapter_id` is not supported"),
]


@pytest.mark.parametrize(("name", "value", "text"), VALIDATION_ERRORS)
def test_a_value_out_of_range_is_422_or_an_event(serving, name, value, text):
    async def run():
        async with serving() as served:
            body = {"inputs": "abc", "parameters": {name: value}}
            async with served.client.post("/generate", json=body) as response:
                assert response.status == 422
                answer = await response.json()
            assert answer["error_type"] == "validation"
            assert answer["error"].startswith(f"Input validation error: {text}")
            async with served.client.post("/generate_stream", json=body) as response:
                assert await events_of(response) == [answer]
            assert served.engine.log == []
            assert served.counts()['tgi_request_failure{err="validation"}'] == 2

    asyncio.run(run())


def test_a_wrong_shape_keeps_its_status_on_the_stream_route(serving):
    async def run():
        async with serving() as served:
            for content, status in ((b"{", 400), (b'{"inputs":1}', 422)):
                async with served.client.post("/generate_stream", data=content) as response:
                    assert response.status == status

    asyncio.run(run())


def test_an_input_that_is_too_long(serving):
    async def run():
        async with serving() as served:
            cases = (
                ({"max_new_tokens": 1}, 65, "`inputs` must have at most 64 tokens. Given: 65"),
                ({"max_new_tokens": 50}, 65, "`inputs` tokens + `max_new_tokens` must be <= 100. Given: 65"),
                ({}, 65, "`inputs` must have at most 64 tokens. Given: 65"),
                ({}, 200, "`inputs` tokens + `max_new_tokens` must be <= 100. Given: 200 `inputs` tokens and 0"),
            )
            for parameters, num_tokens, text in cases:
                body = {"inputs": "a" * (num_tokens - 1), "parameters": parameters}
                async with served.client.post("/generate", json=body) as response:
                    assert response.status == 422
                    assert (await response.json())["error"].startswith(f"Input validation error: {text}")

    asyncio.run(run())


def test_errors_of_the_engine(serving, make_engine):
    async def run():
        async with serving(make_engine(answer="ab", error=GenerationError("step failed"))) as served:
            async with served.client.post("/generate", json={"inputs": "a"}) as response:
                assert response.status == 424
                answer = await response.json()
            assert answer == {"error": "Request failed during generation: step failed", "error_type": "generation"}
            async with served.client.post("/generate_stream", json={"inputs": "a"}) as response:
                events = await events_of(response)
            assert [event["token"]["text"] for event in events[:-1]] == ["a", "b", "<|end|>"]
            assert events[-1] == answer
        async with serving(make_engine(error=IncompleteGeneration(": gone"))) as served:
            async with served.client.post("/generate", json={"inputs": "a"}) as response:
                assert response.status == 500
                assert (await response.json())["error_type"] == "incomplete_generation"
            async with served.client.post("/generate_stream", json={"inputs": "a"}) as response:
                expected = {"error": "Incomplete generation: gone", "error_type": "incomplete_generation_stream"}
                assert (await events_of(response))[-1] == expected

    asyncio.run(run())


def test_a_bug_shows_no_internals(serving):
    async def run():
        async with serving() as served:
            served.engine.submit = lambda *_: {}["secret"]
            async with served.client.post("/generate", json={"inputs": "a"}) as response:
                assert response.status == 500
                assert await response.json() == {"error": "Internal error", "error_type": "internal_error"}
            assert served.context.permits.num_taken == 0

    asyncio.run(run())
