"""Tools and reasoning on the chat route: what the model is shown, and answers in both forms, by the real client."""

import asyncio
import dataclasses
import json

import pytest
from text_generation_router.model_family import ModelFamily, ToolFormat

USER = [{"role": "user", "content": "Hello"}]


def tool(name, **function):
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object"}, **function}}


TOOLS = [tool("weather"), tool("time", description="What time it is")]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
TWO_CALLS = f'Let me see.\n{CALL}\n<tool_call>\n{{"name": "time", "arguments": {{}}}}\n</tool_call>'
HERMES = ModelFamily(ToolFormat.HERMES, has_reasoning=False)
THINKING = ModelFamily(ToolFormat.HERMES, has_reasoning=True)


@pytest.fixture
def writer(make_engine):
    """`writer(text, tokens_at_once)`: an engine that writes this text, with room for it."""

    def make(text, tokens_at_once=1):
        engine = make_engine(text)
        engine.limits = dataclasses.replace(engine.limits, max_total_tokens=1000)
        engine.tokens_at_once = tokens_at_once
        return engine

    return make


def of_family(served, family, prompt_end=""):
    served.context.chat_template.family = family
    served.context.chat_template.prompt_end = prompt_end


def test_a_whole_answer_with_calls(serving, writer, client_of):
    async def run():
        async with serving(writer(TWO_CALLS)) as served, client_of(served) as client:
            of_family(served, HERMES)
            answer = await client.chat.completions.create(model="m", messages=USER, tools=TOOLS)
            [choice] = answer.choices
            assert choice.finish_reason == "tool_calls"
            assert choice.message.content == "Let me see."
            weather, time = choice.message.tool_calls
            assert (weather.type, weather.function.name, weather.function.arguments) == (
                "function",
                "weather",
                '{"city":"Paris"}',
            )
            assert (time.function.name, time.function.arguments) == ("time", "{}")
            assert weather.id != time.id
            assert bytes(served.engine.log[0].token_ids).decode() == "[weather][time]user:Hello\nassistant:"

    asyncio.run(run())


@pytest.mark.parametrize("tokens_at_once", [1, 2, 5, 1000])
@pytest.mark.parametrize("text", ["Just text. {", CALL, TWO_CALLS, "<tool_call>{", CALL[:-20], "\n" + CALL + "\n"])
@pytest.mark.parametrize("max_tokens", [300, 30])
def test_the_whole_answer_is_the_fold_of_the_stream(serving, writer, client_of, text, tokens_at_once, max_tokens):
    """Folded by the client's own accumulator; a limit in the middle of a call ends it with `length`."""

    async def run():
        async with serving(writer(text, tokens_at_once)) as served, client_of(served) as client:
            of_family(served, HERMES)
            options = {"model": "m", "messages": USER, "tools": TOOLS, "max_tokens": max_tokens}
            whole = (await client.chat.completions.create(**options)).choices[0]
            content, calls, reasons = "", {}, []
            async for chunk in await client.chat.completions.create(**options, stream=True):
                [choice] = chunk.choices
                reasons.append(choice.finish_reason)
                assert choice.delta.content is None or choice.delta.tool_calls is None
                content += choice.delta.content or ""
                for call in choice.delta.tool_calls or []:
                    name, arguments = calls.get(call.index, ("", ""))
                    assert (call.function.name is not None) == bool(call.id) == (call.index not in calls)
                    calls[call.index] = (name + (call.function.name or ""), arguments + call.function.arguments)
            assert reasons[:-1] == [None] * (len(reasons) - 1)
            assert reasons[-1] == whole.finish_reason
            assert content == (whole.message.content or "")
            found = [(call.function.name, call.function.arguments) for call in whole.message.tool_calls or []]
            assert list(calls.values()) == found
            is_cut = len(text) >= max_tokens
            assert whole.finish_reason == ("length" if is_cut else "tool_calls" if calls else "stop")

    asyncio.run(run())


