"""Text of a given form and tool calls, as each client asks for them: all are the same question, asked greedily."""

import json
from typing import Any

QUESTION = "What is the weather in Paris?"
MESSAGES = [{"role": "user", "content": QUESTION}]
PROMPT = "Paris in JSON: "
# As TGI's own documentation writes schemas: without a type.
SCHEMA = {"properties": {"city": {"type": "string", "maxLength": 12}, "big": {"type": "boolean"}}}
SCHEMA["required"] = ["city", "big"]  # type: ignore[assignment]
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}},
    "required": ["city"],
}
FUNCTION = {"name": "get_weather", "description": "Weather of a city", "parameters": PARAMETERS}
TOOL = {"type": "function", "function": FUNCTION}
JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "city", "schema": SCHEMA, "strict": True}}


def hub_structured(url: str) -> Any:
    from huggingface_hub import InferenceClient

    raw, client = InferenceClient(model=url, timeout=120), InferenceClient(base_url=url, timeout=120)
    grammar = {"type": "json", "value": SCHEMA}
    options = {"max_tokens": 60, "temperature": 0}
    tools = {"tools": [TOOL], "tool_choice": {"function": {"name": "get_weather"}}, **options}
    whole = client.chat_completion(MESSAGES, **tools)
    deltas = [chunk.choices[0].delta for chunk in client.chat_completion(MESSAGES, stream=True, **tools)]
    pieces = [call.function for delta in deltas for call in delta.tool_calls or []]
    return {
        "raw": json.loads(raw.text_generation(PROMPT, max_new_tokens=60, grammar=grammar, return_full_text=False)),
        "chats": [
            json.loads(client.chat_completion(MESSAGES, response_format=one, **options).choices[0].message.content)
            for one in (JSON_SCHEMA, {"type": "json_object", "value": SCHEMA})
        ],
        "calls": [
            [_call(call.function.name, call.function.arguments) for call in whole.choices[0].message.tool_calls],
            [_call(pieces[0].name, "".join(piece.arguments for piece in pieces))],
        ],
    }


def tgi_structured(url: str) -> Any:
    from text_generation import Client
    from text_generation.types import Grammar, Message, Tool

    client = Client(url, timeout=120)
    text = client.generate(PROMPT, max_new_tokens=60, grammar=Grammar(type="json", value=SCHEMA)).generated_text
    # Its streams of calls are those of TGI 2, with one call in place of a list.
    whole = client.chat(
        [Message(role="user", content=QUESTION)],
        tools=[Tool(**TOOL)],
        tool_choice="get_weather",
        max_tokens=60,
        temperature=0,
    )
    calls = [one["function"] for one in whole.choices[0].message.tool_calls]
    return {"raw": json.loads(text), "calls": [[_call(one["name"], one["arguments"]) for one in calls]]}


def litellm_structured(url: str) -> Any:
    import litellm

    options = {"model": "openai/tgi", "api_base": f"{url}/v1", "api_key": "none", "temperature": 0, "max_tokens": 60}
    tools = {"tools": [TOOL], "tool_choice": "required", **options}
    whole = litellm.completion(messages=MESSAGES, **tools)
    built = litellm.stream_chunk_builder([*litellm.completion(messages=MESSAGES, stream=True, **tools)])
    formed = litellm.completion(messages=MESSAGES, response_format=JSON_SCHEMA, **options)
    return {
        "chats": [json.loads(formed.choices[0].message.content)],
        "calls": [
            [_call(call.function.name, call.function.arguments) for call in one.choices[0].message.tool_calls]
            for one in (whole, built)
        ],
    }


def langchain_structured(url: str) -> Any:
    from langchain_huggingface import ChatHuggingFace, HuggingFaceEndpoint

    greedy = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None, "typical_p": None}
    endpoint = HuggingFaceEndpoint(endpoint_url=url, max_new_tokens=60, **greedy)
    model = ChatHuggingFace(llm=endpoint, temperature=0)
    schema = {"title": "City", "description": "A city.", "type": "object", **SCHEMA}
    whole = model.bind_tools([TOOL], tool_choice="required").invoke(QUESTION)
    return {
        "chats": [
            model.with_structured_output(schema, method=method).invoke(QUESTION)
            for method in ("function_calling", "json_schema")
        ],
        "calls": [[[call["name"], call["args"]] for call in whole.tool_calls]],
    }


def _call(name: str, arguments: str) -> list[Any]:
    return [name, json.loads(arguments)]
