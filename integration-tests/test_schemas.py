"""Text of a given schema through the whole server: it ends by itself, parses, and is valid to `jsonschema`."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import jsonschema
import pytest

if TYPE_CHECKING:
    from conftest import Server

FORMATS = jsonschema.FormatChecker(["date", "ipv4", "uuid"])
SHORT = {"type": "string", "maxLength": 6}
DIGIT = {"type": "integer", "minimum": 0, "maximum": 9}
POINT = {"type": "object", "properties": {"x": DIGIT, "y": DIGIT}, "required": ["x", "y"]}
# The longest text of each is bounded: the model is random, and would go on.
SCHEMAS: dict[str, Any] = {
    "object": {"type": "object", "properties": {"name": SHORT, "age": DIGIT}, "required": ["name", "age"]},
    "optional members": {"type": "object", "properties": {"a": SHORT, "b": DIGIT, "c": {"type": "null"}}},
    "no type": {"properties": {"a": DIGIT}, "required": ["a"]},
    "nested": {"type": "object", "properties": {"at": POINT, "to": {"anyOf": [POINT, {"type": "null"}]}}},
    "array": {"type": "array", "items": POINT, "minItems": 1, "maxItems": 3},
    "tuple": {"type": "array", "prefixItems": [DIGIT, SHORT], "items": False, "minItems": 2},
    "tuple of an older draft": {"type": "array", "items": [DIGIT, SHORT], "additionalItems": False, "minItems": 1},
    "enum": {"enum": ["red", "grün", 3, None, True, ["x"], {"a": 1}]},
    "const": {"const": {"π": [1, 2.5, "ü"]}},
    "several types": {"type": ["boolean", "null"]},
    "string of bounds": {"type": "string", "minLength": 3, "maxLength": 5},
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{4}$"},
    "date": {"type": "string", "format": "date"},
    "address": {"type": "string", "format": "ipv4"},
    "identifier": {"type": "string", "format": "uuid"},
    "bounds": {"type": "integer", "exclusiveMinimum": -5, "maximum": 12},
    "bounds of an older draft": {"type": "integer", "minimum": 3, "exclusiveMinimum": True, "maximum": 5},
    "multiple": {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 70},
    "any of": {"anyOf": [{"type": "boolean"}, {"type": "array", "items": DIGIT, "maxItems": 2}]},
    "one of": {"oneOf": [{"type": "null"}, {"type": "object", "properties": {"k": DIGIT}, "required": ["k"]}]},
    "all of": {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 8}]},
    "definitions": {
        "type": "object",
        "properties": {"a": {"$ref": "#/$defs/p"}, "b": {"$ref": "#/$defs/p"}},
        "required": ["a"],
        "$defs": {"p": POINT},
    },
    "members by pattern": {
        "type": "object",
        "patternProperties": {"^k[0-9]$": DIGIT},
        "additionalProperties": False,
        "minProperties": 1,
        "maxProperties": 2,
    },
    "no others": {"type": "object", "properties": {"a": DIGIT}, "required": ["a"], "additionalProperties": False},
}


def texts(server: Server, name: str, seed: int) -> list[tuple[str, str]]:
    """Whole and streamed, in both dialects: the text, and why it ended."""
    schema, found = SCHEMAS[name], []
    parameters = {
        "grammar": {"type": "json", "value": schema},
        "max_new_tokens": 600,
        "details": True,
        "do_sample": True,
        "seed": seed,
    }
    whole = server.generate(name, **parameters)
    found.append((whole["generated_text"], whole["details"]["finish_reason"]))
    *_, last = server.events("/generate_stream", {"inputs": name, "parameters": parameters})
    found.append((last["generated_text"], last["details"]["finish_reason"]))
    body = {
        "messages": [{"role": "user", "content": name}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "it", "schema": schema, "strict": True}},
        "max_tokens": 600,
        "seed": seed,
    }
    reply = server.post("/v1/chat/completions", body)
    assert reply.status == 200, reply.body
    (choice,) = reply.json()["choices"]
    found.append((choice["message"]["content"], choice["finish_reason"]))
    *events, done = server.events("/v1/chat/completions", {**body, "stream": True})
    assert done == "[DONE]"
    parts = [event["choices"][0] for event in events]
    found.append(("".join(part["delta"]["content"] for part in parts), parts[-1]["finish_reason"]))
    return found


def test_texts_are_valid(tiny: Server) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = pool.map(lambda name: texts(tiny, name, seed=len(name)), SCHEMAS)
    for (name, schema), found in zip(SCHEMAS.items(), answers, strict=True):
        generated, streamed, chat, chat_stream = found
        assert generated == streamed
        assert chat == chat_stream
        assert (generated[1], chat[1]) == ("eos_token", "stop"), (name, found)
        for text, _ in found:
            jsonschema.Draft202012Validator(as_of_2020(schema), format_checker=FORMATS).validate(json.loads(text))


def as_of_2020(schema: Any) -> Any:
    """The same in the words of the newest draft."""
    if isinstance(schema.get("items"), list):
        return {**schema, "prefixItems": schema["items"], "items": schema["additionalItems"]}
    if schema.get("exclusiveMinimum") is True:
        return {**schema, "exclusiveMinimum": schema["minimum"]}
    return schema


@pytest.mark.parametrize("path", ["/generate", "/v1/chat/completions", "/v1/completions"])
def test_what_cannot_be_kept_is_refused(tiny: Server, path: str) -> None:
    for keyword, value in (("not", {}), ("uniqueItems", True), ("contains", {}), ("dependentRequired", {"a": ["b"]})):
        form = {"type": "json_schema", "json_schema": {"name": "it", "schema": {"items": {keyword: value}}}}
        body: dict[str, Any] = {"response_format": form}
        if path == "/generate":
            body = {"inputs": "a", "parameters": {"grammar": {"type": "json", "value": {"items": {keyword: value}}}}}
        elif path == "/v1/completions":
            body["prompt"] = "a"
        else:
            body["messages"] = [{"role": "user", "content": "a"}]
        reply = tiny.post(path, body)
        assert reply.status == 422
        assert f"`{keyword}`" in str(reply.json()["error"])
