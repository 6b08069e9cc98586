"""What is refused of a grammar, and what the matcher of its canonical text accepts, by JSON Schema's own words."""

import json

import pytest
from text_generation_proto.matcher import InvalidGrammar, TokenTable
from text_generation_router.chat_output.forced import NO_TOOL
from text_generation_router.errors import ToolError
from text_generation_router.grammar import Grammar
from text_generation_router.grammar_text import canonical_text
from text_generation_router.model_family import Reasoning
from text_generation_router.schema_checks import UNSUPPORTED_KEYWORDS, RefusedGrammar
from text_generation_router.tool_grammar import tool_grammar

EOS = 256
BYTES = TokenTable([*(bytes([byte]) for byte in range(256)), b""], [EOS])


def canonical(grammar: Grammar) -> str:
    return canonical_text(grammar, BYTES)


def accepts(grammar: Grammar, text: str) -> bool:
    matcher = BYTES.compile(canonical(grammar))
    tokens = list(text.encode())
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


@pytest.mark.parametrize("keyword", sorted(UNSUPPORTED_KEYWORDS))
@pytest.mark.parametrize("place", ["properties", "items", "anyOf", "$ref", "prefixItems", "additionalProperties"])
def test_unsupported_keywords_are_named_wherever_they_stand(keyword, place):
    inner = {keyword: True, "title": "x"}
    schema = {
        "properties": {"properties": {"not": inner}},
        "items": {"items": inner},
        "anyOf": {"anyOf": [{"type": "string"}, inner]},
        "$ref": {"$ref": "#/$defs/a~1b", "$defs": {"a/b": inner}},
        "prefixItems": {"prefixItems": [inner]},
        "additionalProperties": {"additionalProperties": inner},
    }[place]
    with pytest.raises(RefusedGrammar) as caught:
        canonical(Grammar.from_schema(schema))
    assert str(caught.value).endswith(f"not supported: `{keyword}`")


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {"not": {"type": "string"}, "if": {}}},
        {"enum": [{"not": 1}]},
        {"const": {"contains": [1]}},
        {"$defs": {"unused": {"not": {}}}, "type": "string"},
        {"uniqueItems": False},
        {"x-anything": {"not": {}}, "title": "not", "description": "if", "examples": [{"then": 1}]},
    ],
)
def test_names_and_data_are_no_keywords(schema):
    BYTES.compile(canonical(Grammar.from_schema(schema)))


TREE = {"type": "object", "properties": {"v": {"type": "integer"}, "c": {"type": "array", "items": {"$ref": "#"}}}}


@pytest.mark.parametrize(
    ("schema", "ends"),
    [
        (TREE | {"required": ["v", "c"]}, True),
        ({"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}}, True),
        ({"type": "object", "properties": {"next": {"$ref": "#"}}}, True),
        ({"type": "object", "properties": {"next": {"$ref": "#"}}, "required": ["next"]}, False),
        ({"properties": {"next": {"$ref": "#"}}, "required": ["next"]}, False),
        ({"type": "array", "items": {"$ref": "#"}, "minItems": 1}, False),
        ({"type": "array", "items": {"$ref": "#"}}, True),
        ({"type": ["array", "null"], "items": {"$ref": "#"}, "minItems": 1}, True),
        ({"$ref": "#"}, False),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}, False),
        ({"anyOf": [{"$ref": "#"}, {"type": "array", "prefixItems": [{"$ref": "#"}], "minItems": 1}]}, False),
        ({"allOf": [{"type": "string"}, {"$ref": "#"}]}, False),
        ({"oneOf": [{"const": 1}, {"type": "array", "items": {"$ref": "#"}, "minItems": 1}]}, True),
        (False, False),
    ],
)
def test_schemas_that_no_value_completes(schema, ends):
    grammar = Grammar.from_schema(schema)
    if ends:
        BYTES.compile(canonical(grammar))
    else:
        with pytest.raises(RefusedGrammar):
            canonical(grammar)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "not JSON"),
        ("[]", "must be a JSON schema"),
        ("5", "must be a JSON schema"),
        (json.dumps({"minProperties": 2}), "minProperties"),
        ('{"items":' * 130 + "{}" + "}" * 130, "deep"),
    ],
)
def test_schemas_that_are_none(text, reason):
    with pytest.raises(RefusedGrammar, match=reason):
        canonical(Grammar.from_schema(text))


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "foo"},
        {"minLength": -1, "type": "string"},
        {"properties": []},
        {"required": "a"},
        {"pattern": "(?=a)b", "type": "string"},
        {"format": "no-such-format", "type": "string"},
        {"minimum": 5, "maximum": 3, "type": "integer"},
        {"$ref": "http://example.com/schema"},
        {"$ref": "#/$defs/missing"},
        {"format": "no-such-format", "x-guidance": {"lenient": True}},
        {"oneOf": [{"type": "number"}, {"type": "integer"}], "x-guidance": {"coerce_one_of": True}},
    ],
)
def test_schemas_that_the_matcher_refuses(schema):
    with pytest.raises((InvalidGrammar, RefusedGrammar)):
        BYTES.compile(canonical(Grammar.from_schema(schema)))


