"""Reading one JSON object of a request: types are checked here, ranges in validation.py.

Every optional field accepts null. A wrong type is a ValidationError that names the field.
"""

from collections.abc import Mapping
from typing import Any

from text_generation_router.errors import ValidationError


class Fields:
    """A JSON object, field by field; remembers which fields somebody asked for.

    `path` is the object's own name in the body, empty for the body itself.
    """

    def __init__(self, values: Mapping[str, Any], path: str = "") -> None:
        self._values = values
        self._path = path
        self._known: set[str] = set()
        self._children: list[Fields] = []

    def error(self, name: str, reason: str) -> ValidationError:
        """The error for a field, ready to raise."""
        return ValidationError(f"`{name}` {reason}", param=f"{self._path}.{name}" if self._path else name)

    def value(self, name: str) -> Any:
        """The field as it stands, None when it is missing."""
        self._known.add(name)
        return self._values.get(name)

    def integer(self, name: str) -> int | None:
        """A whole number; true, false and 1.0 are none."""
        value = self.value(name)
        if value is not None and type(value) is not int:
            raise self.error(name, "must be an integer")
        return value

    def number(self, name: str) -> float | None:
        """Any number; JSON has no NaN and no infinity, and the parser refuses both."""
        value = self.value(name)
        if value is None:
            return None
        if type(value) is not int and type(value) is not float:
            raise self.error(name, "must be a number")
        return float(value)

    def boolean(self, name: str, default: bool = False) -> bool:
        """True or false."""
        value = self.value(name)
        if value is None:
            return default
        if type(value) is not bool:
            raise self.error(name, "must be a boolean")
        return value

    def string(self, name: str) -> str | None:
        """A string."""
        value = self.value(name)
        if value is not None and not isinstance(value, str):
            raise self.error(name, "must be a string")
        return value

    def required_string(self, name: str) -> str:
        """A string that must be there."""
        value = self.string(name)
        if value is None:
            raise self.error(name, "is missing")
        return value

    def strings(self, name: str) -> tuple[str, ...]:
        """A list of strings, or one string alone."""
        value = self.value(name)
        if value is None:
            return ()
        if isinstance(value, str):
            return (value,)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.error(name, "must be a string or a list of strings")
        return tuple(value)

    def items(self, name: str) -> list[Any] | None:
        """A list of anything."""
        value = self.value(name)
        if value is not None and not isinstance(value, list):
            raise self.error(name, "must be a list")
        return value

    def mapping(self, name: str) -> dict[str, Any] | None:
        """An object taken as a whole."""
        value = self.value(name)
        if value is not None and not isinstance(value, dict):
            raise self.error(name, "must be an object")
        return value

    def object(self, name: str) -> "Fields | None":
        """An object inside this one."""
        value = self.value(name)
        if value is None:
            return None
        return self.child(name, value)

    def child(self, name: str, value: Any) -> "Fields":
        """An object inside this one, given by its value (an item of a list, for instance)."""
        if not isinstance(value, dict):
            raise self.error(name, "must be an object")
        child = Fields(value, f"{self._path}.{name}" if self._path else name)
        self._children.append(child)
        return child

    def ignored(self) -> list[str]:
        """Names of the fields that nobody asked for, those of inner objects included."""
        prefix = f"{self._path}." if self._path else ""
        names = [prefix + name for name in self._values if name not in self._known]
        for child in self._children:
            names += child.ignored()
        return names
