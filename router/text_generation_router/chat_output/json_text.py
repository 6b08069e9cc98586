"""Reading JSON as it comes: one value, or the members of one object, in compact form."""

import json
import re
from dataclasses import dataclass

_SPACE = " \t\n\r"


class NotJson(ValueError):
    """The text is not what was expected; nothing of it may be taken as read."""


class ValueReader:
    """One value: its compact text, and where it ends. Numbers and words end before what follows them."""

    def __init__(self) -> None:
        self.is_done = False
        self.first = ""  # the value's first character, "" before it
        self._depth = 0
        self._in_string = False
        self._is_escaped = False

    def push(self, text: str) -> tuple[str, int]:
        """The compact text of what belongs to the value, and how many characters were read."""
        kept: list[str] = []
        for position, character in enumerate(text):
            if self._in_string:
                # Models write line breaks into strings, where JSON must have them escaped.
                kept.append(character if character >= " " else f"\\u{ord(character):04x}")
                self._step_in_string(character)
            elif character in _SPACE:
                if self.first and self._depth == 0:
                    self.is_done = True
            elif character in ",:]}" and self._depth == 0:
                if not self.first:
                    raise NotJson
                self.is_done = True
                return "".join(kept), position
            else:
                kept.append(character)
                self._step(character)
            if self.is_done:
                return "".join(kept), position + 1
        return "".join(kept), len(text)

    def _step_in_string(self, character: str) -> None:
        if self._is_escaped:
            self._is_escaped = False
        elif character == "\\":
            self._is_escaped = True
        elif character == '"':
            self._in_string = False
            self.is_done = self._depth == 0

    def _step(self, character: str) -> None:
        if not self.first:
            self.first = character
        elif self._depth == 0 and character in '"{[':
            raise NotJson  # two values without anything between them
        if character == '"':
            self._in_string = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
            self.is_done = self._depth == 0


# The end of a string's text that may be the beginning of an escape, or of the two that make one character.
_OPEN_ESCAPE = re.compile(r"(?:\\u[dD][89abAB][0-9a-fA-F]{2})?\\(?:u[0-9a-fA-F]{0,3})?$|\\u[dD][89abAB][0-9a-fA-F]{2}$")


class StringDecoder:
    """A string's characters, from its JSON text as it comes, quotes included."""

    def __init__(self) -> None:
        self._held = ""
        self._is_begun = False

    def push(self, text: str) -> str:
        """The characters that are known by now. Raises NotJson."""
        if not self._is_begun and text:
            if text[0] != '"':
                raise NotJson
            self._is_begun, text = True, text[1:]
        text = self._held + text
        open_escape = _find_open_escape(text)
        self._held = text[open_escape:]
        text = text[:open_escape]
        if _ends_with_quote(text):
            text = text[:-1]
        try:
            value: str = json.loads(f'"{text}"', strict=False)
        except ValueError:
            raise NotJson from None
        # Half of a pair of escapes is no character.
        return value if is_unicode(value) else value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def is_unicode(text: str) -> bool:
    """Whether a text can be written in UTF-8: JSON can spell halves of characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _find_open_escape(text: str) -> int:
    """Where an escape begins that is not complete; the length of the text if there is none."""
    match = _OPEN_ESCAPE.search(text)
    if match is None:
        return len(text)
    start = match.start()
    num_before = start - len(text[:start].rstrip("\\"))
    # Behind an odd number of backslashes, the match's first one is itself escaped.
    return start if num_before % 2 == 0 else len(text)


def _ends_with_quote(text: str) -> bool:
    body = text.removesuffix('"')
    return body != text and (len(body) - len(body.rstrip("\\"))) % 2 == 0


@dataclass(frozen=True, slots=True)
class Piece:
    """More of a member's value; the last piece may be empty."""

    key: str  # the key's own JSON text, quotes included
    text: str
    is_first: bool
    is_last: bool


class ObjectReader:
    """The members of one object, each value in pieces."""

    def __init__(self) -> None:
        self.is_done = False
        self._expected = "{"
        self._key = ""
        self._reader = ValueReader()

    def push(self, text: str) -> tuple[list[Piece], int]:
        """The pieces, and how many characters were read. Raises NotJson where the text is no object."""
        pieces: list[Piece] = []
        position = 0
        while position < len(text) and not self.is_done:
            if self._expected == "value":
                position += self._push_value(text[position:], pieces)
            elif self._expected in ("key", "first key"):
                position += self._push_key(text[position:])
            else:
                self._step(text[position])
                position += 1
        return pieces, position

    def _push_value(self, text: str, pieces: list[Piece]) -> int:
        is_first = not self._reader.first
        kept, num_read = self._reader.push(text)
        if kept or self._reader.is_done:
            pieces.append(Piece(self._key, kept, is_first, self._reader.is_done))
        if self._reader.is_done:
            self._expected = ",}"
        return num_read

    def _push_key(self, text: str) -> int:
        if not self._key and text[0] in _SPACE:
            return 1
        if not self._key and text[0] == "}" and self._expected == "first key":
            self.is_done = True
            return 1
        if not self._key and text[0] != '"':
            raise NotJson
        kept, num_read = self._reader.push(text)
        self._key += kept
        if self._reader.is_done:
            self._expected = ":"
        return num_read

    def _step(self, character: str) -> None:
        if character in _SPACE:
            return
        if character not in self._expected:
            raise NotJson
        if character == "}":
            self.is_done = True
            return
        if character == ":":
            self._expected = "value"
        else:
            self._expected = "first key" if character == "{" else "key"
            self._key = ""
        self._reader = ValueReader()
