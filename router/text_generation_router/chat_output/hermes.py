"""`<tool_call>{"name": …, "arguments": {…}}</tool_call>`, before, between and after text: Hermes, Qwen 2.5 and 3."""

from enum import Enum, auto

from text_generation_router.chat_output.calls import CallReader
from text_generation_router.chat_output.deltas import CallArguments, MakeCallId
from text_generation_router.chat_output.json_text import NotJson
from text_generation_router.chat_output.marks import split_at
from text_generation_router.chat_output.stepwise import StepwiseParser

_START, _END = "<tool_call>", "</tool_call>"


class _State(Enum):
    TEXT = auto()
    CALL = auto()
    BROKEN_CALL = auto()  # its name was told, what follows is no JSON
    AFTER_CALL = auto()


class HermesParser(StepwiseParser):
    """Text that is no call after all comes out as content, as it was written."""

    def __init__(self, make_call_id: MakeCallId) -> None:
        super().__init__()
        self._make_call_id = make_call_id
        self._state = _State.TEXT
        self._call_text = ""  # what was read of a call that has not started
        self._reader = CallReader(0, make_call_id)

    def _step(self) -> bool:
        if self._state is _State.CALL:
            return self._read_call()
        if self._state is _State.AFTER_CALL:
            return self._read_end()
        marks = (_START,) if self._state is _State.TEXT else (_END,)
        before, mark, self._held = split_at(self._held, marks)
        if self._state is _State.TEXT:
            self._say_content(before)
        elif before:
            self._said.append(CallArguments(self._num_calls - 1, before))
        if mark == _START:
            self._state = _State.CALL
            self._call_text = self._space.take() + _START
            self._reader = CallReader(self._num_calls, self._make_call_id)
        elif mark:
            self._state = _State.TEXT
        return bool(mark)

    def _read_call(self) -> bool:
        character = self._held[0]
        try:
            self._said += self._reader.push(character)
        except NotJson:
            self._give_call_up()
            return True
        self._call_text += character
        self._held = self._held[1:]
        if self._reader.is_done:
            self._end_call(_State.AFTER_CALL)
        return True

    def _end_call(self, state: _State) -> None:
        self._num_calls += 1
        self._is_after_call = True
        self._state = state

    def _give_call_up(self) -> None:
        if self._reader.has_started:
            self._end_call(_State.BROKEN_CALL)
        else:
            self._state = _State.TEXT
            self._say_content(self._call_text)

    def _read_end(self) -> bool:
        self._held = self._held.lstrip()
        if self._held.startswith(_END):
            self._held = self._held.removeprefix(_END)
        elif _END.startswith(self._held):
            return False
        self._state = _State.TEXT
        return True

    def _end(self) -> None:
        held, self._held = self._held, ""
        if self._state is _State.BROKEN_CALL and held:
            self._said.append(CallArguments(self._num_calls - 1, held))
        elif self._state is _State.TEXT:
            self._say_last_content(held)
        elif self._state is _State.CALL and not self._reader.has_started:
            self._say_last_content(self._call_text + held)
