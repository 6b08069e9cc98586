"""OpenAI's routes, spoken by OpenAI's own client to the embedded demo model, in float32 where tokens are compared."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import openai
import pytest

if TYPE_CHECKING:
    from conftest import Server

NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
FRANCE: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
COUNTING = "1, 2, 3, 4, 5, 6,"


@pytest.fixture
def client(exact: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{exact.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


def test_the_default_server_knows_paris(demo: Server) -> None:
    with openai.OpenAI(base_url=f"{demo.url}/v1", api_key="unused", max_retries=0) as client:
        options: dict[str, Any] = {"model": "tgi", "messages": FRANCE, "max_tokens": 48, "temperature": 0}
        whole = client.chat.completions.create(**options).choices[0].message.content
        chunks = client.chat.completions.create(**options, stream=True)
        streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert "Paris" in whole
    assert streamed == whole


def test_chat_knows_paris(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="tgi", messages=FRANCE, max_tokens=48, temperature=0)
    assert answer.object == "chat.completion"
    assert answer.model == NAME
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == "The capital of France is Paris."  # as transformers answers in float32
    assert choice.finish_reason == "stop"
    assert choice.logprobs is None
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert 1 < answer.usage.completion_tokens < 48


def test_chat_renders_the_template_that_the_model_was_trained_with(exact: Server, client: openai.OpenAI) -> None:
    messages: list[Any] = [{"role": "system", "content": "Be brief."}, *FRANCE]
    answer = client.chat.completions.create(model="tgi", messages=messages, max_tokens=8, temperature=0)
    prompt = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n" + FRANCE[0]["content"]
    prompt += "<|im_end|>\n<|im_start|>assistant\n"
    reply = exact.post("/generate", {"inputs": prompt, "parameters": {"max_new_tokens": 8}})
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == int(reply.headers["x-prompt-tokens"])
    assert answer.choices[0].message.content == reply.json()["generated_text"]


def test_a_chat_stream_is_the_answer_in_pieces(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="tgi", messages=FRANCE, max_tokens=48, temperature=0)
    options: Any = {"include_usage": True}
    stream = client.chat.completions.create(
        model="tgi", messages=FRANCE, max_tokens=48, temperature=0, stream=True, stream_options=options
    )
    chunks = list(stream)
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    *tokens, last = chunks
    assert last.choices == []
    assert whole.usage is not None
    assert last.usage is not None
    assert last.usage.completion_tokens == whole.usage.completion_tokens == len(tokens)
    assert "".join(chunk.choices[0].delta.role or "" for chunk in tokens) == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in tokens) == whole.choices[0].message.content
    reasons = [chunk.choices[0].finish_reason for chunk in tokens]
    assert reasons == [None] * (len(tokens) - 1) + ["stop"]


def test_a_raw_chat_stream_ends_with_done(exact: Server) -> None:
    body = {"model": "tgi", "messages": FRANCE, "max_tokens": 3, "stream": True, "temperature": 0}
    *chunks, done = exact.events("/v1/chat/completions", body)
    assert done == "[DONE]"
    assert len(chunks) == 3  # no usage chunk unless asked for
    for chunk in chunks:
        assert chunk.keys() >= {"id", "object", "created", "model", "system_fingerprint", "choices", "usage"}
        assert chunk["choices"][0].keys() >= {"index", "delta", "logprobs", "finish_reason"}
        assert chunk["usage"] is None
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


def test_chat_logprobs_are_those_of_the_tokens(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="tgi", messages=FRANCE, max_tokens=6, temperature=0, logprobs=True)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert "".join(entry.token for entry in logprobs.content) == answer.choices[0].message.content
    assert all(entry.logprob <= 0 for entry in logprobs.content)


def test_any_model_name_is_served_and_echoed(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="gpt-4o", messages=FRANCE, max_tokens=1, temperature=0)
    assert answer.model == "gpt-4o"


def test_completions_continue_a_text(exact: Server, client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="tgi", prompt=COUNTING, max_tokens=8, temperature=0, extra_body={"ignore_eos": True}
    )
    assert answer.object == "text_completion"
    assert answer.model == NAME
    assert answer.choices[0].text == exact.generate(COUNTING, max_new_tokens=8, ignore_eos=True)["generated_text"]
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8


def test_completions_answer_prompts_in_their_order(client: openai.OpenAI) -> None:
    prompts = [COUNTING, "A, B, C, D, E,", "Monday, Tuesday,"]
    answer = client.completions.create(model="tgi", prompt=prompts, max_tokens=3, temperature=0)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    for prompt, choice, expected in zip(prompts, answer.choices, ("7", "F", "Wednesday"), strict=True):
        assert expected in choice.text, prompt


def test_completions_of_several_prompts_stream_by_index(exact: Server) -> None:
    body = {"prompt": [COUNTING, "A, B, C, D, E,"], "max_tokens": 4, "temperature": 0, "ignore_eos": True}
    whole = exact.post("/v1/completions", body).json()
    *chunks, done = exact.events("/v1/completions", {**body, "stream": True})
    assert done == "[DONE]"
    assert len(chunks) == 8
    for index in (0, 1):
        own = [chunk for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert "".join(chunk["choices"][0]["text"] for chunk in own) == whole["choices"][index]["text"]
        assert [chunk["choices"][0]["finish_reason"] for chunk in own] == [None] * 3 + ["length"]
        assert own[-1]["usage"]["completion_tokens"] == 4


def test_completions_take_token_ids(exact: Server) -> None:
    details = exact.generate(COUNTING, max_new_tokens=4, details=True, ignore_eos=True)["details"]
    ids = [token["id"] for token in details["tokens"]]
    text = "".join(token["text"] for token in details["tokens"])
    bodies = [{"prompt": prompt, "max_tokens": 4, "temperature": 0, "ignore_eos": True} for prompt in (ids, text)]
    by_ids, by_text = (exact.post("/v1/completions", body).json() for body in bodies)
    assert by_ids["usage"]["prompt_tokens"] == 4
    assert by_ids["choices"] == by_text["choices"]


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_stop_string_is_cut_off(exact: Server, is_stream: bool) -> None:
    body = {"prompt": COUNTING, "max_tokens": 16, "temperature": 0, "ignore_eos": True}
    whole = exact.post("/v1/completions", body).json()["choices"][0]["text"]
    body |= {"stop": ["8, 9"], "stream": is_stream}
    if is_stream:
        chunks = exact.events("/v1/completions", body)[:-1]
        text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
        reason = chunks[-1]["choices"][0]["finish_reason"]
    else:
        (choice,) = exact.post("/v1/completions", body).json()["choices"]
        text, reason = choice["text"], choice["finish_reason"]
    assert text == whole[: whole.index("8, 9")]
    assert reason == "stop"


def test_errors_are_the_clients_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        client.chat.completions.create(model="tgi", messages=FRANCE, max_tokens=-1)
    assert caught.value.body == {
        "message": "Input validation error: `max_new_tokens` must be strictly positive. Given: -1",
        "type": "validation",
        "param": "max_tokens",
        "code": None,
    }
