"""OpenAI's dialect: the real `openai` client, raw events, and a table of bad input."""

import asyncio
import typing

import openai
import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_completion_create_params
from text_generation_router.errors import GenerationError
from text_generation_router.valid_request import LogitsChanges

END_TOKEN_ID = 299
USER = [{"role": "user", "content": "Hello"}]
PROMPT = "user:Hello\nassistant:"
NUM_PROMPT_TOKENS = len(PROMPT)


def test_chat_with_the_real_client(serving, client_of):
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
            assert answer.usage.recomputed_tokens == 3
            assert answer.model == "org/model"
            assert answer.system_fingerprint == "4.0.0-native"
            request = served.engine.log[0]
            # The template writes the special tokens, so no BOS.
            assert bytes(request.token_ids).decode() == PROMPT
            assert request.sampling.temperature == 0
            assert not request.keep_stop_string

    asyncio.run(run())


@pytest.mark.parametrize("tokens_at_once", [1, 3, 7])
def test_chat_stream_with_the_real_client(serving, make_engine, tokens_at_once, client_of):
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
            # Clients that fold a stream join its strings.
            assert "".join(chunk.choices[0].delta.role for chunk in tokens) == "assistant"
            assert [chunk.choices[0].finish_reason for chunk in tokens] == [None] * 5 + ["length"]
            assert usage.choices == []
            assert usage.usage.completion_tokens == 6
            assert len({chunk.id for chunk in chunks}) == 1
            assert {chunk.model for chunk in chunks} == {"other"}

    asyncio.run(run())


def test_chat_stream_events(serving, openai_events_of):
    async def run():
        async with serving() as served:
            body = {"messages": USER, "stream": True, "model": None}
            async with served.client.post("/v1/chat/completions", json=body) as response:
                events = await openai_events_of(response)
            assert len(events) == 7
            for number, event in enumerate(events):
                assert event["object"] == "chat.completion.chunk"
                assert event["usage"] is None
                assert event["choices"][0]["logprobs"] is None
                assert event["choices"][0]["delta"]["role"] == ("" if number else "assistant")
            # The last token is special: no text, but the finish reason.
            assert events[-1]["choices"][0]["delta"]["content"] == ""
            assert events[-1]["choices"][0]["finish_reason"] == "stop"

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


