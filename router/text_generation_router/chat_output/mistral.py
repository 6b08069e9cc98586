"""`[TOOL_CALLS]` after any text, then a list of JSON objects, or a name and its arguments: Mistral."""

from enum import Enum, auto

from text_generation_router.chat_output.calls import CallReader
from text_generation_router.chat_output.deltas import CallArguments, CallStart, MakeCallId
from text_generation_router.chat_output.json_text import NotJson, ValueReader
from text_generation_router.chat_output.marks import split_at
from text_generation_router.chat_output.stepwise import StepwiseParser

START, ARGUMENTS, CALL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"


class _State(Enum):
    TEXT = auto()
    BEGINNING = auto()  # behind the mark
    LIST = auto()  # between the calls of a list
    CALL = auto()
    ARGUMENTS = auto()  # behind a name that stands alone
    BROKEN_CALL = auto()  # its name was told, what follows is no JSON


class MistralParser(StepwiseParser):
    """Text that is no call after all comes out as content, as it was written."""

    def __init__(self, make_call_id: MakeCallId) -> None:
        super().__init__()
        self._make_call_id = make_call_id
        self._state = _State.TEXT
        self._is_list = False
        self._call_text = ""  # what was read of a call that has not started
        self._reader = CallReader(0, make_call_id)
        self._arguments = ValueReader()

    def _step(self) -> bool:
        match self._state:
            case _State.TEXT:
                return self._read_text()
            case _State.BEGINNING:
                return self._read_beginning()
            case _State.LIST:
                return self._read_list()
            case _State.CALL:
                return self._read_call()
            case _State.ARGUMENTS:
                return self._read_arguments()
            case _State.BROKEN_CALL:
                return self._read_broken()

    def _read_text(self) -> bool:
        before, mark, self._held = split_at(self._held, (START,))
        self._say_content(before)
        if mark:
            self._state = _State.BEGINNING
            self._is_list = False
            self._call_text = self._space.take() + START
        return bool(mark)

    def _read_beginning(self) -> bool:
        text = self._held.lstrip()
        if not text:
            return False
        if text[0] == "[":
            self._call_text += self._held[: len(self._held) - len(text) + 1]
            self._held = text[1:]
            self._is_list = True
            self._state = _State.LIST
            return True
        if text[0] == "{":
            self._begin_call()
            return True
        return self._read_name()

    def _read_name(self) -> bool:
        """A name that stands alone, with an id or without, up to the mark or the brace of the arguments."""
        before, mark, after = split_at(self._held, (ARGUMENTS, "{"))
        if not mark:
            return False
        name = before.partition(CALL_ID)[0].strip()
        if not name:
            self._give_up()
            return True
        self._said.append(CallStart(self._num_calls, self._make_call_id(), name))
        self._num_calls += 1
        self._held = after if mark == ARGUMENTS else mark + after
        self._arguments = ValueReader()
        self._state = _State.ARGUMENTS
        return True

    def _read_list(self) -> bool:
        text = self._held.lstrip(" \t\r\n,")
        if not text:
            return False
        self._held = text
        if text[0] == "]":
            self._held = text[1:]
            self._end_calls()
        elif text[0] == "{":
            self._begin_call()
        else:
            self._give_up()
        return True

    def _begin_call(self) -> None:
        self._reader = CallReader(self._num_calls, self._make_call_id)
        self._state = _State.CALL

    def _read_call(self) -> bool:
        character = self._held[0]
        try:
            self._said += self._reader.push(character)
        except NotJson:
            if self._reader.has_started:
                self._num_calls += 1
                self._state = _State.BROKEN_CALL
            else:
                self._give_up()
            return True
        self._call_text += character
        self._held = self._held[1:]
        if self._reader.is_done:
            self._num_calls += 1
            self._call_text = ""
            if self._is_list:
                self._state = _State.LIST
            else:
                self._end_calls()
        return True

    def _read_arguments(self) -> bool:
        try:
            kept, num_read = self._arguments.push(self._held[0])
        except NotJson:
            self._state = _State.BROKEN_CALL
            return True
        self._held = self._held[num_read:]
        if kept:
            self._said.append(CallArguments(self._num_calls - 1, kept))
        if self._arguments.is_done:
            self._end_calls()
        return True

    def _read_broken(self) -> bool:
        before, mark, rest = split_at(self._held, (START,))
        if before:
            self._said.append(CallArguments(self._num_calls - 1, before))
        self._held = mark + rest
        if mark:
            self._state = _State.TEXT
        return bool(mark)

    def _end_calls(self) -> None:
        self._is_after_call = True
        self._call_text = ""
        self._state = _State.TEXT

    def _give_up(self) -> None:
        self._state = _State.TEXT
        self._say_content(self._call_text)
        self._call_text = ""

    def _end(self) -> None:
        held, self._held = self._held, ""
        if self._state is _State.BROKEN_CALL and held:
            self._said.append(CallArguments(self._num_calls - 1, held))
        elif self._state is _State.TEXT:
            self._say_last_content(held)
        elif self._state is _State.BEGINNING or (self._state is _State.CALL and not self._reader.has_started):
            self._say_last_content(self._call_text + held)
