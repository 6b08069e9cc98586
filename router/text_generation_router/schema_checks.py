"""What is refused of a JSON schema before it is compiled, by name: what would otherwise be ignored or never end."""

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
    )
)


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
        _check_min_properties(schema)
    if not _can_end(root, root, _ending(root, schemas)):
        raise RefusedGrammar("refers to itself such that no value is ever complete")


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