def test_what_changes_the_logits_reaches_the_engine(serving):
    """Greedy requests too."""
    fields = {
        "repetition_penalty": 1e-9,
        "frequency_penalty": 1.5,
        "presence_penalty": -2,
        "logit_bias": {"7": 100, "299": -0.5},
        "stop_token_ids": [5, 6],
        "min_tokens": 3,
        "max_tokens": 9,
    }
    neutral = {
        "frequency_penalty": 0,
        "logit_bias": {},
        "min_tokens": 0,
        "stop_token_ids": None,
        "repetition_penalty": 1,
    }

    async def run():
        async with serving() as served:
            for path, body in (("completions", {"prompt": "a"}), ("chat/completions", {"messages": USER})):
                for temperature in (0, 1):
                    given = body | fields | {"temperature": temperature}
                    async with served.client.post(f"/v1/{path}", json=given) as response:
                        assert response.status == 200
                        assert "x-ignored-parameters" not in response.headers
                    request = served.engine.log[-1]
                    assert request.stop_token_ids == {5, 6}
                    assert request.sampling.changes == LogitsChanges(
                        bias_token_ids=(7, 299),
                        bias_values=(100.0, -0.5),
                        repetition_penalty=1e-6,
                        frequency_penalty=1.5,
                        presence_penalty=-2.0,
                        banned_token_ids=(5, 6, END_TOKEN_ID),
                        min_tokens=3,
                    )
                async with served.client.post(f"/v1/{path}", json=body | neutral) as response:
                    assert response.status == 200
                assert served.engine.log[-1].sampling.changes is None
                given = body | {"min_tokens": 4, "ignore_eos": True}
                async with served.client.post(f"/v1/{path}", json=given) as response:
                    assert response.status == 200
                assert served.engine.log[-1].sampling.changes is None

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
    ({"messages": None}, "messages", "`messages` is missing"),
    ({"messages": "hi"}, "messages", "`messages` must be a list"),
    ({"messages": ["hi"]}, "messages", "`messages` must be an object"),
    ({"messages": [{"content": "a"}]}, "messages.role", "`role` is missing"),
    ({"messages": [{"role": "user"}]}, "messages.content", "`content` is missing"),
    ({"messages": [{"role": "user", "content": 1}]}, "messages.content", "`content` must be a string or a list"),
    ({"messages": [{"role": "user", "content": [7]}]}, "messages.content", "`content` must be an object"),
    ({"messages": [{"role": "user", "content": [{"text": "a"}]}]}, "messages.content.type", "`type` is missing"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.content.text", "`text` is missing"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]},
        "messages",
        "`content` parts other than text are not supported",
    ),
    ({"temperature": -1}, "temperature", "`temperature` must be strictly positive"),
    ({"top_p": 1.5}, "top_p", "`top_p` must be > 0.0"),
    ({"presence_penalty": 3}, "presence_penalty", "`presence_penalty` must be >= -2.0"),
    ({"frequency_penalty": -2.5}, "frequency_penalty", "`frequency_penalty` must be >= -2.0"),
    ({"logit_bias": []}, "logit_bias", "`logit_bias` must be an object"),
    ({"logit_bias": {"x": 1}}, "logit_bias", "`logit_bias` names must be token ids"),
    ({"logit_bias": {"-1": 1}}, "logit_bias", "`logit_bias` names must be token ids"),
    ({"logit_bias": {"1" * 5000: 1}}, "logit_bias", "`logit_bias` names must be token ids"),
    ({"logit_bias": {"5": "1"}}, "logit_bias", "`logit_bias` values must be numbers"),
    ({"logit_bias": {"5": 101}}, "logit_bias", "`logit_bias` values must be >= -100.0 and <= 100.0"),
    ({"logit_bias": {"300": 1}}, "logit_bias", "`logit_bias` must hold token ids >= 0 and < 300"),
    ({"logit_bias": {str(n): 1 for n in range(513)}}, "logit_bias", "`logit_bias` may name at most 512 tokens"),
    ({"stop_token_ids": 7}, "stop_token_ids", "`stop_token_ids` must be a list"),
    ({"stop_token_ids": [True]}, "stop_token_ids", "`stop_token_ids` must be a list of integers"),
    ({"stop_token_ids": [300]}, "stop_token_ids", "`stop_token_ids` must hold token ids >= 0 and < 300"),
    ({"stop_token_ids": [1] * 65}, "stop_token_ids", "`stop_token_ids` may hold at most 64 items"),
    ({"min_tokens": -1}, "min_tokens", "`min_tokens` must be >= 0"),
    ({"min_tokens": 3, "max_tokens": 2}, "min_tokens", "`min_tokens` must be <= `max_tokens`"),
    (
        {"min_tokens": 3, "response_format": {"type": "json_object"}},
        "response_format",
        "`response_format` and `min_tokens` exclude",
    ),
    ({"n": 0}, "n", "`n` must be >= 1"),
    ({"n": 10**9}, "n", "`n` must be >= 1"),
    ({"min_p": 1.5}, "min_p", "`min_p` must be >= 0.0 and <= 1.0"),
    ({"top_logprobs": 2}, "top_logprobs", "`top_logprobs` needs `logprobs`"),
    ({"logprobs": True, "top_logprobs": 6}, "top_logprobs", "`top_logprobs` must be >= 0 and <= 5"),
    ({"logprobs": 1}, "logprobs", "`logprobs` must be a boolean"),
    ({"response_format": {"type": "regex", "value": "refused"}}, "response_format", "`response_format` cannot be used"),
    ({"response_format": {"type": "json_schema"}}, "response_format.value", "`value` must be an object"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
        "response_format.json_schema.schema",
        "`schema` is missing",
    ),
    (
        {"response_format": {"type": "json_object"}, "ignore_eos": True},
        "response_format",
        "`response_format` and `ignore_eos` exclude",
    ),
    ({"tools": [{"type": "function"}]}, "tools.function", "`function` is missing"),
    ({"tool_choice": "required"}, "tool_choice", "`tool_choice` is `required`, but there are no"),
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


