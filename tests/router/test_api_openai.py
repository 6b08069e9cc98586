"""OpenAI's dialect: the real `openai` client, raw events, and a table of bad input."""

import asyncio
import json

import openai
import pytest
from text_generation_router.errors import GenerationError

USER = [{"role": "user", "content": "Hello"}]
PROMPT = "user:Hello\nassistant:"
NUM_PROMPT_TOKENS = len(PROMPT)


def client_of(served):
    return openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="unused", max_retries=0)


async def events_of(response):
    """Every event of a stream, decoded; the last must be [DONE]."""
    assert response.status == 200
    assert response.headers["Content-Type"] == "text/event-stream"
    blocks = (await response.read()).decode().removesuffix("\n\n").split("\n\n")
    assert all(block.startswith("data: ") for block in blocks)
    assert blocks.pop() == "data: [DONE]"
    return [json.loads(block.removeprefix("data: ")) for block in blocks]


def test_chat_with_the_real_client(serving):
    async def run():
        async with serving() as served, client_of(served) as client:
            answer = await client.chat.completions.create(model="tgi", messages=USER, logprobs=True, temperature=0)
            choice = answer.choices[0]
            assert choice.message.role == "assistant"
            assert choice.message.content == "Hi you"
            assert choice.finish_reason == "stop"
            assert [token.token for token in choice.logprobs.content] == [*"Hi you", "<|end|>"]
            assert [token.logprob for token in choice.logprobs.content] == [-0.5] * 6 + [-0.25]
            assert bytes(choice.logprobs.content[0].bytes) == b"H"
            assert choice.logprobs.content[0].top_logprobs == []
            assert answer.usage.prompt_tokens == NUM_PROMPT_TOKENS
            assert answer.usage.completion_tokens == 7
            assert answer.usage.total_tokens == NUM_PROMPT_TOKENS + 7
            assert answer.usage.prompt_tokens_details.cached_tokens == 2
            assert answer.model == "org/model"
            assert answer.system_fingerprint == "4.0.0-native"
            request = served.engine.log[0]
            # The template writes the special tokens, so no BOS.
            assert bytes(request.token_ids).decode() == PROMPT
            assert request.sampling.temperature == 0
            assert not request.keep_stop_string

    asyncio.run(run())


@pytest.mark.parametrize("tokens_at_once", [1, 3, 7])
def test_chat_stream_with_the_real_client(serving, make_engine, tokens_at_once):
    async def run():
        engine = make_engine()
        engine.tokens_at_once = tokens_at_once
        async with serving(engine) as served, client_of(served) as client:
            options = {"include_usage": True}
            stream = await client.chat.completions.create(
                model="other", messages=USER, stream=True, stream_options=options, max_completion_tokens=6
            )
            chunks = [chunk async for chunk in stream]
            *tokens, usage = chunks
            assert [chunk.choices[0].delta.content for chunk in tokens] == list("Hi you")
            assert all(chunk.choices[0].delta.role == "assistant" for chunk in tokens)
            assert [chunk.choices[0].finish_reason for chunk in tokens] == [None] * 5 + ["length"]
            assert usage.choices == []
            assert usage.usage.completion_tokens == 6
            assert len({chunk.id for chunk in chunks}) == 1
            assert {chunk.model for chunk in chunks} == {"other"}

    asyncio.run(run())


def test_chat_stream_events(serving):
    async def run():
        async with serving() as served:
            body = {"messages": USER, "stream": True, "model": None}
            async with served.client.post("/v1/chat/completions", json=body) as response:
                events = await events_of(response)
            assert len(events) == 7
            for event in events:
                assert event["object"] == "chat.completion.chunk"
                assert event["usage"] is None
                assert event["choices"][0]["logprobs"] is None
                assert event["choices"][0]["delta"]["role"] == "assistant"
            # The last token is special: no text, but the finish reason.
            assert events[-1]["choices"][0]["delta"]["content"] == ""
            assert events[-1]["choices"][0]["finish_reason"] == "stop"

    asyncio.run(run())