A, B = ({"type": "object", "properties": {name: {"type": "integer"}}} for name in "ab")
NEEDS_A, NEEDS_B = A | {"required": ["a"]}, B | {"required": ["b"]}
KINDS = [{"type": "object", "properties": {"k": {"const": kind}}, "required": ["k"]} for kind in "xy"]
# What the documentation of TGI shows: a schema of an object that does not say so.
UNTYPED = {"properties": {"a": {"type": "integer"}, "b": {"properties": {"c": {}}}}, "required": ["a"]}


def test_branches_that_only_closed_objects_keep_apart():
    """`{"b": 1}` is valid for both, if it is for one."""
    for branches in ([A, NEEDS_B], [{**NEEDS_A, "properties": {"a": A}}, {**NEEDS_A, "properties": {"a": NEEDS_B}}]):
        with pytest.raises(InvalidGrammar):
            canonical(Grammar.from_schema({"oneOf": branches}))
        canonical(Grammar.from_schema({"anyOf": branches}))
    with pytest.raises(InvalidGrammar):
        canonical(Grammar.from_schema({"oneOf": [UNTYPED, {"type": "string"}]}))


NAMED = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {}}, "required": ["a"]}


@pytest.mark.parametrize(
    ("schema", "text", "is_accepted"),
    [
        (NAMED, '{"a": 1}', True),
        (NAMED, '{"a":1,"b":null}', True),
        (NAMED, '{"a": 1, "c": 2}', False),  # nothing that was not asked for
        (NAMED | {"additionalProperties": True}, '{"a": 1, "c": 2}', True),
        (NAMED | {"patternProperties": {"^x": {"type": "integer"}}}, '{"a":1,"xy":2}', True),
        (NAMED | {"required": ["c"]}, '{"c": 2}', True),
        ({"allOf": [NAMED, {"properties": {"c": {"const": 1}}}]}, '{"a":1,"c":1}', True),
        ({"anyOf": [NAMED, {"type": "null"}]}, '{"a":1,"c":1}', False),
        ({"$ref": "#/$defs/n", "required": ["c"], "$defs": {"n": NAMED}}, '{"a":1,"c":1}', True),
        ({"type": "object"}, '{"any": {"thing": []}}', True),
        ({"oneOf": KINDS}, '{"k":"y"}', True),
        ({"oneOf": KINDS}, '{"k":"y","c":1}', False),
        (UNTYPED, '"a"', False),
        (UNTYPED, "1", False),
        (UNTYPED, '{"a":1,"b":{"c":[]}}', True),
        (UNTYPED, '{"a":1,"b":2}', False),
        (UNTYPED, '{"a":1,"d":2}', False),
        (UNTYPED | {"enum": [1, {"a": 2}]}, "1", True),
        ({"allOf": [UNTYPED, {"type": "string"}]}, '"a"', True),
        (NAMED, '{\n    "a": 1\n}', True),
        (NAMED, '{\n\t\t"a": 1\n\t}', True),
        (NAMED, '{\n\n"a": 1}', False),
        (NAMED, '{  "a": 1}', False),
        (NAMED, '{\n' + " " * 33 + '"a": 1}', False),
        (NAMED, ' {"a": 1}', False),
        (NAMED, '{"a": 1} ', False),
        (NAMED, '{"a": 1}{"a": 1}', False),
        ({"type": "string"}, '"é\\n😀"', True),
        ({"type": "string"}, '"\n"', False),
        (True, "[1, {}, null]", True),
    ],
)  # fmt: skip
def test_what_is_accepted(schema, text, is_accepted):
    assert accepts(Grammar.from_schema(schema), text) == is_accepted


