"""The parts of an answer as they come, and the whole answer, which is their fold."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Content:
    """More of the text for the reader."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """More of the text that the model thinks with."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A tool call begins; `index` counts the calls of one answer from 0."""

    index: int
    call_id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of a call's arguments, which are compact JSON text."""

    index: int
    text: str


Delta = Content | Reasoning | CallStart | CallArguments


class Parser(Protocol):
    """Splits one answer into its parts."""

    def push(self, text: str) -> list[Delta]:
        """Take more text in; what may still become something else is held back."""

    def end(self) -> list[Delta]:
        """What was held back, once no more text comes."""


# Makes the id of the next call.
MakeCallId = Callable[[], str]


class PlainText:
    """The parser of an answer that is content alone."""

    def push(self, text: str) -> list[Delta]:
        """The text as it is."""
        return [Content(text)] if text else []

    def end(self) -> list[Delta]:
        """Nothing is ever held back."""
        return []


def merged(deltas: list[Delta]) -> list[Delta]:
    """The same parts, neighbours of one kind joined."""
    whole: list[Delta] = []
    for delta in deltas:
        match whole[-1] if whole else None, delta:
            case Content(before), Content(text):
                whole[-1] = Content(before + text)
            case CallArguments(index, before), CallArguments(same, text) if index == same:
                whole[-1] = CallArguments(index, before + text)
            case _:
                whole.append(delta)
    return whole


@dataclass
class Call:
    """One whole call."""

    call_id: str
    name: str
    arguments: str = ""


@dataclass
class Answer:
    """One whole answer."""

    content: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)

    def add(self, deltas: Iterable[Delta]) -> None:
        """Fold more parts in."""
        for delta in deltas:
            match delta:
                case Content(text):
                    self.content += text
                case Reasoning(text):
                    self.reasoning += text
                case CallStart(_, call_id, name):
                    self.calls.append(Call(call_id, name))
                case CallArguments(index, text):
                    self.calls[index].arguments += text
