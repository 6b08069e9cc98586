"""`{"name": …, "parameters": {…}}` as the whole answer, several between semicolons: Llama 3.1 and later."""

from enum import Enum, auto

from text_generation_router.chat_output.calls import CallReader
from text_generation_router.chat_output.deltas import CallArguments, MakeCallId
from text_generation_router.chat_output.json_text import NotJson
from text_generation_router.chat_output.stepwise import StepwiseParser

PYTHON_TAG = "<|python_tag|>"


class _State(Enum):
    BEGINNING = auto()
    CALL = auto()
    BROKEN_CALL = auto()  # its name was told, what follows is no JSON
    BETWEEN_CALLS = auto()
    TEXT = auto()


class Llama3Parser(StepwiseParser):
    """An answer that is JSON but does not name one of the tools is content."""

    def __init__(self, make_call_id: MakeCallId, names: frozenset[str]) -> None:
        super().__init__()
        self._make_call_id = make_call_id
        self._names = names
        self._state = _State.BEGINNING
        self._call_text = ""  # what was read and may turn out to be content
        self._reader = CallReader(0, make_call_id)

    def _step(self) -> bool:
        match self._state:
            case _State.BEGINNING:
                return self._read_beginning()
            case _State.CALL:
                return self._read_call()
            case _State.BETWEEN_CALLS:
                return self._read_between()
            case _State.BROKEN_CALL:
                self._said.append(CallArguments(self._num_calls - 1, self._held))
            case _State.TEXT:
                self._say_content(self._held)
        self._held = ""
        return False

    def _read_beginning(self) -> bool:
        text = self._held.lstrip()
        if not text or (len(text) < len(PYTHON_TAG) and PYTHON_TAG.startswith(text)):
            return False
        text = text.removeprefix(PYTHON_TAG).lstrip()
        if not text:
            return False
        if text.startswith("{"):
            self._call_text = self._held[: len(self._held) - len(text)]
            self._held = text
            self._begin_call()
        else:
            self._state = _State.TEXT
        return True

    def _begin_call(self) -> None:
        self._state = _State.CALL
        self._reader = CallReader(self._num_calls, self._make_call_id, self._names.__contains__)

    def _read_call(self) -> bool:
        character = self._held[0]
        try:
            self._said += self._reader.push(character)
        except NotJson:
            if self._reader.has_started:
                self._num_calls += 1
                self._state = _State.BROKEN_CALL
            else:
                self._state = _State.TEXT
                self._say_content(self._call_text)
            return True
        self._call_text += character
        self._held = self._held[1:]
        if self._reader.is_done:
            self._num_calls += 1
            self._is_after_call = True
            self._state = _State.BETWEEN_CALLS
            self._call_text = ""
        return True

    def _read_between(self) -> bool:
        text = self._held.lstrip(" \t\r\n;,")
        if not text:
            return False
        self._call_text += self._held[: len(self._held) - len(text)]
        self._held = text
        if text.startswith("{"):
            self._begin_call()
        else:
            self._state = _State.TEXT
        return True

    def _end(self) -> None:
        held, self._held = self._held, ""
        if self._state is _State.CALL and not self._reader.has_started:
            self._say_last_content(self._call_text + held)
        elif self._state in (_State.BEGINNING, _State.TEXT):
            self._say_last_content(held)