@pytest.mark.parametrize(
    ("pattern", "text", "is_accepted"),
    [
        ("[0-9]{3}-[0-9]{4}", "555-1234", True),
        ("[0-9]{3}-[0-9]{4}", "555-12345", False),
        (r"^a/b\d$", "a/b7", True),
        ("^(a|b)$|^c$", "c", True),
        (r"\d+", "٣", False),
        ("a\nb", "a\nb", True),
        ('"quoted" \\\\', '"quoted" \\', True),
        (r"((25[0-5]|2[0-4]\d|[01]?\d\d?)\.){3}(25[0-5]|2[0-4]\d|[01]?\d\d?)", "127.0.0.1", True),
        (".", "\n", False),
        ("", "", True),
        ("é+", "éé", True),
        ("/\nstart: other\nother: /b", "b", False),
    ],
)
def test_regular_expressions_match_the_whole_text(pattern, text, is_accepted):
    assert accepts(Grammar.from_regex(pattern), text) == is_accepted


@pytest.mark.parametrize("pattern", ["(", "a{2,1}", r"(a)\1", "(?=a)a", r"\bfoo", "[", "\\", "a\\", "a^b"])
def test_regular_expressions_that_are_refused(pattern):
    with pytest.raises((RefusedGrammar, InvalidGrammar)):
        BYTES.compile(canonical(Grammar.from_regex(pattern)))


@pytest.mark.parametrize("grammar", [Grammar.from_schema(NAMED), Grammar.from_regex(r'\{"a": [0-9]\}')])
def test_a_grammar_after_reasoning(grammar):
    text = '{"a": 1}'
    thought = 'Hm, {"a": 2}? é\n</think>\n\n'
    for reasoning, accepted, refused in (
        (Reasoning.NONE, [text], [thought + text, "<think>" + thought + text]),
        (Reasoning.POSSIBLE, [text, "<think>" + thought + text], [thought + text, "<think>" + text]),
        (Reasoning.BEGUN, [thought + text, "</think>" + text], [text, thought + thought + text]),
    ):
        told = Grammar(grammar.kind, grammar.text, reasoning)
        assert all(accepts(told, each) for each in accepted), reasoning
        assert not any(accepts(told, each) for each in refused), reasoning


WEATHER = {
    "type": "object",
    "properties": {"city": {"$ref": "#/definitions/city"}, "days": {"type": "integer", "minimum": 1}},
    "required": ["city"],
    "definitions": {"city": {"enum": ["Paris", "Rome"]}},
}
TOOLS = [
    {"function": {"name": "weather", "parameters": WEATHER}},
    {"function": {"name": "time"}},
    {"function": {"name": "list", "parameters": {"properties": {"next": {"$ref": "#"}, "const": {"type": "string"}}}}},
]


@pytest.mark.parametrize(
    ("function", "is_accepted"),
    [
        ({"_name": "weather", "city": "Paris"}, True),
        ({"_name": "weather", "city": "Rome", "days": 3}, True),
        ({"_name": "weather", "city": "Oslo"}, False),
        ({"_name": "weather", "city": "Rome", "days": 0}, False),
        ({"_name": "weather"}, False),
        ({"city": "Paris"}, False),
        ({"_name": "time"}, True),
        ({"_name": "time", "zone": "x"}, False),
        ({"_name": "list", "next": {"next": {"const": "a"}}}, True),
        ({"_name": "other"}, False),
        ({"_name": NO_TOOL, "content": "Hello"}, True),
    ],
)
def test_one_call_of_one_of_the_tools(function, is_accepted):
    text = json.dumps({"function": function})
    assert accepts(tool_grammar(TOOLS, may_call_none=True), text) == is_accepted
    may = is_accepted and function["_name"] != NO_TOOL
    assert accepts(tool_grammar(TOOLS, may_call_none=False), text) == may


@pytest.mark.parametrize("parameters", [{"type": "array"}, {"properties": {"_name": {}}}, {"required": "a"}, [1]])
def test_parameters_that_cannot_be_arguments(parameters):
    with pytest.raises(ToolError):
        tool_grammar([{"function": {"name": "f", "parameters": parameters}}], may_call_none=False)