def test_completions_with_the_real_client(serving):
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


def test_completions_stream_of_two_prompts(serving):
    async def run():
        async with serving() as served:
            body = {"prompt": ["ab", "c"], "stream": True, "stream_options": {"include_usage": True}}
            async with served.client.post("/v1/completions", json=body) as response:
                *events, last = await events_of(response)
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


def test_sampling_is_the_default(serving):
    async def run():
        async with serving() as served:
            for options, temperature in (
                ({}, 1.0),
                ({"temperature": None}, 1.0),
                ({"temperature": 1}, 1.0),
                ({"temperature": 0.5, "top_p": 1, "top_k": -1, "n": 1, "user": "me"}, 0.5),
                ({"temperature": 0}, 0.0),
                ({"temperature": 0, "top_p": 0.5, "top_k": 3}, 0.0),
            ):
                for path, body in (("completions", {"prompt": "a"}), ("chat/completions", {"messages": USER})):
                    async with served.client.post(f"/v1/{path}", json=body | options) as response:
                        assert response.status == 200
                        assert "x-ignored-parameters" not in response.headers
                    assert served.engine.log[-1].sampling.temperature == temperature

    asyncio.run(run())


def test_messages(serving):
    parts = [{"type": "text", "text": "He"}, {"type": "text", "text": "llo"}]

    async def run():
        async with serving() as served:
            body = {"messages": [{"role": "user", "content": parts, "extra": 1}], "tools": [], "tool_choice": "auto"}
            async with served.client.post("/v1/chat/completions", json=body) as response:
                assert response.status == 200
                assert response.headers["x-ignored-parameters"] == "messages.extra"
            assert bytes(served.engine.log[0].token_ids).decode() == PROMPT
            tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
            body = {"messages": USER, "tools": tools, "tool_choice": "none", "response_format": {"type": "text"}}
            async with served.client.post("/v1/chat/completions", json=body) as response:
                assert response.status == 200

    asyncio.run(run())


CHAT_ERRORS = [
    ({"messages": []}, "messages", "`messages` must be a list of at least one message"),
    ({"messages": None}, "messages", "`messages` must be a list of at least one message"),
    ({"messages": "hi"}, "messages", "`messages` must be a list"),
    ({"messages": ["hi"]}, "messages", "`messages` must be an object"),
    ({"messages": [{"content": "a"}]}, "messages.role", "`role` is missing"),
    ({"messages": [{"role": "user"}]}, "messages.content", "`content` is missing"),
    ({"messages": [{"role": "user", "content": 1}]}, "messages.content", "`content` must be a string or a list"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]},
        "messages",
        "`content` parts other than text are not supported",
    ),
    ({"temperature": -1}, "temperature", "`temperature` must be strictly positive"),
    ({"top_p": 1.5}, "top_p", "`top_p` must be > 0.0"),
    ({"presence_penalty": 3}, "presence_penalty", "`presence_penalty` must be >= -2.0"),
    ({"presence_penalty": 1}, "presence_penalty", "`presence_penalty` is not supported"),
    ({"frequency_penalty": 1}, "frequency_penalty", "`frequency_penalty` is not supported"),
    ({"logit_bias": {"5": 1}}, "logit_bias", "`logit_bias` is not supported"),
    ({"logit_bias": []}, "logit_bias", "`logit_bias` must be an object"),
    ({"n": 2}, "n", "`n` is not supported"),
    ({"n": 0}, "n", "`n` must be >= 1"),
    ({"n": 10**9}, "n", "`n` must be >= 1"),
    ({"min_p": 0.5}, "min_p", "`min_p` is not supported"),
    ({"logprobs": True, "top_logprobs": 2}, "top_logprobs", "`top_logprobs` is not supported"),
    ({"top_logprobs": 6}, "top_logprobs", "`top_logprobs` must be >= 0 and <= 5"),
    ({"logprobs": 1}, "logprobs", "`logprobs` must be a boolean"),
    ({"response_format": {"type": "json_object"}}, "response_format", "`response_format` is not supported"),
    ({"tools": [{"type": "function"}]}, "tools", "`tools` is not supported"),
    ({"tool_choice": "required"}, "tool_choice", "`tool_choice` is not supported"),
    ({"max_tokens": 0}, "max_tokens", "`max_new_tokens` must be strictly positive"),
    ({"max_tokens": 90}, "max_tokens", "`inputs` tokens + `max_new_tokens` must be <= 100. Given: 21"),
    ({"max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens", "`max_completion_tokens` and"),
    ({"stop": ["a"] * 5}, "stop", "`stop` takes at most 4"),
    ({"stream": "yes"}, "stream", "`stream` must be a boolean"),
    ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage", "`include_usage` must be a boolean"),
    ({"model": "m" * 1000}, "model", "`model` must have at most 256"),
]


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize(("fields", "param", "text"), CHAT_ERRORS)
def test_chat_errors(serving, fields, param, text, is_stream):
    async def run():
        async with serving() as served:
            body = {"messages": USER, "stream": is_stream} | fields
            async with served.client.post("/v1/chat/completions", json=body) as response:
                assert response.status == 422
                answer = await response.json()
            assert answer["error_type"] == "validation"
            assert answer["error"]["param"] == param
            assert set(answer["error"]) == {"message", "type", "param", "code"}
            assert answer["error"]["message"].startswith(f"Input validation error: {text}")
            assert served.engine.log == []
            assert served.context.permits.num_taken == 0

    asyncio.run(run())


