"""Log-probabilities in the shapes of each dialect, streamed and not; echo of the prompt."""

import asyncio
import math
import threading
from collections import Counter

import openai
import pytest
from text_generation_router.api import completion_text, responses

USER = [{"role": "user", "content": "Hi"}]


def token(text, logprob):
    return {"id": ord(text), "text": text, "logprob": logprob, "special": False}


END_TOP = [
    {"id": 299, "text": "<|end|>", "logprob": -0.25, "special": True},
    {"id": 7, "text": "\x07", "logprob": -1.0, "special": False},
]


def test_top_tokens_of_generate(serving, make_engine):
    """TGI shows every tie of the last token."""
    top = [[token("a", -0.5), token(chr(300), -3.0)], END_TOP]

    async def run():
        async with serving(make_engine(answer="a")) as served:
            body = {"inputs": "x", "parameters": {"details": True, "top_n_tokens": 1}}
            async with served.client.post("/generate", json=body) as response:
                details = (await response.json())["details"]
            assert details["top_tokens"] == top
            assert details["prefill"] == []
            assert served.engine.log[0].sampling.top_n_tokens == 1
            async with served.client.post("/", json=body | {"stream": True}) as response:
                assert b'"top_tokens":[{"id":97,"text":"a","logprob":-0.5,"special":false}' in await response.read()
            body = {"inputs": "x", "parameters": {"details": True}}
            async with served.client.post("/generate", json=body) as response:
                assert "top_tokens" not in (await response.json())["details"]

    asyncio.run(run())


@pytest.mark.parametrize("is_offered", [False, True])
def test_prefill_of_generate(serving, is_offered):
    prefill = [
        {"id": 1, "text": "\x01", "logprob": None},
        {"id": 120, "text": "x", "logprob": -1},
        {"id": 121, "text": "y", "logprob": -2},
    ]

    async def run():
        async with serving(enable_prefill_logprobs=is_offered) as served:
            body = {"inputs": "xy", "parameters": {"decoder_input_details": True}}
            async with served.client.post("/generate", json=body) as response:
                assert (await response.json())["details"]["prefill"] == (prefill if is_offered else [])
            request = served.engine.log[0]
            assert (request.scores_prompt, request.prompt_top_n_tokens) == (is_offered, 0)
            async with served.client.post("/generate_stream", json=body) as response:
                assert b"`decoder_input_details` is not available in a stream" in await response.read()

    asyncio.run(run())


@pytest.mark.parametrize("is_stream", [False, True])
def test_top_logprobs_of_a_chat(serving, make_engine, client_of, is_stream):
    """As many as were asked for, whatever ties with the last."""

    async def run():
        async with serving(make_engine(answer="ab")) as served, client_of(served) as client:
            options = {"model": "m", "messages": USER, "logprobs": True, "top_logprobs": 2}
            if is_stream:
                stream = await client.chat.completions.create(**options, stream=True)
                content = [one for chunk in [c async for c in stream] for one in chunk.choices[0].logprobs.content]
            else:
                content = (await client.chat.completions.create(**options)).choices[0].logprobs.content
            assert [one.token for one in content] == ["a", "b", "<|end|>"]
            first = [(best.token, best.logprob, bytes(best.bytes)) for best in content[0].top_logprobs]
            assert first == [("a", -0.5, b"a"), (chr(300), -3.0, chr(300).encode())]
            assert served.engine.log[0].sampling.top_n_tokens == 2

    asyncio.run(run())


