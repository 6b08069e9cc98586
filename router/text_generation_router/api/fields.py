"""Reading one JSON object of a request by its schema: types are checked here, ranges in validation.py.

Every optional field accepts null. A wrong type is a ValidationError that names the field.
"""

from collections.abc import Mapping
from typing import Any

from text_generation_router.api.schema import Kind, ObjectSchema
from text_generation_router.errors import ValidationError


class Fields:
    """A JSON object, field by field; only fields that its schema declares can be read.

    `path` is the object's own name in the body, empty for the body itself.
    """

    def __init__(self, values: Mapping[str, Any], schema: ObjectSchema, path: str = "") -> None:
        self._values = values
        self._parameters = schema.by_name
        self._path = path
        self._children: list[Fields] = []

    def error(self, name: str, reason: str) -> ValidationError:
        """The error for a field, ready to raise."""
        return ValidationError(f"`{name}` {reason}", param=self._path_of(name))

    def _path_of(self, name: str) -> str:
        return f"{self._path}.{name}" if self._path else name

    def _read(self, name: str, kind: Kind) -> Any:
        parameter = self._parameters[name]
        assert parameter.kind is kind, f"{name} is declared as {parameter.kind}"
        value = self._values.get(name)
        if value is None and parameter.is_required:
            raise self.error(name, "is missing")
        return value

    def any(self, name: str) -> Any:
        """The field as it stands, None when it is missing."""
        return self._read(name, Kind.ANY)

    def integer(self, name: str) -> int | None:
        """A whole number; true, false and 1.0 are none."""
        value = self._read(name, Kind.INTEGER)
        if value is not None and type(value) is not int:
            raise self.error(name, "must be an integer")
        return value

    def number(self, name: str) -> float | None:
        """Any number; JSON has no NaN and no infinity, and the parser refuses both."""
        value = self._read(name, Kind.NUMBER)
        if value is None:
            return None
        if type(value) is not int and type(value) is not float:
            raise self.error(name, "must be a number")
        return float(value)

    def boolean(self, name: str, default: bool = False) -> bool:
        """True or false."""
        value = self._read(name, Kind.BOOLEAN)
        if value is None:
            return default
        if type(value) is not bool:
            raise self.error(name, "must be a boolean")
        return value

    def string(self, name: str) -> str | None:
        """A string."""
        value = self._read(name, Kind.STRING)
        if value is not None and not isinstance(value, str):
            raise self.error(name, "must be a string")
        return value

    def required_string(self, name: str) -> str:
        """A string that must be there."""
        value = self.string(name)
        assert value is not None, f"{name} is not declared as required"
        return value

    def strings(self, name: str) -> tuple[str, ...]:
        """A list of strings, or one string alone."""
        value = self._read(name, Kind.STRINGS)
        if value is None:
            return ()
        if isinstance(value, str):
            return (value,)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.error(name, "must be a string or a list of strings")
        return tuple(value)

    def items(self, name: str) -> list[Any] | None:
        """A list of anything."""
        value = self._read(name, Kind.LIST)
        if value is not None and not isinstance(value, list):
            raise self.error(name, "must be a list")
        most = self._parameters[name].max_items
        if value is not None and most is not None and len(value) > most:
            raise self.error(name, f"may hold at most {most} items. Given: {len(value)}")
        return value

    def objects(self, name: str) -> "list[Fields]":
        """A list of objects."""
        return [self._child(name, item) for item in self.items(name) or []]

    def mapping(self, name: str) -> dict[str, Any] | None:
        """An object taken as a whole."""
        value = self._read(name, Kind.OBJECT)
        if value is not None and not isinstance(value, dict):
            raise self.error(name, "must be an object")
        return value

    def object(self, name: str) -> "Fields | None":
        """An object inside this one."""
        value = self._read(name, Kind.OBJECT)
        return None if value is None else self._child(name, value)

    def _child(self, name: str, value: Any) -> "Fields":
        schema = self._parameters[name].inner
        assert schema is not None, f"{name} is declared as a whole"
        return self.child(name, value, schema)

    def child(self, name: str, value: Any, schema: ObjectSchema) -> "Fields":
        """An object inside this one, given by its value and its schema."""
        if not isinstance(value, dict):
            raise self.error(name, "must be an object")
        child = Fields(value, schema, self._path_of(name))
        self._children.append(child)
        return child

    def whole(self) -> Mapping[str, Any]:
        """The object itself, fields that are not declared included."""
        return self._values

    def refused(self) -> list[str]:
        """Names of the fields that are known, not honoured, and given."""
        parameters = self._parameters
        return [
            name
            for name, value in self._values.items()
            if name in parameters and parameters[name].kind is Kind.REFUSED and not parameters[name].is_neutral(value)
        ]

    def ignored(self) -> list[str]:
        """Names of the fields that are not declared, those of inner objects included."""
        prefix = f"{self._path}." if self._path else ""
        names = [prefix + name for name in self._values if name not in self._parameters]
        for child in self._children:
            names += child.ignored()
        return names
