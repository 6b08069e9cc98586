"""Grammar: the form that a request asks its text to have. Nothing is checked here; GrammarCompiler does that."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import orjson

from text_generation_router.model_family import Reasoning


class GrammarKind(StrEnum):
    """What a grammar is written in."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"


@dataclass(frozen=True)
class Grammar:
    """`text` is a schema as JSON, or a regular expression that the whole text after any reasoning must match."""

    kind: GrammarKind
    text: str
    reasoning: Reasoning = Reasoning.NONE

    @classmethod
    def from_schema(cls, schema: Any) -> "Grammar":
        """Text that is JSON and valid for a schema: an object, true or false, or the JSON text of one."""
        text = schema if isinstance(schema, str) else orjson.dumps(schema).decode()
        return cls(GrammarKind.JSON_SCHEMA, text)

    @classmethod
    def any_object(cls) -> "Grammar":
        """Text that is one JSON object, whatever is in it."""
        return cls.from_schema({"type": "object"})

    @classmethod
    def from_regex(cls, pattern: str) -> "Grammar":
        """Text that matches a regular expression as a whole."""
        return cls(GrammarKind.REGEX, pattern)