COMPLETIONS_ERRORS = [
    ({"prompt": None}, "prompt", "validation", "`prompt` must be a string, a list"),
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
    ({"echo": True}, "echo", "validation", "`echo` is not supported"),
    ({"logprobs": 1}, "logprobs", "validation", "`logprobs` is not supported"),
    ({"best_of": 2}, "best_of", "validation", "`best_of` is not supported"),
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


def test_errors_keep_their_status_before_the_first_token(serving, make_engine):
    async def run():
        async with serving(make_engine(answer="")) as served, client_of(served) as client:
            with pytest.raises(openai.UnprocessableEntityError) as raised:
                await client.chat.completions.create(model="m", messages=[{"role": "bad", "content": ""}], stream=True)
            assert raised.value.response.json()["error_type"] == "template_error"
            assert served.counts()['tgi_request_failure{err="template"}'] == 1
            with pytest.raises(openai.BadRequestError):
                await client.post("/completions", cast_to=dict, content=b"{")
        engine = make_engine(error=GenerationError("step failed"))
        engine.submit, submit = lambda *_: _raise(GenerationError("step failed")), engine.submit
        async with serving(engine) as served, client_of(served) as client:
            with pytest.raises(openai.APIStatusError) as raised:
                await client.chat.completions.create(model="m", messages=USER, stream=True)
            assert raised.value.status_code == 424
            engine.submit = submit
            stream = await client.completions.create(model="m", prompt="a", stream=True)
            texts = []
            with pytest.raises(openai.APIError, match="step failed") as raised:  # noqa: PT012
                async for chunk in stream:
                    texts.append(chunk.choices[0].text)
            assert "".join(texts) == "Hi you"
            assert raised.value.body["http_status_code"] == 424

    asyncio.run(run())


def _raise(error):
    raise error


def test_one_failing_prompt_ends_the_whole_answer(serving, make_engine):
    async def run():
        engine = make_engine(answer="abc")
        submit = engine.submit

        def submit_with_one_failing(request, timings):
            stream = submit(request, timings)
            if len(engine.log) == 2:
                stream.fail(GenerationError("row failed"))
            return stream

        engine.submit = submit_with_one_failing
        async with serving(engine) as served:
            async with served.client.post("/v1/completions", json={"prompt": ["a", "b", "c"]}) as response:
                assert response.status == 424
            counts = served.counts()
            assert counts["tgi_request_count"] == 3
            assert counts['tgi_request_failure{err="generation"}'] + counts["tgi_request_success"] == 3
            assert counts["tgi_request_running"] == 0
            assert served.context.permits.num_taken == 0

    asyncio.run(run())
