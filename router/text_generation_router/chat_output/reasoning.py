"""`<think>…</think>` before the answer: Qwen 3, DeepSeek-R1 and others."""

from enum import Enum, auto

from text_generation_router.chat_output.deltas import Delta, Parser, Reasoning
from text_generation_router.chat_output.marks import HeldSpace, split_at
from text_generation_router.model_family import THINK_END, THINK_START


class _State(Enum):
    BEGINNING = auto()
    THINKING = auto()
    AFTER = auto()  # white space before the answer
    ANSWER = auto()


class ReasoningParser:
    """Takes the reasoning from the beginning of an answer; the rest is `answer`'s.

    `is_begun`: the prompt has begun the reasoning already. White space around both parts is no part of them.
    """

    def __init__(self, answer: Parser, is_begun: bool) -> None:
        self._answer = answer
        self._is_begun = is_begun
        self._state = _State.BEGINNING
        self._held = ""
        self._space = HeldSpace()
        self._has_text = False

    def push(self, text: str) -> list[Delta]:
        """Take more text in."""
        if self._state is _State.ANSWER:
            return self._answer.push(text)
        self._held += text
        deltas: list[Delta] = []
        if self._state is _State.BEGINNING:
            self._read_beginning()
        if self._state is _State.THINKING:
            self._read_thought(deltas)
        if self._state is _State.AFTER:
            self._held = self._held.lstrip()
            if self._held:
                self._state = _State.ANSWER
        if self._state is _State.ANSWER:
            held, self._held = self._held, ""
            deltas += self._answer.push(held)
        return deltas

    def end(self) -> list[Delta]:
        """What was held back."""
        held, self._held = self._held, ""
        deltas: list[Delta] = []
        if self._state is _State.THINKING or (self._state is _State.BEGINNING and self._is_begun):
            self._say(held, deltas)
        else:
            deltas += self._answer.push(held)
        return deltas + self._answer.end()

    def _read_beginning(self) -> None:
        text = self._held.lstrip()
        if text.startswith(THINK_START):
            self._held = text.removeprefix(THINK_START)
            self._state = _State.THINKING
        elif not THINK_START.startswith(text):
            self._state = _State.THINKING if self._is_begun else _State.ANSWER

    def _read_thought(self, deltas: list[Delta]) -> None:
        before, mark, self._held = split_at(self._held, (THINK_END,))
        self._say(before, deltas)
        if mark:
            self._state = _State.AFTER

    def _say(self, text: str, deltas: list[Delta]) -> None:
        text = self._space.push(text)
        if not self._has_text:
            text = text.lstrip()
            self._has_text = bool(text)
        if text:
            deltas.append(Reasoning(text))
