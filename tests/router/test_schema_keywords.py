"""No keyword of JSON Schema is ignored, in any draft: it is kept to, or refused. What is no schema is refused."""

import json
from typing import Any

import jsonschema
import pytest
from jsonschema_specifications import REGISTRY
from text_generation_proto.matcher import TokenTable
from text_generation_router.grammar import Grammar
from text_generation_router.grammar_text import canonical_text
from text_generation_router.schema_checks import UNSUPPORTED_KEYWORDS, RefusedGrammar

BYTES = TokenTable([*(bytes([byte]) for byte in range(256)), b""], [256])
# They rule no value out by themselves. Those of contents are notes since draft 2019-09.
NOTES = {
    "$schema", "$comment", "$vocabulary", "$id", "id", "title", "description", "default", "examples", "deprecated",
    "readOnly", "writeOnly", "contentEncoding", "contentMediaType", "contentSchema",
}  # fmt: skip
# Of each keyword a schema, a value that it takes, and one that the keyword alone rules out.
KEPT: list[tuple[str, dict[str, Any], Any, Any]] = [
    ("$anchor", {"$ref": "#a", "$defs": {"x": {"$anchor": "a", "type": "integer"}}}, 1, "a"),
    ("$defs", {"$ref": "#/$defs/x", "$defs": {"x": {"type": "integer"}}}, 1, "a"),
    ("$ref", {"$ref": "#/definitions/x", "minimum": 3, "definitions": {"x": {"type": "integer"}}}, 3, 1),
    ("definitions", {"$ref": "#/definitions/x", "definitions": {"x": {"type": "integer"}}}, 1, "a"),
    ("additionalItems", {"type": "array", "items": [{"type": "integer"}], "additionalItems": False}, [1], [1, 2]),
    ("additionalProperties", {"type": "object", "additionalProperties": {"type": "integer"}}, {"a": 1}, {"a": "b"}),
    ("allOf", {"allOf": [{"type": "integer"}, {"minimum": 3}]}, 3, 1),
    ("anyOf", {"anyOf": [{"type": "integer"}, {"type": "null"}]}, None, "a"),
    ("const", {"const": 1}, 1, 2),
    ("enum", {"enum": [1, "a"]}, "a", 2),
    ("exclusiveMaximum", {"exclusiveMaximum": 3}, 2, 3),
    ("exclusiveMaximum", {"type": "number", "maximum": 3, "exclusiveMaximum": True}, 2, 3),
    ("exclusiveMinimum", {"exclusiveMinimum": 3}, 4, 3),
    ("exclusiveMinimum", {"type": "number", "minimum": 3, "exclusiveMinimum": True}, 4, 3),
    ("format", {"type": "string", "format": "date"}, "2026-01-02", "2026-13-02"),
    ("items", {"items": {"type": "integer"}}, [1], ["a"]),
    ("items", {"type": "array", "items": [{"type": "integer"}]}, [1, "a"], ["a"]),
    ("maxItems", {"maxItems": 1}, [1], [1, 2]),
    ("maxLength", {"maxLength": 1}, "a", "ab"),
    ("maxProperties", {"type": "object", "maxProperties": 1}, {"a": 1}, {"a": 1, "b": 2}),
    ("maximum", {"maximum": 1}, 1, 2),
    ("minItems", {"minItems": 1}, [1], []),
    ("minLength", {"minLength": 1}, "a", ""),
    ("minProperties", {"minProperties": 1}, {"a": 1}, {}),
    ("minimum", {"minimum": 1}, 1, 0),
    ("multipleOf", {"multipleOf": 3}, 6, 4),
    ("oneOf", {"oneOf": [{"type": "integer"}, {"type": "string"}]}, 1, None),
    ("pattern", {"pattern": "^a$"}, "a", "b"),
    ("patternProperties", {"type": "object", "patternProperties": {"^a": {"type": "integer"}}}, {"ab": 1}, {"ab": "x"}),
    ("prefixItems", {"prefixItems": [{"type": "integer"}]}, [1, "a"], ["a"]),
    ("properties", {"properties": {"a": {"type": "integer"}}}, {"a": 1}, {"a": "x"}),
    ("required", {"required": ["a"]}, {"a": 1}, {}),
    ("type", {"type": ["integer", "null"]}, None, "a"),
]  # fmt: skip


def accepts(schema: Any, value: Any) -> bool:
    matcher = BYTES.compile(canonical_text(Grammar.from_schema(schema), BYTES))
    tokens = list(json.dumps(value).encode())
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


def test_every_keyword_of_every_draft_is_here() -> None:
    keywords = {keyword for uri in REGISTRY for keyword in REGISTRY.contents(uri).get("properties", {})}
    assert len(keywords) > 60
    assert NOTES | UNSUPPORTED_KEYWORDS | {keyword for keyword, *_ in KEPT} == keywords
    assert UNSUPPORTED_KEYWORDS.isdisjoint(keyword for keyword, *_ in KEPT)


@pytest.mark.parametrize(("keyword", "schema", "good", "bad"), KEPT, ids=[case[0] for case in KEPT])
def test_what_is_kept(keyword: str, schema: dict[str, Any], good: Any, bad: Any) -> None:
    assert accepts(schema, good)
    assert not accepts(schema, bad)


VALUES = [None, True, -1, 1.5, 1, "a", "string", [], ["a"], ["string", "null"], [{}], [1], {}, {"a": 1}, {"a": {}}]
# Draft 4 has booleans here, and drafts before 2020-12 lists.
OLDER = [("exclusiveMinimum", True), ("exclusiveMaximum", True), ("items", [{}])]
CHECKED = {keyword for keyword, *_ in KEPT} - {"$ref", "$anchor", "additionalItems"}


def is_valid(schema: dict[str, Any]) -> bool:
    """By the draft's own schema of schemas."""
    try:
        jsonschema.Draft202012Validator.check_schema(schema)
    except jsonschema.SchemaError:
        return False
    return True


def is_taken(schema: dict[str, Any]) -> bool:
    try:
        canonical_text(Grammar.from_schema(schema), BYTES)
    except RefusedGrammar:
        return False
    return True


@pytest.mark.parametrize("keyword", sorted(CHECKED))
def test_values_of_keywords_are_those_of_the_draft(keyword: str) -> None:
    """Where the keyword has no effect, too: of a boolean."""
    for value in VALUES:
        if json.dumps([keyword, value]) not in map(json.dumps, OLDER):
            schema = {"anyOf": [{"type": "boolean"} | {keyword: value}, {"const": 0}]}
            assert is_taken(schema) == is_valid(schema), value


@pytest.mark.parametrize(("keyword", "value"), OLDER)
def test_values_of_older_drafts(keyword: str, value: Any) -> None:
    assert is_taken({"anyOf": [{"type": "boolean", keyword: value}, {"const": 0}]})


def test_what_is_no_schema_is_named() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer", "required": True}}}
    with pytest.raises(RefusedGrammar, match="`required` must be a list of strings"):
        canonical_text(Grammar.from_schema(schema), BYTES)
