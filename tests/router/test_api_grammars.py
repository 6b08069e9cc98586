"""What reaches the engine of the forms that requests ask for: TGI's grammar, OpenAI's response_format, forced calls."""

import asyncio
import json

import pytest
from text_generation_router.model_family import ModelFamily, ToolFormat

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
TEXT = json.dumps(SCHEMA, separators=(",", ":"))
USER = [{"role": "user", "content": "Hello"}]
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}]
NO_REASONING = ModelFamily(ToolFormat.HERMES, has_reasoning=False)
THINKING = ModelFamily(ToolFormat.HERMES, has_reasoning=True)


def grammar_of(serving, path, body, family=NO_REASONING, prompt_end=""):
    """The canonical text (here kind, reasoning and text) that a request was queued with."""

    async def run():
        async with serving() as served:
            served.context.chat_template.family = family
            served.context.chat_template.prompt_end = prompt_end
            async with served.client.post(path, json=body) as response:
                assert response.status == 200, await response.text()
                assert "x-ignored-parameters" not in response.headers
            return served.engine.log[0].grammar

    return asyncio.run(run())


GRAMMARS = [
    ({"type": "json", "value": SCHEMA}, f"json_schema none {TEXT}"),
    ({"type": "json_object", "value": SCHEMA}, f"json_schema none {TEXT}"),
    ({"type": "json", "value": '{"type": "string"}'}, 'json_schema none {"type": "string"}'),
    ({"type": "json_object"}, 'json_schema none {"type":"object"}'),
    ({"type": "json_object", "schema": SCHEMA}, f"json_schema none {TEXT}"),
    ({"type": "json_schema", "value": {"name": "x", "schema": SCHEMA}}, f"json_schema none {TEXT}"),
    ({"type": "json_schema", "value": {"schema": TEXT}}, f"json_schema none {TEXT}"),
    (
        {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": False, "description": "y"}},
        f"json_schema none {TEXT}",
    ),
    ({"type": "regex", "value": "a+"}, "regex none a+"),
    ({"type": "text"}, ""),
    (None, ""),
]


@pytest.mark.parametrize(("value", "expected"), GRAMMARS)
def test_every_route_takes_both_shapes(serving, value, expected):
    for path in ("/generate", "/generate_stream", "/"):
        assert grammar_of(serving, path, {"inputs": "a", "parameters": {"grammar": value}}) == expected
    for path, prompt in (("/v1/completions", {"prompt": "a"}), ("/v1/chat/completions", {"messages": USER})):
        assert grammar_of(serving, path, {**prompt, "response_format": value}) == expected


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"type": "regex"}, "`value` must be a regular expression"),
        ({"type": "json", "value": 1}, "`value` must be a JSON schema"),
        ({"type": "json_object", "schema": 1}, "`schema` must be a JSON schema"),
        ({"type": "json_schema", "value": {"name": "a"}}, "`schema` is missing"),
        ({"type": "json_schema"}, "`value` must be an object"),
        ({"type": "yaml"}, "`type` must be text, json_object"),
        ({}, "`type` is missing"),
    ],
)
def test_wrong_shapes(serving, value, text):
    async def run():
        async with serving() as served:
            for path in ("/generate", "/generate_stream"):
                body = {"inputs": "a", "parameters": {"grammar": value}}
                async with served.client.post(path, json=body) as response:
                    assert response.status == 422
                    assert (await response.json())["error"].startswith(f"Input validation error: {text}")

    asyncio.run(run())


@pytest.mark.parametrize(
    ("family", "prompt_end", "begun", "reasoning"),
    [
        (NO_REASONING, "", None, "none"),
        (THINKING, "", None, "possible"),
        (THINKING, "<think>\n", None, "begun"),
        (THINKING, "", "The answer: ", "none"),
        (THINKING, "", "<think>So", "begun"),
    ],
)
def test_a_grammar_begins_where_the_reasoning_ends(serving, family, prompt_end, begun, reasoning):
    messages = USER if begun is None else [*USER, {"role": "assistant", "content": begun}]
    body = {"messages": messages, "response_format": {"type": "regex", "value": "a"}}
    assert grammar_of(serving, "/v1/chat/completions", body, family, prompt_end) == f"regex {reasoning} a"


@pytest.mark.parametrize(
    ("tool_format", "choice", "is_forced", "may_call_none"),
    [
        (ToolFormat.HERMES, "auto", False, False),
        (ToolFormat.HERMES, "required", True, False),
        (ToolFormat.HERMES, {"type": "function", "function": {"name": "weather"}}, True, False),
        (None, "auto", True, True),
        (None, "required", True, False),
        (None, "none", False, False),
    ],
)
def test_a_grammar_forces_what_the_model_may_not_do_by_itself(serving, tool_format, choice, is_forced, may_call_none):
    body = {"messages": USER, "tools": TOOLS, "tool_choice": choice}
    grammar = grammar_of(serving, "/v1/chat/completions", body, ModelFamily(tool_format, has_reasoning=False))
    assert ('"_name"' in grammar) == is_forced
    assert ("no_tool" in grammar) == may_call_none


def test_forced_calls_become_tool_calls(serving, make_engine):
    async def run():
        async with serving(make_engine('{"function": {"_name": "weather", "a": 5}}')) as served:
            served.context.chat_template.family = ModelFamily(None, has_reasoning=False)
            body = {"messages": USER, "tools": TOOLS, "max_tokens": 60}
            async with served.client.post("/v1/chat/completions", json=body) as response:
                [choice] = (await response.json())["choices"]
            assert choice["finish_reason"] == "tool_calls"
            [call] = choice["message"]["tool_calls"]
            assert call["function"] == {"name": "weather", "arguments": '{"a":5}'}

    asyncio.run(run())


@pytest.mark.parametrize(
    ("fields", "error_type", "param"),
    [
        ({"tools": TOOLS, "response_format": {"type": "json_object"}}, "tool_error", "response_format"),
        (
            {"tools": [{"function": {"name": "f", "parameters": {"type": "string"}}}], "tool_choice": "required"},
            "tool_error",
            "tools",
        ),
        (
            {
                "tools": [{"function": {"name": "f", "parameters": {"properties": {"_name": {}}}}}],
                "tool_choice": "required",
            },
            "tool_error",
            "tools",
        ),
        ({"tools": TOOLS, "tool_choice": "required", "ignore_eos": True}, "validation", "tools"),
        ({"grammar": {"type": "regex", "value": "a"}}, "validation", "grammar"),
    ],
)
def test_what_excludes_each_other(serving, fields, error_type, param):
    async def run():
        async with serving() as served:
            served.context.chat_template.family = NO_REASONING
            async with served.client.post("/v1/chat/completions", json={"messages": USER, **fields}) as response:
                assert response.status == 422
                answer = await response.json()
            assert (answer["error_type"], answer["error"]["param"]) == (error_type, param)

    asyncio.run(run())