def test_log_probabilities_of_a_stream_are_those_of_every_token(serving, writer, openai_events_of):
    async def run():
        async with serving(writer(CALL)) as served:
            of_family(served, HERMES)
            body = {"messages": USER, "tools": TOOLS, "stream": True, "logprobs": True}
            async with served.client.post("/v1/chat/completions", json=body) as response:
                events = await openai_events_of(response)
            logprobs = [event["choices"][0]["logprobs"] for event in events]
            tokens = [token["token"] for one in logprobs if one for token in one["content"]]
            assert "".join(tokens) == f"{CALL}<|end|>"

    asyncio.run(run())


def test_one_call_when_they_may_not_be_parallel(serving, writer, client_of):
    async def run():
        async with serving(writer(TWO_CALLS)) as served, client_of(served) as client:
            of_family(served, HERMES)
            answer = await client.chat.completions.create(
                model="m", messages=USER, tools=TOOLS, parallel_tool_calls=False
            )
            assert [call.function.name for call in answer.choices[0].message.tool_calls] == ["weather"]

    asyncio.run(run())


@pytest.mark.parametrize("fields", [{}, {"tools": TOOLS, "tool_choice": "none"}, {"tools": []}])
def test_without_tools_nothing_is_a_call(serving, writer, client_of, fields):
    async def run():
        async with serving(writer(CALL)) as served, client_of(served) as client:
            of_family(served, HERMES)
            answer = await client.chat.completions.create(model="m", messages=USER, **fields)
            assert answer.choices[0].message.content == CALL
            assert answer.choices[0].message.tool_calls is None
            assert answer.choices[0].finish_reason == "stop"
            assert bytes(served.engine.log[0].token_ids).decode() == "user:Hello\nassistant:"

    asyncio.run(run())


@pytest.mark.parametrize(
    ("fields", "error_type", "param"),
    [
        ({"tools": TOOLS, "tool_choice": "nothing"}, "tool_error", "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_error", "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_error", "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "other"}}, "validation", "tool_choice.type"),
        ({"tools": TOOLS, "tool_choice": {}}, "validation", "tool_choice.function"),
        ({"tool_choice": "required"}, "validation", "tool_choice"),
        ({"tools": [tool("a b")]}, "validation", "tools.function.name"),
        ({"tools": [tool("a" * 65)]}, "validation", "tools.function.name"),
        ({"tools": [{"type": "web_search"}]}, "validation", "tools.type"),
        ({"tools": [tool("a"), tool("a")]}, "validation", "tools"),
        ({"tools": [tool("a", parameters=[])]}, "validation", "tools.function.parameters"),
        ({"tools": [tool(f"a{n}") for n in range(129)]}, "validation", "tools"),
        ({"messages": USER * 4097}, "validation", "messages"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * 1025}]},
            "validation",
            "messages.content",
        ),
        ({"documents": [{}] * 1025}, "validation", "documents"),
        ({"documents": ["x"]}, "validation", "documents"),
        ({"chat_template_kwargs": {f"a{n}": 1 for n in range(65)}}, "validation", "chat_template_kwargs"),
        ({"chat_template_kwargs": {"a": ["x"]}}, "validation", "chat_template_kwargs"),
        ({"chat_template_kwargs": {"a": "x" * 2000}}, "validation", "chat_template_kwargs"),
        ({"user": "x" * 600}, "validation", "user"),
    ],
)
def test_what_is_refused(serving, fields, error_type, param):
    async def run():
        async with serving() as served:
            of_family(served, HERMES)
            async with served.client.post("/v1/chat/completions", json={"messages": USER, **fields}) as response:
                answer = await response.json()
            assert (response.status, answer["error_type"], answer["error"]["param"]) == (422, error_type, param)
            assert served.engine.log == []

    asyncio.run(run())