def test_errors_keep_their_status_before_the_first_token(serving, make_engine, client_of):
    async def run():
        async with serving(make_engine(answer="")) as served, client_of(served) as client:
            with pytest.raises(openai.UnprocessableEntityError) as raised:
                await client.chat.completions.create(model="m", messages=[{"role": "bad", "content": ""}], stream=True)
            assert raised.value.response.json()["error_type"] == "template_error"
            assert served.counts()['tgi_request_failure{err="template"}'] == 1
            with pytest.raises(openai.BadRequestError):
                await client.post("/completions", cast_to=dict, content=b"{")
        engine = make_engine(error=GenerationError("step failed"))
        engine.submit, submit = lambda *_, **__: _raise(GenerationError("step failed")), engine.submit
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


# A value for each parameter of the client, and whether it is honoured: those that are not are refused by name.
CHAT_PARAMETERS = {
    "audio": ({"voice": "alloy", "format": "mp3"}, False),
    "frequency_penalty": (0.5, True),
    "function_call": ("auto", False),
    "functions": ([{"name": "f"}], False),
    "logit_bias": ({"7": -100}, True),
    "logprobs": (True, True),
    "max_completion_tokens": (3, True),
    "max_tokens": (3, True),
    "metadata": ({"a": "b"}, False),
    "modalities": (["text", "audio"], False),
    "moderation": ({"model": "m"}, False),
    "n": (2, True),
    "parallel_tool_calls": (False, True),
    "prediction": ({"type": "content", "content": "a"}, False),
    "presence_penalty": (0.5, True),
    "prompt_cache_key": ("a", True),
    "prompt_cache_options": ({"a": 1}, False),
    "prompt_cache_retention": ("24h", False),
    "response_format": ({"type": "json_object"}, True),
    "safety_identifier": ("me", True),
    "seed": (5, True),
    "service_tier": ("flex", False),
    "stop": (["x"], True),
    "store": (True, False),
    "stream": (False, True),
    "stream_options": ({"include_usage": True}, True),
    "temperature": (0.5, True),
    "tool_choice": ("none", True),
    "tools": ([{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}], True),
    "top_logprobs": (2, True),
    "top_p": (0.5, True),
    "user": ("me", True),
    "verbosity": ("low", False),
    "web_search_options": ({}, False),
}
COMPLETIONS_PARAMETERS = {
    "best_of": (2, True),
    "echo": (True, True),
    "logprobs": (2, True),
    "suffix": ("a", False),
    **{
        name: CHAT_PARAMETERS[name]
        for name in (
            "frequency_penalty", "logit_bias", "max_tokens", "n", "presence_penalty", "seed", "stop", "stream",
            "stream_options", "temperature", "top_p", "user",
        )
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("route", "parameters", "declared"),
    [
        ("chat", CHAT_PARAMETERS, chat_completion_create_params.CompletionCreateParamsNonStreaming),
        ("text", COMPLETIONS_PARAMETERS, completion_create_params.CompletionCreateParamsNonStreaming),
    ],
)
def test_every_parameter_of_the_client_works_or_is_refused_by_its_name(serving, client_of, route, parameters, declared):
    required = {"chat": {"messages": USER}, "text": {"prompt": "a"}}[route]
    others = {"model", "reasoning_effort", *required}  # the fake template has no such switch
    assert typing.get_type_hints(declared).keys() - others == parameters.keys()

    async def run():
        async with serving() as served, client_of(served) as client:
            create = (client.chat.completions if route == "chat" else client.completions).with_raw_response.create
            for name, (value, is_honoured) in parameters.items():
                extra = {"logprobs": True} if name == "top_logprobs" else {}
                if is_honoured:
                    answer = await create(model="m", **required, **{name: value}, **extra)
                    assert "x-ignored-parameters" not in answer.headers
                    continue
                with pytest.raises(openai.UnprocessableEntityError, match=name) as caught:
                    await create(model="m", **required, **{name: value})
                assert caught.value.param == name

    asyncio.run(run())


def test_the_clients_own_fold_of_a_stream(serving, client_of):
    async def run():
        async with serving() as served, client_of(served) as client:
            async with client.chat.completions.stream(model="m", messages=USER, n=2) as stream:
                answer = await stream.get_final_completion()
            for choice in answer.choices:
                assert (choice.message.role, choice.message.content) == ("assistant", "Hi you")
                assert choice.finish_reason == "stop"

    asyncio.run(run())