def test_logprobs_of_completions(serving, make_engine, client_of):
    async def run():
        async with serving(make_engine(answer="ab")) as served, client_of(served) as client:
            answer = await client.completions.create(model="m", prompt="x", logprobs=1)
            logprobs = answer.choices[0].logprobs
            assert answer.choices[0].text == "ab"
            assert logprobs.tokens == ["a", "b", "<|end|>"]
            assert logprobs.token_logprobs == [-0.5, -0.5, -0.25]
            assert logprobs.top_logprobs == [{"a": -0.5}, {"b": -0.5}, {"<|end|>": -0.25}]
            assert logprobs.text_offset == [0, 1, 2]
            # The chosen token is always among the best that are shown.
            answer = await client.completions.create(model="m", prompt="x", logprobs=0)
            assert answer.choices[0].logprobs.top_logprobs == [{"a": -0.5}, {"b": -0.5}, {"<|end|>": -0.25}]
            assert (await client.completions.create(model="m", prompt="x")).choices[0].logprobs is None

    asyncio.run(run())


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("prompt", ["xy", [1, 120, 121]])
@pytest.mark.parametrize("num_top", [None, 1])
def test_echo(serving, make_engine, client_of, is_stream, prompt, num_top):
    """A stream's pieces are the whole."""

    async def run():
        async with serving(make_engine(answer="ab")) as served, client_of(served) as client:
            options = {"model": "m", "prompt": prompt, "echo": True, "logprobs": num_top}
            if is_stream:
                stream = await client.completions.create(**options, stream=True)
                choices = [chunk.choices[0] async for chunk in stream]
                assert [one.finish_reason for one in choices] == [None, None, None, "stop"]
                columns = {
                    name: [value for one in choices for value in getattr(one.logprobs, name)] if num_top else None
                    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
                }
                text = "".join(one.text for one in choices)
            else:
                [choice] = (await client.completions.create(**options)).choices
                text, columns = choice.text, choice.logprobs and vars(choice.logprobs)
            assert text == "xyab"
            request = served.engine.log[0]
            assert request.scores_prompt == (num_top is not None)
            if num_top is None:
                assert not columns or columns["tokens"] is None
                return
            assert request.prompt_top_n_tokens == 1
            assert columns["tokens"] == ["\x01", "x", "y", "a", "b", "<|end|>"]
            assert columns["token_logprobs"] == [None, -1, -2, -0.5, -0.5, -0.25]
            assert columns["top_logprobs"] == [None, {"x": -1}, {"y": -2}, {"a": -0.5}, {"b": -0.5}, {"<|end|>": -0.25}]
            assert columns["text_offset"] == [0, 0, 1, 2, 3, 4]

    asyncio.run(run())


@pytest.mark.parametrize("is_stream", [False, True])
def test_the_prompt_alone(serving, client_of, is_stream):
    """max_tokens 0: what the model thinks of a text."""

    async def run():
        async with serving() as served, client_of(served) as client:
            options = {"model": "m", "prompt": ["xy", "z"], "echo": True, "logprobs": 1, "max_tokens": 0}
            if is_stream:
                stream = await client.completions.create(**options, stream=True, stream_options={"include_usage": True})
                *chunks, last = [chunk async for chunk in stream]
                choices, usage = [chunk.choices[0] for chunk in chunks], last.usage
            else:
                answer = await client.completions.create(**options)
                choices, usage = answer.choices, answer.usage
            shown = {(one.index, one.text, one.finish_reason) for one in choices}
            assert shown == {(0, "xy", "length"), (1, "z", "length")}
            assert all(len(one.logprobs.tokens) == len(one.text) + 1 for one in choices)
            assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (5, 0, 5)
            with pytest.raises(openai.UnprocessableEntityError, match="`max_new_tokens` must be strictly positive"):
                await client.completions.create(model="m", prompt="x", max_tokens=0)

    asyncio.run(run())


def test_tokens_that_look_alike_share_the_better_ones_place(serving, make_engine, client_of):
    """What evaluation tools ask: is the chosen token the best one?"""

    async def run():
        engine = make_engine(answer="a")
        async with serving(engine) as served, client_of(served) as client:
            served.context.tokenizer.token_text = lambda token_id: "?"
            [choice] = (await client.completions.create(model="m", prompt="xy", echo=True, logprobs=2)).choices
            for logprob, top in zip(choice.logprobs.token_logprobs, choice.logprobs.top_logprobs, strict=True):
                assert top is None or max(top.values()) >= logprob
            assert math.isclose(choice.logprobs.top_logprobs[1]["?"], -1)

    asyncio.run(run())


