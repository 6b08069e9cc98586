"""Every parameter that OpenAI's client documents, by its own types: it has its effect, or is refused by its name."""

from __future__ import annotations

import json
import typing
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import openai
import pytest
from openai.types import chat, completion_create_params
from openai.types.chat import completion_create_params as chat_create_params

if TYPE_CHECKING:
    from conftest import Server

HELLO = [{"role": "user", "content": "hello"}]
LETTER = {"90": 8.0}  # what the tiny model then writes most of the time
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
CUSTOM_TOOL = {"type": "custom", "custom": {"name": "f"}}
BASE: dict[str, Any] = {"model": "tgi", "max_tokens": 12, "temperature": 0, "extra_body": {"ignore_eos": True}}
CHAT, COMPLETION = {**BASE, "messages": HELLO}, {**BASE, "prompt": "hello"}
OBJECT = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"enum": ["x"]}, "strict": True}}


def text(answer: Any) -> str:
    choice = answer.choices[0]
    return choice.message.content if hasattr(choice, "message") else choice.text


def second_logprob(answer: Any) -> float:
    logprobs = answer.choices[0].logprobs
    return logprobs.token_logprobs[1] if hasattr(logprobs, "token_logprobs") else logprobs.content[1].logprob


def has_three_tokens(answer: Any, _: Any) -> bool:
    return answer.usage.completion_tokens == 3 and answer.choices[0].finish_reason == "length"


def is_same(answer: Any, other: Any) -> bool:
    return text(answer) == text(other) != ""


def is_another(answer: Any, other: Any) -> bool:
    return text(answer) != text(other)


def is_penalised(answer: Any, other: Any) -> bool:
    return second_logprob(answer) < second_logprob(other) - 1e-3 or is_another(answer, other)


def calls_f(answer: Any, _: Any) -> bool:
    return [(call.function.name, call.function.arguments) for call in answer.choices[0].message.tool_calls] == [
        ("f", "{}")
    ]


