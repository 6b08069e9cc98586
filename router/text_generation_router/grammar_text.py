"""A grammar's canonical text: what a plan carries and text_generation_proto.matcher compiles.

It is llguidance's JSON form. The model chooses its tokens freely: every way to cut legal text into tokens is legal.
"""

from typing import Any

import orjson
from llguidance import regex_to_lark
from text_generation_proto.matcher import TokenTable

from text_generation_router.grammar import Grammar, GrammarKind
from text_generation_router.json_schema import Schema, mapped, reachable
from text_generation_router.model_family import THINK_END, THINK_START, Reasoning
from text_generation_router.schema_checks import RefusedGrammar, check_schema

MAX_LEVELS = 64  # of a schema; the library's own reader ends at 128 levels of JSON, two for each property
# Between the parts of JSON: nothing, a space, or a new line with its indentation. So no run of it goes on for ever.
WHITE_SPACE = r" |\n[ \t]{0,32}"
_OPTIONS = "x-guidance"  # the library's key for its options; a client's own would change what is checked
_SETTINGS = '%llguidance {"no_forcing": true}'
_BEGINNINGS = {
    Reasoning.NONE: "start: text",
    Reasoning.POSSIBLE: "start: (opening reasoning gap)? text",
    Reasoning.BEGUN: "start: reasoning gap text",
}
_REASONING = (
    f"opening: /\\s{{0,4}}{THINK_START}/",
    f'reasoning[suffix="{THINK_END}"]: /(?s:.*)/',
    r"gap: /\s{0,8}/",
)
# Keywords about the members of an object.
_MEMBER_KEYWORDS = frozenset(
    ("properties", "patternProperties", "additionalProperties", "required", "minProperties", "maxProperties")
)
_BRANCHES = frozenset(("anyOf", "oneOf", "$ref"))
# What says of which type a value is, beside `type`.
_TYPING = _BRANCHES | {"type", "const", "enum"}


def canonical_text(grammar: Grammar, tokens: TokenTable) -> str:
    """The text for a client's grammar; raises RefusedGrammar, and InvalidGrammar of one that `tokens` cannot compile.

    Not all that raises neither can be compiled.
    """
    if grammar.kind is GrammarKind.REGEX:
        return _text(grammar, _regex_rule(grammar.text))
    try:
        schema = orjson.loads(grammar.text)
    except orjson.JSONDecodeError as error:
        raise RefusedGrammar(f"is not JSON: {error}") from None
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise RefusedGrammar("must be a JSON schema: an object, or true")
    _check_depth(schema)
    schema = _without_neutral(schema)
    narrow = _typed(schema)
    check_schema(narrow)
    if _can_be_closed(narrow):
        narrow = _closed(narrow)
    if narrow != schema and any("oneOf" in one for one in reachable(schema)):
        # What excludes each other only once it is narrow still overlaps for who reads the client's own schema.
        tokens.compile(_schema_text(grammar, schema))
    return _schema_text(grammar, narrow)


def _schema_text(grammar: Grammar, schema: dict[str, Any]) -> str:
    schema = schema | {_OPTIONS: {"whitespace_pattern": WHITE_SPACE}}
    return _text(grammar, "text: @schema", {"name": "schema", "json_schema": schema})


def _regex_rule(pattern: str) -> str:
    num_backslashes = len(pattern) - len(pattern.rstrip("\\"))
    if num_backslashes % 2:
        raise RefusedGrammar("is not a regular expression: it ends in the middle of an escape")
    return f"text: /{regex_to_lark(pattern, 'dw')}/"


def _text(grammar: Grammar, rule: str, *others: dict[str, Any]) -> str:
    before = () if grammar.reasoning is Reasoning.NONE else _REASONING
    rules = "\n".join((_SETTINGS, _BEGINNINGS[grammar.reasoning], *before, rule))
    return orjson.dumps({"grammars": [{"lark_grammar": rules}, *others]}).decode()


def _check_depth(schema: dict[str, Any]) -> None:
    level: list[Any] = [schema]
    for _ in range(2 * MAX_LEVELS - 4):
        inner: list[Any] = []
        for value in level:
            inner += value.values() if isinstance(value, dict) else value
        level = [value for value in inner if isinstance(value, (dict, list))]
        if not level:
            return
    raise RefusedGrammar(f"is nested more than {MAX_LEVELS} levels deep")


def _without_neutral(schema: Schema) -> Schema:
    """Without what asks for nothing, but is not known to the library; and without options for it."""
    copy = mapped(schema, _without_neutral)
    if isinstance(copy, dict):
        copy.pop(_OPTIONS, None)
        if copy.get("uniqueItems") is False:
            del copy["uniqueItems"]
    return copy


def _typed(schema: Schema) -> Schema:
    """With `type: object` where properties are named and nothing tells the type.

    To JSON Schema a text or a number is valid there; who names properties means an object. All that can be written is
    valid either way, so long as no other schema of an `allOf` asks for something else.
    """
    copy = mapped(schema, _typed)
    if isinstance(copy, dict):
        if "allOf" in copy:
            copy["allOf"] = schema["allOf"]
        elif isinstance(copy.get("properties"), dict) and not copy.keys() & _TYPING:
            copy["type"] = "object"
    return copy


def _can_be_closed(root: Schema) -> bool:
    """Whether no object is described by several schemas at once, each of which must leave room for the others."""
    for schema in reachable(root):
        branches = schema.keys() & _BRANCHES
        if "allOf" in schema or len(branches) > 1 or (branches and schema.keys() & _MEMBER_KEYWORDS):
            return False
    return True


def _closed(schema: Schema) -> Schema:
    """With `additionalProperties: false` where properties are named and nothing is said of others.

    A model may stop then once it has written what was asked for. All that it can write is valid either way.
    """
    copy = mapped(schema, _closed)
    if not isinstance(copy, dict) or copy.keys() & _MEMBER_KEYWORDS - {"properties", "required"}:
        return copy
    properties, required = copy.get("properties"), copy.get("required", [])
    if isinstance(properties, dict) and isinstance(required, list) and _are_in(required, properties):
        copy["additionalProperties"] = False
    return copy


def _are_in(names: list[Any], properties: dict[str, Any]) -> bool:
    return all(isinstance(name, str) and name in properties for name in names)