# What is long must not keep the event loop from other streams.


@pytest.mark.parametrize("prompt", ["abcdefghijklmnopqrstuvwxyz", [1, *range(97, 123)]])
@pytest.mark.parametrize("max_tokens", [0, 8])
def test_a_long_prompt_is_streamed_in_slices(serving, monkeypatch, openai_events_of, prompt, max_tokens):
    """The loop has its turns between them; all of them together are the whole answer."""
    monkeypatch.setattr(completion_text, "_SLICE_ENTRIES", 9)  # three tokens with two of the best
    num_turns, turns_of_texts = 0, []

    async def count_turns():
        nonlocal num_turns
        while True:
            num_turns += 1
            await asyncio.sleep(0)

    async def run():
        async with serving() as served:
            body = {"prompt": prompt, "echo": True, "logprobs": 2, "max_tokens": max_tokens}
            async with served.client.post("/v1/completions", json=body) as response:
                [whole] = (await response.json())["choices"]
            text_of = served.context.tokenizer.token_text

            def noted_text(token_id):
                turns_of_texts.append(num_turns)
                return text_of(token_id)

            served.context.tokenizer.token_text = noted_text
            turns = asyncio.create_task(count_turns())
            async with served.client.post("/v1/completions", json=body | {"stream": True}) as response:
                choices = [event["choices"][0] for event in await openai_events_of(response)]
            turns.cancel()
        assert len(choices) == 9 + (7 if max_tokens else 0)
        assert [len(one["logprobs"]["tokens"]) for one in choices[:9]] == [3] * 9
        for name, column in whole["logprobs"].items():
            assert [value for one in choices for value in one["logprobs"][name]] == column, name
        assert "".join(one["text"] for one in choices) == whole["text"]
        assert [one["finish_reason"] for one in choices] == [None] * (len(choices) - 1) + [whole["finish_reason"]]
        # 105 texts of the prompt; the last slice comes with all that was generated meanwhile.
        assert max(Counter(turns_of_texts).values()) <= 40

    asyncio.run(run())


@pytest.mark.parametrize("is_long", [False, True])
@pytest.mark.parametrize(
    ("path", "body", "config"),
    [
        ("/v1/completions", {"prompt": "xy", "echo": True, "logprobs": 2}, {}),
        ("/v1/completions", {"prompt": "xy", "logprobs": 2}, {}),
        ("/v1/chat/completions", {"messages": USER, "logprobs": True, "top_logprobs": 2}, {}),
        ("/generate", {"inputs": "xy", "parameters": {"details": True, "top_n_tokens": 2}}, {}),
        (
            "/generate",
            {"inputs": "xy", "parameters": {"decoder_input_details": True}},
            {"enable_prefill_logprobs": True},
        ),
    ],
)
def test_long_answers_are_rendered_beside_the_event_loop(serving, monkeypatch, path, body, config, is_long):
    threads = set()

    async def run():
        async with serving(**config) as served:
            text_of = served.context.tokenizer.token_text

            def noted_text(token_id):
                threads.add(threading.current_thread())
                return text_of(token_id)

            served.context.tokenizer.token_text = noted_text
            answers = []
            for most in (1000, 9 if is_long else 1000):
                threads.clear()
                monkeypatch.setattr(responses, "MAX_ENTRIES_AT_ONCE", most)
                async with served.client.post(path, json=body) as response:
                    assert response.status == 200
                    answer = await response.json()
                answers.append({key: value for key, value in answer.items() if key not in ("id", "created")})
            assert answers[0] == answers[1]
            assert (threading.current_thread() in threads) != is_long
            assert served.counts()["tgi_request_success"] == 2

    asyncio.run(run())
