"""What is refused of a JSON schema before it is compiled, by name: what would otherwise be ignored or never end."""

from collections.abc import Callable
from typing import Any

from text_generation_router.json_schema import Schema, reachable, referred

# No value of these can be ruled out while text is generated from left to right.
UNSUPPORTED_KEYWORDS = frozenset(
    (
        "not",
        "if",
        "then",
        "else",
        "contains",
        "minContains",
        "maxContains",
        "uniqueItems",
        "propertyNames",
        "dependencies",
        "dependentRequired",
        "dependentSchemas",
        "unevaluatedItems",
        "unevaluatedProperties",
        "$dynamicRef",
        "$dynamicAnchor",
        "$recursiveRef",
        "$recursiveAnchor",
        # Of draft 3.
        "disallow",
        "divisibleBy",
        "extends",
    )
)
_TYPES = frozenset(("array", "boolean", "integer", "null", "number", "object", "string"))


class RefusedGrammar(ValueError):
    """A grammar that is not valid or not supported; the text says why."""


def check_schema(root: Schema) -> None:
    """Raise RefusedGrammar for a schema that cannot be kept to."""
    schemas = reachable(root)
    unsupported = {key for schema in schemas for key in schema if key in UNSUPPORTED_KEYWORDS}
    if unsupported:
        names = ", ".join(f"`{name}`" for name in sorted(unsupported))
        raise RefusedGrammar(f"uses keywords of JSON Schema that are not supported: {names}")
    for schema in schemas:
        _check_values(schema)
        _check_min_properties(schema)
    if not _can_end(root, root, _ending(root, schemas)):
        raise RefusedGrammar("refers to itself such that no value is ever complete")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _is_count(value: Any) -> bool:
    return _is_number(value) and value >= 0 and value == int(value)


def _is_schema(value: Any) -> bool:
    return isinstance(value, (dict, bool))


def _are_schemas(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_schema, value))


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_type(value: Any) -> bool:
    names = [value] if isinstance(value, str) else value
    return _are_texts(names) and bool(names) and _TYPES.issuperset(names)


# What the value of a keyword must be, where it has no effect too: the library looks at those that have one.
_VALUES: dict[str, tuple[Callable[[Any], bool], tuple[str, ...]]] = {
    "a number": (_is_number, ("minimum", "maximum")),
    "a number, true or false": (
        lambda value: _is_number(value) or isinstance(value, bool),  # booleans are those of draft 4
        ("exclusiveMinimum", "exclusiveMaximum"),
    ),
    "a number above 0": (lambda value: _is_number(value) and value > 0, ("multipleOf",)),
    "a whole number from 0 on": (
        _is_count,
        ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"),
    ),
    "a string": (lambda value: isinstance(value, str), ("pattern", "format", "$ref", "$anchor", "$id")),
    "a list": (lambda value: isinstance(value, list), ("enum",)),
    "a list of strings": (_are_texts, ("required",)),
    "a type's name or a list of them": (_is_type, ("type",)),
    "a schema": (_is_schema, ("additionalProperties", "additionalItems")),
    "a schema, or a list of them": (
        lambda value: _is_schema(value) or _are_schemas(value),  # the list is that of drafts before 2020-12
        ("items",),
    ),
    "a list of schemas, not empty": (_are_schemas, ("allOf", "anyOf", "oneOf", "prefixItems")),
    "schemas by name": (
        lambda value: isinstance(value, dict) and all(map(_is_schema, value.values())),
        ("properties", "patternProperties", "$defs", "definitions"),
    ),
}
_CHECKS = {keyword: (check, text) for text, (check, keywords) in _VALUES.items() for keyword in keywords}


def _check_values(schema: dict[str, Any]) -> None:
    for keyword, value in schema.items():
        if keyword in _CHECKS and not _CHECKS[keyword][0](value):
            raise RefusedGrammar(f"is no JSON schema: `{keyword}` must be {_CHECKS[keyword][1]}")


def _check_min_properties(schema: dict[str, Any]) -> None:
    """Keys that are not named may come twice, so that all but one of the least number must be named."""
    least, required = schema.get("minProperties"), schema.get("required")
    num_named = len(set(map(str, required))) if isinstance(required, list) else 0
    if isinstance(least, int) and least > num_named + 1:
        raise RefusedGrammar("`minProperties` may be at most one more than the number of `required` properties")


def _ending(root: Schema, schemas: list[dict[str, Any]]) -> set[int]:
    """Ids of the schemas that a value of finite size can satisfy: a least fixed point, inner schemas first."""
    ending: set[int] = set()
    num_before = -1
    while num_before < len(ending):
        num_before = len(ending)
        for schema in reversed(schemas):
            if id(schema) not in ending and _can_object_end(root, schema, ending):
                ending.add(id(schema))
    return ending


def _can_end(root: Schema, schema: Schema, ending: set[int]) -> bool:
    return id(schema) in ending if isinstance(schema, dict) else schema is not False


def _can_object_end(root: Schema, schema: dict[str, Any], ending: set[int]) -> bool:
    if "const" in schema or "enum" in schema:
        return True
    target = referred(root, schema.get("$ref"))
    if target is not None and not _can_end(root, target, ending):
        return False
    for keyword, is_enough in (("allOf", all), ("anyOf", any), ("oneOf", any)):
        branches = schema.get(keyword)
        if isinstance(branches, list) and not is_enough(_can_end(root, branch, ending) for branch in branches):
            return False
    types = schema.get("type")
    if types is None:
        return True
    types = types if isinstance(types, list) else [types]
    return (
        any(kind not in ("array", "object") for kind in types)
        or ("array" in types and _can_array_end(root, schema, ending))
        or ("object" in types and _can_members_end(root, schema, ending))
    )


def _can_array_end(root: Schema, schema: dict[str, Any], ending: set[int]) -> bool:
    least, items = schema.get("minItems", 0), schema.get("items", True)
    first = items if isinstance(items, list) else schema.get("prefixItems", [])
    rest = schema.get("additionalItems", True) if isinstance(items, list) else items
    if not isinstance(least, int) or not isinstance(first, list):
        return True
    needed = [*first[:least], *([rest] if least > len(first) else [])]
    return all(_can_end(root, item, ending) for item in needed)


def _can_members_end(root: Schema, schema: dict[str, Any], ending: set[int]) -> bool:
    properties, required = schema.get("properties", {}), schema.get("required", [])
    if not isinstance(properties, dict) or not isinstance(required, list):
        return True
    others = schema.get("additionalProperties", True)
    return all(_can_end(root, properties.get(name, others), ending) for name in required if isinstance(name, str))