def test_arguments_is_another_name_of_parameters(serving, client_of):
    async def run():
        async with serving() as served:
            of_family(served, HERMES)
            shown = []
            render = served.context.chat_template.render

            async def note(conversation):
                shown.extend(conversation.tools)
                return await render(conversation)

            served.context.chat_template.render = note
            tools = [{"function": {"name": "f", "arguments": {"type": "object"}, "x-note": 1}, "y": 2}]
            async with served.client.post("/v1/chat/completions", json={"messages": USER, "tools": tools}) as response:
                assert response.status == 200
            function = {"name": "f", "x-note": 1, "parameters": {"type": "object"}}
            assert shown == [{"type": "function", "function": function, "y": 2}]

    asyncio.run(run())


REASONED = f"<think>\nHm, Paris?\n</think>\n\n{TWO_CALLS}"


@pytest.mark.parametrize(("text", "prompt_end"), [(REASONED, ""), (REASONED.removeprefix("<think>\n"), "<think>\n")])
@pytest.mark.parametrize("tokens_at_once", [1, 7])
def test_reasoning_is_apart(serving, writer, client_of, text, prompt_end, tokens_at_once):
    async def run():
        async with serving(writer(text, tokens_at_once)) as served, client_of(served) as client:
            of_family(served, THINKING, prompt_end)
            options = {"model": "m", "messages": USER}
            whole = (await client.chat.completions.create(**options)).choices[0]
            assert whole.message.reasoning_content == "Hm, Paris?"
            assert whole.message.content == TWO_CALLS
            reasoning, content = "", ""
            async for chunk in await client.chat.completions.create(**options, stream=True):
                delta = chunk.choices[0].delta
                more = getattr(delta, "reasoning_content", None)
                assert more is None or (delta.content is None and content == "")
                reasoning += more or ""
                content += delta.content or ""
            assert (reasoning, content) == ("Hm, Paris?", whole.message.content)

    asyncio.run(run())


def test_a_continued_answer_is_past_its_reasoning(serving, writer, client_of):
    async def run():
        async with serving(writer("Paris.")) as served, client_of(served) as client:
            of_family(served, THINKING)
            for begun, is_reasoning in (("The answer:", False), ("<think>So", True), ("<think>So</think>It is", False)):
                messages = [*USER, {"role": "assistant", "content": begun}]
                answer = await client.chat.completions.create(model="m", messages=messages)
                message = answer.choices[0].message
                assert (message.content == "Paris.") != is_reasoning
                assert (getattr(message, "reasoning_content", None) == "Paris.") == is_reasoning

    asyncio.run(run())


def test_special_tokens_that_are_marks_reach_the_parser(serving):
    async def run():
        async with serving() as served:
            for family, fields, shown in (
                (HERMES, {"tools": TOOLS}, frozenset()),
                (ModelFamily(None, has_reasoning=False), {}, frozenset()),
            ):
                of_family(served, family)
                async with served.client.post("/v1/chat/completions", json={"messages": USER, **fields}) as response:
                    assert response.status == 200
                assert served.engine.log[-1].shown_special_ids == shown

    asyncio.run(run())


def test_the_clients_own_accumulator(serving, writer, client_of):
    """What `openai`'s stream helper makes of a stream is the whole answer."""

    async def run():
        async with serving(writer(TWO_CALLS)) as served, client_of(served) as client:
            of_family(served, HERMES)
            async with client.chat.completions.stream(model="m", messages=USER, tools=TOOLS) as stream:
                async for _ in stream:
                    pass
                completion = await stream.get_final_completion()
            [choice] = completion.choices
            assert choice.finish_reason == "tool_calls"
            # Its role is not looked at: the helper joins the roles of all chunks, and TGI's clients need one in each.
            assert choice.message.content == "Let me see."
            weather, time = choice.message.tool_calls
            assert (weather.type, weather.function.name) == ("function", "weather")
            assert json.loads(weather.function.arguments) == {"city": "Paris"}
            assert (time.function.name, time.function.arguments) == ("time", "{}")
            assert len({weather.id, time.id}) == 2
            assert len(weather.id) == len(time.id) < 40

    asyncio.run(run())
