"""One tool call, written as a JSON object, read as it comes."""

import json
from collections.abc import Callable
from typing import Any

from text_generation_router.chat_output.deltas import CallArguments, CallStart, Delta, MakeCallId
from text_generation_router.chat_output.json_text import NotJson, ObjectReader, Piece, is_unicode

_ARGUMENT_KEYS = ("arguments", "parameters")


class CallReader:
    """Reads `{"name": …, "arguments": {…}}`, its members in any order, others ignored.

    `accepts` says whether a name is one. Once `has_started`, the call was told of; before, NotJson means that the text
    is no call.
    """

    def __init__(self, index: int, make_call_id: MakeCallId, accepts: Callable[[str], bool] = bool) -> None:
        self._object = ObjectReader()
        self._index = index
        self._make_call_id = make_call_id
        self._accepts = accepts
        self._name_text = ""
        self._waiting = ""  # arguments that came before the name
        self._held_value = ""  # arguments that are no object, as far as they came
        self._has_arguments = False
        self.has_started = False

    @property
    def is_done(self) -> bool:
        """Whether the object has ended."""
        return self._object.is_done

    def push(self, character: str) -> list[Delta]:
        """Take one more character; raises NotJson, also for one that ends an object without a name."""
        deltas: list[Delta] = []
        pieces, _ = self._object.push(character)
        for piece in pieces:
            key = decode(piece.key)
            if key == "name" and not self.has_started:
                self._read_name(piece, deltas)
            elif key in _ARGUMENT_KEYS:
                self._say(self._read_arguments(piece), deltas)
        if self.is_done:
            if not self.has_started:
                raise NotJson
            if not self._has_arguments:
                self._say("{}", deltas)
        return deltas

    def _read_name(self, piece: Piece, deltas: list[Delta]) -> None:
        self._name_text += piece.text
        if not piece.is_last:
            return
        name = decode(self._name_text)
        if not isinstance(name, str) or not is_unicode(name) or not self._accepts(name):
            raise NotJson
        self.has_started = True
        deltas.append(CallStart(self._index, self._make_call_id(), name))
        waiting, self._waiting = self._waiting, ""
        self._say(waiting, deltas)

    def _read_arguments(self, piece: Piece) -> str:
        """The arguments' own JSON text; an object that was written as a string is unpacked, nothing is {}."""
        self._has_arguments = True
        if not self._held_value and not (piece.is_first and piece.text[:1] != "{"):
            return piece.text
        self._held_value += piece.text
        if not piece.is_last:
            return ""
        value, self._held_value = self._held_value, ""
        return unpacked(value)

    def _say(self, text: str, deltas: list[Delta]) -> None:
        if not self.has_started:
            self._waiting += text
        elif text:
            deltas.append(CallArguments(self._index, text))


def decode(text: str) -> Any:
    """The value of a whole JSON text; raises NotJson."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise NotJson from None


def unpacked(text: str) -> str:
    """Arguments that are no object, as the JSON text of one where they can be."""
    value = decode(text)
    if value is None:
        return "{}"
    if not isinstance(value, str):
        return text
    try:
        value = json.loads(value)
        compact = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
        return compact if is_unicode(compact) else json.dumps(value, separators=(",", ":"))
    except (ValueError, RecursionError):
        return text
