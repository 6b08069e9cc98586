"""OpenAI's completions: several prompts in one request, and a table of bad input."""

import asyncio
import logging

import pytest
from text_generation_router.errors import GenerationError


def test_completions_with_the_real_client(serving, client_of):
    async def run():
        async with serving() as served, client_of(served) as client:
            for prompt, token_ids in (
                ("ab", [[1, 97, 98]]),
                (["ab", "c"], [[1, 97, 98], [1, 99]]),
                ([5, 6], [[5, 6]]),
                ([[5, 6], [7]], [[5, 6], [7]]),
            ):
                served.engine.log.clear()
                answer = await client.completions.create(model="x", prompt=prompt)
                assert answer.model == "org/model"
                assert [request.token_ids for request in served.engine.log] == token_ids
                assert [choice.index for choice in answer.choices] == list(range(len(token_ids)))
                assert {(choice.text, choice.finish_reason) for choice in answer.choices} == {("Hi you", "stop")}
                assert answer.usage.prompt_tokens == sum(map(len, token_ids))
                assert answer.usage.completion_tokens == 7 * len(token_ids)

    asyncio.run(run())


def test_completions_stream_of_two_prompts(serving, openai_events_of):
    async def run():
        async with serving() as served:
            body = {"prompt": ["ab", "c"], "stream": True, "stream_options": {"include_usage": True}}
            async with served.client.post("/v1/completions", json=body) as response:
                *events, last = await openai_events_of(response)
            assert last["choices"] == []
            assert last["usage"]["total_tokens"] == 3 + 2 + 14
            assert [event["choices"][0]["index"] for event in events] != [0] * 7 + [1] * 7  # interleaved
            for index, num_prompt_tokens in ((0, 3), (1, 2)):
                mine = [event for event in events if event["choices"][0]["index"] == index]
                assert "".join(event["choices"][0]["text"] for event in mine) == "Hi you"
                assert [event["choices"][0]["finish_reason"] for event in mine] == [None] * 6 + ["stop"]
                assert [event["usage"] for event in mine[:-1]] == [None] * 6
                assert mine[-1]["usage"]["prompt_tokens"] == num_prompt_tokens
                assert mine[-1]["usage"]["completion_tokens"] == 7
            counts = served.counts()
            assert counts["tgi_request_count"] == counts["tgi_request_success"] == 2

    asyncio.run(run())


COMPLETIONS_ERRORS = [
    ({"prompt": None}, "prompt", "validation", "`prompt` is missing"),
    ({"prompt": []}, "prompt", "validation", "`prompt` must be a string, a list"),
    ({"prompt": ["a", 1]}, "prompt", "validation", "`prompt` must be a string, a list"),
    ({"prompt": [1.5]}, "prompt", "validation", "`prompt` must be a string, a list"),
    ({"prompt": [True]}, "prompt", "validation", "`prompt` must be a string, a list"),
    ({"prompt": ""}, "prompt", "validation", "`inputs` cannot be empty"),
    ({"prompt": [[]]}, "prompt", "validation", "`inputs` cannot be empty"),
    ({"prompt": [300]}, "prompt", "validation", "`inputs` must hold token ids >= 0 and < 300"),
    ({"prompt": [-1]}, "prompt", "validation", "`inputs` must hold token ids >= 0 and < 300"),
    ({"prompt": [[1], [2**60]]}, "prompt", "validation", "`inputs` must hold token ids >= 0 and < 300"),
    ({"prompt": [1] * 99}, "prompt", "validation", "`inputs` must have at most 64 tokens. Given: 99"),
    ({"prompt": ["a"] * 5}, "prompt", "batch size exceeded", "`prompt` may hold at most 4 prompts. Given: 5"),
    ({"suffix": "x"}, "suffix", "validation", "`suffix` is not supported"),
    ({"echo": 1}, "echo", "validation", "`echo` must be a boolean"),
    ({"logprobs": 6}, "logprobs", "validation", "`logprobs` must be >= 0 and <= 5"),
    ({"logprobs": True}, "logprobs", "validation", "`logprobs` must be an integer"),
    ({"max_tokens": 0}, "max_tokens", "validation", "`max_new_tokens` must be strictly positive"),
    ({"best_of": 2, "stream": True}, "best_of", "validation", "`best_of` != 1 is not supported when streaming"),
    ({"best_of": 2, "temperature": 0}, "best_of", "validation", "`best_of` > 1 needs sampling"),
    ({"best_of": 1, "n": 2}, "best_of", "validation", "`best_of` must be >= `n`"),
    ({"best_of": 3}, "best_of", "validation", "`best_of` must be >= 1 and <= 2"),
    ({"n": 10**9}, "n", "validation", "`n` must be >= 1 and <= 2"),
]


@pytest.mark.parametrize(("fields", "param", "kind", "text"), COMPLETIONS_ERRORS)
def test_completions_errors(serving, fields, param, kind, text):
    async def run():
        async with serving() as served:
            async with served.client.post("/v1/completions", json={"prompt": "a"} | fields) as response:
                assert response.status == 422
                answer = await response.json()
            assert answer["error_type"] == kind
            assert answer["error"]["param"] == param
            assert text in answer["error"]["message"]
            counts = served.counts()
            assert counts["tgi_request_count"] == counts['tgi_request_failure{err="validation"}']
            assert counts["tgi_request_running"] == 0

    asyncio.run(run())


@pytest.mark.parametrize("is_stream", [False, True])
def test_one_failing_prompt_fails_the_whole_request(serving, make_engine, until, caplog, is_stream):
    """Those that have finished before it count and are logged as failures too."""
    caplog.set_level(logging.INFO)

    async def run():
        engine = make_engine(answer="abc")
        submit = engine.submit
        streams = []

        def submit_with_one_hanging(request, timings, is_further=False):
            streams.append(submit(request, timings))
            if len(streams) == 2:
                streams[1].finish = lambda reason, outputs: None
            return streams[-1]

        engine.submit = submit_with_one_hanging
        async with serving(engine) as served:
            body = {"prompt": ["a", "b", "c"], "stream": is_stream}
            asked = asyncio.create_task(served.client.post("/v1/completions", json=body))
            await until(lambda: len(streams) == 3 and streams[0].is_ended and streams[2].is_ended)
            await asyncio.sleep(0.02)  # their readers have seen it
            streams[1].fail(GenerationError("row failed"))
            async with await asked as response:
                assert response.status == (200 if is_stream else 424)
                assert "row failed" in await response.text()
            counts = served.counts()
            assert counts["tgi_request_count"] == 3
            assert counts['tgi_request_failure{err="generation"}'] == 3
            assert counts["tgi_request_success"] == counts["tgi_request_running"] == 0
            assert served.context.permits.num_taken == 0

    asyncio.run(run())
    assert not [message for message in caplog.messages if message.startswith("Success")]


def test_more_prompts_than_the_server_takes_at_once(serving):
    """Waiting would not help, so this is no overload."""

    async def run():
        async with serving(max_concurrent_requests=2) as served:
            for is_stream in (False, True):
                body = {"prompt": ["a", "b", "c"], "stream": is_stream}
                async with served.client.post("/v1/completions", json=body) as response:
                    assert response.status == 422
                    answer = await response.json()
                assert answer["error_type"] == "batch size exceeded"
                assert "at most 2 prompts. Given: 3" in answer["error"]["message"]
                assert "--max-concurrent-requests" in answer["error"]["message"]
            async with served.client.post("/v1/completions", json={"prompt": ["a", "b"]}) as response:
                assert response.status == 200

    asyncio.run(run())
