"""What a body may hold: each field declared once, for reading (fields.py), the OpenAPI document and docs/api.md."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any

from text_generation_router.ranges import Range


class Kind(StrEnum):
    """The type of a field; null and a missing field are the same for all that are not required."""

    INTEGER = "integer"
    NUMBER = "number"
    BOOLEAN = "boolean"
    STRING = "string"
    STRINGS = "strings"  # one string, or a list of them
    OBJECT = "object"
    LIST = "list"
    ANY = "any"  # described by `json`, read by the dialect
    REFUSED = "refused"  # known, not honoured: only the neutral values may be given


@dataclass(frozen=True)
class Parameter:
    """One field of an object in a body."""

    name: str
    kind: Kind
    text: str
    default: Any = None
    is_required: bool = False
    # The name of its range in ranges.py, and values outside of it that have a meaning of their own.
    range_name: str | None = None
    special: tuple[float, ...] = ()
    # Values that may be given although the field is refused: they ask for what happens anyway.
    neutral: tuple[Any, ...] = ()
    # What an object is, or each item of a list. None: anything.
    inner: "ObjectSchema | None" = None
    max_items: int | None = None
    # Keywords of JSON Schema beside those that follow from the rest.
    json: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def is_neutral(self, value: Any) -> bool:
        """Whether a refused field may have this value."""
        return value is None or any(type(value) is type(item) and value == item for item in self.neutral)

    def json_schema(self, ranges: Mapping[str, Range]) -> dict[str, Any]:
        """The field as JSON Schema; objects with a name are references to `#/components/schemas/`."""
        schema = self._type_schema(ranges) | dict(self.json)
        if self.default is not None:
            schema["default"] = self.default
        return schema | {"description": self.text}

    def _type_schema(self, ranges: Mapping[str, Range]) -> dict[str, Any]:
        null: list[dict[str, Any]] = [] if self.is_required else [{"type": "null"}]
        if self.kind is Kind.ANY:
            return {}
        if self.kind is Kind.REFUSED:
            return {"enum": [None, *self.neutral]}
        if self.kind is Kind.STRINGS:
            return {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}, *null]}
        if self.kind is Kind.OBJECT and self.inner is not None:
            return {"anyOf": [self.inner.reference, *null]} if null else self.inner.reference
        schema: dict[str, Any] = {"type": "array" if self.kind is Kind.LIST else self.kind.value}
        if self.kind is Kind.LIST and self.inner is not None:
            schema["items"] = self.inner.reference
        if self.max_items is not None:
            schema["maxItems"] = self.max_items
        if self.range_name is not None:
            schema |= ranges[self.range_name].json_schema()
        if self.special:
            return {"anyOf": [schema, {"enum": list(self.special)}, *null]}
        return schema if self.is_required else schema | {"type": [schema["type"], "null"]}


@dataclass(frozen=True)
class ObjectSchema:
    """An object of a body: its name in the document and its fields. Fields beyond them are ignored."""

    name: str
    text: str
    parameters: tuple[Parameter, ...]

    @cached_property
    def by_name(self) -> dict[str, Parameter]:
        """The fields by name."""
        return {parameter.name: parameter for parameter in self.parameters}

    @property
    def reference(self) -> dict[str, Any]:
        """Where the document has this object."""
        return {"$ref": f"#/components/schemas/{self.name}"}

    def without(self, name: str, *left_out: str) -> "ObjectSchema":
        """The same object under another name, without some fields."""
        kept = tuple(parameter for parameter in self.parameters if parameter.name not in left_out)
        return ObjectSchema(name, self.text, kept)

    def json_schema(self, ranges: Mapping[str, Range]) -> dict[str, Any]:
        """The object as JSON Schema."""
        required = [parameter.name for parameter in self.parameters if parameter.is_required]
        return {
            "type": "object",
            "description": self.text,
            "properties": {parameter.name: parameter.json_schema(ranges) for parameter in self.parameters},
            **({"required": required} if required else {}),
        }

    def nested(self) -> "list[ObjectSchema]":
        """This object and all objects inside it, each once."""
        found = {self.name: self}
        for parameter in self.parameters:
            if parameter.inner is not None:
                found |= {inner.name: inner for inner in parameter.inner.nested()}
        return list(found.values())