# A name, what is asked with it, what is asked without, and what must hold of both answers.
Effect = tuple[dict[str, Any], dict[str, Any], Callable[[Any, Any], bool]]
SAMPLED: dict[str, Any] = {"temperature": 1.3, "seed": 5}
CALL: dict[str, Any] = {"tools": [TOOL], "max_tokens": 300, "extra_body": None}
SHARED: dict[str, Effect] = {
    "model": ({"model": "gpt-4o"}, {}, is_same),
    "frequency_penalty": ({"frequency_penalty": 2.0, "logit_bias": LETTER}, {"logit_bias": LETTER}, is_another),
    "logit_bias": ({"logit_bias": LETTER}, {}, is_another),
    "max_tokens": ({"max_tokens": 3}, {}, has_three_tokens),
    "n": ({"n": 2, **SAMPLED}, {}, lambda two, _: two.choices[0] != two.choices[1]),
    "seed": (SAMPLED, SAMPLED, is_same),
    "temperature": (SAMPLED, {}, is_another),
    "top_p": ({"temperature": 1, "top_p": 1e-6}, {}, is_same),
    "stop": ({"stop": ["b"], "logit_bias": {"67": 100}}, {}, lambda stopped, _: text(stopped) == ""),
    "user": ({"user": "someone"}, {}, is_same),
}
CHAT_EFFECTS: dict[str, Effect] = SHARED | {
    "messages": ({"messages": [{"role": "system", "content": "be brief"}, *HELLO]}, {}, is_another),
    "presence_penalty": (
        {"presence_penalty": 2.0, "logit_bias": LETTER, "logprobs": True},
        {"logit_bias": LETTER, "logprobs": True},
        is_penalised,
    ),
    "logprobs": ({"logprobs": True}, {}, lambda told, _: len(told.choices[0].logprobs.content) == 12),
    "top_logprobs": (
        {"logprobs": True, "top_logprobs": 3},
        {},
        lambda told, _: {len(one.top_logprobs) for one in told.choices[0].logprobs.content} == {3},
    ),
    "max_completion_tokens": ({"max_tokens": openai.omit, "max_completion_tokens": 3}, {}, has_three_tokens),
    "response_format": (
        {"response_format": OBJECT, "extra_body": None},
        {},
        lambda made, _: json.loads(text(made)) == "x",
    ),
    "tools": ({**CALL, "tool_choice": {"type": "function", "function": {"name": "f"}}}, {}, calls_f),
    "tool_choice": ({**CALL, "tool_choice": "required"}, {}, calls_f),
    "parallel_tool_calls": ({**CALL, "tool_choice": "required", "parallel_tool_calls": False}, {}, calls_f),
    "prompt_cache_key": ({"prompt_cache_key": "a"}, {}, is_same),
    "safety_identifier": ({"safety_identifier": "a"}, {}, is_same),
}
CHAT_REFUSED: dict[str, Any] = {
    "audio": {"format": "wav", "voice": "alloy"},
    "function_call": "auto",
    "functions": [{"name": "f"}],
    "metadata": {"a": "b"},
    "modalities": ["text", "audio"],
    "moderation": {"model": "m"},
    "prediction": {"type": "content", "content": "a"},
    "prompt_cache_options": {"ttl": "30m"},
    "prompt_cache_retention": "24h",
    "reasoning_effort": "low",  # the model's template has no such switch
    "service_tier": "flex",
    "store": True,
    "verbosity": "low",
    "web_search_options": {},
}
COMPLETION_EFFECTS: dict[str, Effect] = SHARED | {
    "prompt": ({"prompt": [10, 11, 12]}, {}, is_another),
    "presence_penalty": (
        {"presence_penalty": 2.0, "logit_bias": LETTER, "logprobs": 1},
        {"logit_bias": LETTER, "logprobs": 1},
        is_penalised,
    ),
    "best_of": ({"best_of": 2, **SAMPLED}, {}, lambda best, _: best.usage.completion_tokens == 24),
    "echo": ({"echo": True}, {}, lambda echoed, plain: text(echoed) == "hello" + text(plain)),
    "logprobs": ({"logprobs": 2}, {}, lambda told, _: len(told.choices[0].logprobs.token_logprobs) == 12),
}
COMPLETION_REFUSED: dict[str, Any] = {"suffix": "the end"}
# Both are of a stream, which has a test of its own.
STREAMED = {"stream", "stream_options"}


