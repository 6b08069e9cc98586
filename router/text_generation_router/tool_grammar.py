"""The grammar that makes any model call a tool: `{"function": {"_name": …, the arguments}}` as the whole text."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from text_generation_router.chat_output.forced import NO_TOOL
from text_generation_router.errors import ToolError
from text_generation_router.grammar import Grammar
from text_generation_router.json_schema import Schema, mapped, reachable

# Stands beside the arguments, so that no argument can have it.
NAME_KEY = "_name"
_NO_TOOL_PARAMETERS = {"type": "object", "properties": {"content": {"type": "string"}}, "required": ["content"]}


def tool_grammar(tools: Sequence[Mapping[str, Any]], may_call_none: bool) -> Grammar:
    """The grammar of one call of one of the tools (`{"function": {"name": …, "parameters"?: schema}}`).

    `may_call_none` adds a function `no_tool` that takes the model's own words as `content`. Raises ToolError for
    parameters that cannot be arguments.
    """
    functions = [(str(tool["function"]["name"]), tool["function"].get("parameters") or {}) for tool in tools]
    if may_call_none:
        functions.append((NO_TOOL, _NO_TOOL_PARAMETERS))
    definitions: dict[str, Schema] = {}
    for index, (name, parameters) in enumerate(functions):
        _check(name, parameters)
        moved = _moved(parameters, f"#/$defs/parameters{index}")
        definitions[f"call{index}"] = _with_name(name, moved)
        if any("$ref" in schema for schema in reachable(parameters)):
            definitions[f"parameters{index}"] = moved
    calls = [{"$ref": f"#/$defs/call{index}"} for index in range(len(functions))]
    return Grammar.from_schema(
        {
            "type": "object",
            "properties": {"function": calls[0] if len(calls) == 1 else {"anyOf": calls}},
            "required": ["function"],
            "additionalProperties": False,
            "$defs": definitions,
        }
    )


def _check(name: str, parameters: Any) -> None:
    if not isinstance(parameters, dict) or parameters.get("type", "object") != "object":
        raise ToolError(f"the parameters of {name} must be a JSON schema of an object", param="tools")
    properties, required = parameters.get("properties", {}), parameters.get("required", [])
    if not isinstance(properties, dict) or not isinstance(required, list):
        raise ToolError(f"`properties` of {name} must be an object and `required` a list", param="tools")
    if name == NO_TOOL and parameters is not _NO_TOOL_PARAMETERS:
        raise ToolError(f"{NO_TOOL} is the name of the choice to call no function", param="tools")
    if NAME_KEY in properties:
        raise ToolError(f"{name} has a parameter {NAME_KEY}, which is kept for its own name", param="tools")


def _with_name(name: str, parameters: dict[str, Any]) -> Schema:
    """The parameters' schema with the function's name as one more property, before all others."""
    return {
        **parameters,
        "type": "object",
        "properties": {NAME_KEY: {"const": name}, **parameters.get("properties", {})},
        "required": [NAME_KEY, *parameters.get("required", [])],
    }


def _moved(schema: Schema, root: str) -> Schema:
    """A schema that will stand at `root` of a larger one: references to its own parts follow it there."""
    copy = mapped(schema, partial(_moved, root=root))
    if isinstance(copy, dict) and isinstance(reference := copy.get("$ref"), str) and reference.startswith("#"):
        copy["$ref"] = root + reference[1:]
    return copy
