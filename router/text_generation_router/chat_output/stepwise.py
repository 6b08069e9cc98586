"""What the parsers of all families share: text that is read step by step, and content around the calls."""

from text_generation_router.chat_output.deltas import Content, Delta, merged
from text_generation_router.chat_output.marks import HeldSpace


class StepwiseParser:
    """Holds the text that is not read yet. A subclass reads some of it in `_step`, until it cannot go on."""

    def __init__(self) -> None:
        self._held = ""
        self._said: list[Delta] = []
        self._num_calls = 0
        self._space = HeldSpace()
        self._is_after_call = False

    def push(self, text: str) -> list[Delta]:
        """Take more text in; what may still become something else is held back."""
        self._held += text
        while self._held and self._step():
            pass
        return self._take()

    def end(self) -> list[Delta]:
        """What was held back, once no more text comes."""
        self._end()
        return self._take()

    def _step(self) -> bool:
        """Read some of the held text; whether there may be more to read."""
        raise NotImplementedError

    def _end(self) -> None:
        """Say what the rest of the text is."""
        raise NotImplementedError

    def _take(self) -> list[Delta]:
        said, self._said = merged(self._said), []
        return said

    def _say_content(self, text: str) -> None:
        """Content; white space at its end waits for more, and goes where a call begins or has ended."""
        text = self._space.push(text)
        if self._is_after_call:
            text = text.lstrip()
        if text:
            self._is_after_call = False
            self._said.append(Content(text))

    def _say_last_content(self, text: str) -> None:
        self._say_content(text)
        if not self._is_after_call and (space := self._space.take()):
            self._said.append(Content(space))