@pytest.fixture
def client(tiny: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{tiny.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


def documented(*types: Any) -> set[str]:
    return {name for one in types for name in typing.get_type_hints(one)} - STREAMED


def test_none_is_left_out() -> None:
    streaming, whole = (
        chat_create_params.CompletionCreateParamsStreaming,
        chat_create_params.CompletionCreateParamsNonStreaming,
    )
    assert CHAT_EFFECTS.keys() | CHAT_REFUSED.keys() == documented(streaming, whole)
    streaming, whole = (
        completion_create_params.CompletionCreateParamsStreaming,
        completion_create_params.CompletionCreateParamsNonStreaming,
    )
    assert COMPLETION_EFFECTS.keys() | COMPLETION_REFUSED.keys() == documented(streaming, whole)


@pytest.mark.parametrize("name", CHAT_EFFECTS)
def test_effects_on_a_chat(client: openai.OpenAI, name: str) -> None:
    given, other, holds = CHAT_EFFECTS[name]
    answers = [client.chat.completions.create(**{**CHAT, **fields}) for fields in (given, other)]
    assert holds(*answers), answers


@pytest.mark.parametrize("name", COMPLETION_EFFECTS)
def test_effects_on_a_completion(client: openai.OpenAI, name: str) -> None:
    given, other, holds = COMPLETION_EFFECTS[name]
    answers = [client.completions.create(**{**COMPLETION, **fields}) for fields in (given, other)]
    assert holds(*answers), answers


def refusal(create: Callable[..., Any], fields: dict[str, Any]) -> dict[str, Any]:
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        create(**fields)
    body = caught.value.body
    assert isinstance(body, dict)
    return body


@pytest.mark.parametrize("name", CHAT_REFUSED)
def test_refusals_of_a_chat(client: openai.OpenAI, name: str) -> None:
    error = refusal(client.chat.completions.create, {**CHAT, name: CHAT_REFUSED[name]})
    assert f"`{name}`" in error["message"]
    assert error["param"] == name


@pytest.mark.parametrize("name", COMPLETION_REFUSED)
def test_refusals_of_a_completion(client: openai.OpenAI, name: str) -> None:
    error = refusal(client.completions.create, {**COMPLETION, name: COMPLETION_REFUSED[name]})
    assert f"`{name}`" in error["message"]
    assert error["param"] == name


@pytest.mark.parametrize("route", ["chat", "completions"])
def test_streams(client: openai.OpenAI, route: str) -> None:
    create: Any = client.chat.completions.create if route == "chat" else client.completions.create
    fields = CHAT if route == "chat" else COMPLETION
    *chunks, last = create(**fields, stream=True, stream_options={"include_usage": True})
    assert len(chunks) == last.usage.completion_tokens == 12
    assert not last.choices
    streamed = "".join(chunk.choices[0].delta.content if route == "chat" else chunk.choices[0].text for chunk in chunks)
    assert streamed == text(create(**fields))
    options = {"include_obfuscation": True}
    error = refusal(create, {**fields, "stream": True, "stream_options": options})
    assert (error["param"], "`include_obfuscation`" in error["message"]) == ("stream_options.include_obfuscation", True)


# What stands inside of messages and tools.
PARTS = {
    "text": {"type": "text", "text": "hello"},
    "image_url": {"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/"}},
    "input_audio": {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}},
    "file": {"type": "file", "file": {"file_id": "a"}},
}
ROLES = ("developer", "system", "user", "assistant", "tool", "function")


def literals(union: Any, name: str) -> set[str]:
    return {typing.get_args(typing.get_type_hints(one)[name])[0] for one in typing.get_args(union)}


def test_parts_and_roles_of_messages(client: openai.OpenAI) -> None:
    assert literals(chat.ChatCompletionContentPartParam, "type") == PARTS.keys()
    assert literals(chat.ChatCompletionMessageParam, "role") == set(ROLES)
    plain = client.chat.completions.create(**CHAT)
    for name, part in PARTS.items():
        fields = {**CHAT, "messages": [{"role": "user", "content": [part]}]}
        if name == "text":
            assert is_same(client.chat.completions.create(**fields), plain)
        else:
            assert "`content` parts other than text" in refusal(client.chat.completions.create, fields)["message"]
    for role in ROLES:
        messages = [{"role": role, "content": "hello", "name": "f", "tool_call_id": "a"}, *HELLO]
        assert text(client.chat.completions.create(**{**CHAT, "messages": messages}))


def test_kinds_of_tools_and_choices(client: openai.OpenAI) -> None:
    assert literals(chat.ChatCompletionToolUnionParam, "type") == {"function", "custom"}
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [TOOL]}}
    named = {"type": "custom", "custom": {"name": "f"}}
    choices = [one for one in typing.get_args(chat.ChatCompletionToolChoiceOptionParam) if isinstance(one, type)]
    kinds = {typing.get_args(typing.get_type_hints(one)["type"])[0] for one in choices}
    assert kinds == {"function", "custom", "allowed_tools"}
    for fields, param in (
        ({"tools": [CUSTOM_TOOL]}, "tools.type"),
        ({"tools": [TOOL], "tool_choice": allowed}, "tool_choice.type"),
        ({"tools": [TOOL], "tool_choice": named}, "tool_choice.type"),
    ):
        assert refusal(client.chat.completions.create, {**CHAT, **fields})["param"] == param
