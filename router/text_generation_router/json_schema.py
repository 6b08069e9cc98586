"""JSON Schema as a structure: which keywords hold further schemas, and what a reference refers to."""

from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import unquote

Schema = Any  # an object, true or false

_MAPS_OF_SCHEMAS = frozenset(("properties", "patternProperties", "$defs", "definitions", "dependentSchemas"))
_SCHEMAS = frozenset(
    (
        "allOf",
        "anyOf",
        "oneOf",
        "prefixItems",
        "items",
        "additionalItems",
        "unevaluatedItems",
        "contains",
        "additionalProperties",
        "unevaluatedProperties",
        "propertyNames",
        "not",
        "if",
        "then",
        "else",
    )
)
_DEFINITIONS = frozenset(("$defs", "definitions"))


def mapped(schema: Schema, function: Callable[[Schema], Schema]) -> Schema:
    """A copy with `function` applied to the schemas that stand directly in this one."""
    if not isinstance(schema, dict):
        return schema
    copy: dict[str, Any] = {}
    for key, value in schema.items():
        if key in _MAPS_OF_SCHEMAS and isinstance(value, dict):
            copy[key] = {name: function(item) for name, item in value.items()}
        elif key in _SCHEMAS and isinstance(value, list):
            copy[key] = [function(item) for item in value]
        else:
            copy[key] = function(value) if key in _SCHEMAS else value
    return copy


def reachable(root: Schema) -> list[dict[str, Any]]:
    """Every schema object that counts: the root, what stands in it, and what is referred to."""
    found: dict[int, dict[str, Any]] = {}
    waiting: list[Schema] = [root]
    while waiting:
        schema = waiting.pop()
        if isinstance(schema, dict) and id(schema) not in found:
            found[id(schema)] = schema
            waiting += _inner(schema)
            if (target := referred(root, schema.get("$ref"))) is not None:
                waiting.append(target)
    return list(found.values())


def _inner(schema: dict[str, Any]) -> Iterator[Schema]:
    for key, value in schema.items():
        if key in _MAPS_OF_SCHEMAS and key not in _DEFINITIONS and isinstance(value, dict):
            yield from value.values()
        elif key in _SCHEMAS:
            yield from value if isinstance(value, list) else (value,)


def referred(root: Schema, reference: Any) -> Schema | None:
    """What a reference within the document points to; None for any other, and for one that points nowhere."""
    if not isinstance(reference, str) or not reference.startswith("#"):
        return None
    pointer = unquote(reference[1:])
    if pointer and not pointer.startswith("/"):
        return None  # an anchor
    value = root
    for part in pointer.split("/")[1:]:
        part = part.replace("~1", "/").replace("~0", "~")
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdecimal() and len(part) < 10 and int(part) < len(value):
            value = value[int(part)]
        else:
            return None
    return value
