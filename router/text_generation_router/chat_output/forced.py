"""`{"function": {"_name": …, arguments…}}` as the whole answer: what a grammar forces on any model.

The function `no_tool` stands for the choice to call none; its `content` is what the model says instead.
"""

from text_generation_router.chat_output.calls import decode
from text_generation_router.chat_output.deltas import CallArguments, CallStart, Content, MakeCallId
from text_generation_router.chat_output.json_text import NotJson, ObjectReader, Piece, StringDecoder
from text_generation_router.chat_output.stepwise import StepwiseParser

NO_TOOL = "no_tool"


class ForcedParser(StepwiseParser):
    """Reads what the grammar of `tool_grammar` lets through; an answer that breaks off is told as far as it came."""

    def __init__(self, make_call_id: MakeCallId) -> None:
        super().__init__()
        self._make_call_id = make_call_id
        self._outer, self._inner = ObjectReader(), ObjectReader()
        self._name_text = ""
        self._waiting = ""  # arguments that came before the name
        self._num_arguments = 0
        self._has_started = False
        self._is_content = False  # no tool was chosen
        self._content = StringDecoder()

    def _step(self) -> bool:
        if self._outer.is_done:
            self._held = ""
            return False
        character, self._held = self._held[0], self._held[1:]
        try:
            pieces, _ = self._outer.push(character)
            for piece in pieces:
                if decode(piece.key) == "function":
                    self._read_function(piece)
        except NotJson:
            self._say(character)
        return True

    def _read_function(self, piece: Piece) -> None:
        members, _ = self._inner.push(piece.text)
        for member in members:
            if decode(member.key) == "_name":
                self._read_name(member)
                continue
            if self._is_content:
                if decode(member.key) == "content" and (text := self._content.push(member.text)):
                    self._said.append(Content(text))
                continue
            if member.is_first:
                self._num_arguments += 1
                self._say(("{" if self._num_arguments == 1 else ",") + member.key + ":")
            self._say(member.text)
        if self._inner.is_done and not self._is_content:
            self._say("}" if self._num_arguments else "{}")

    def _read_name(self, member: Piece) -> None:
        self._name_text += member.text
        if not member.is_last:
            return
        name = str(decode(self._name_text))
        if name == NO_TOOL:
            self._is_content = True
            return
        self._has_started = True
        self._said.append(CallStart(0, self._make_call_id(), name))
        waiting, self._waiting = self._waiting, ""
        self._say(waiting)

    def _say(self, text: str) -> None:
        if not self._has_started:
            self._waiting += text
        elif text:
            self._said.append(CallArguments(0, text))

    def _end(self) -> None:
        self._held = ""
