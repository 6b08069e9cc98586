"""Finding marks such as `<tool_call>` in text that comes in pieces."""


def split_at(text: str, marks: tuple[str, ...]) -> tuple[str, str, str]:
    """The text before the first mark, the mark, and the rest.

    Without a mark: the text that is none for certain, "", and the end of the text that may begin one.
    """
    found = [(position, mark) for mark in marks if (position := text.find(mark)) >= 0]
    if found:
        position, mark = min(found)
        return text[:position], mark, text[position + len(mark) :]
    held = max(_overlap(text, mark) for mark in marks)
    return text[: len(text) - held], "", text[len(text) - held :]


def _overlap(text: str, mark: str) -> int:
    """Length of the longest end of `text` with which `mark` begins."""
    for length in range(min(len(text), len(mark) - 1), 0, -1):
        if text.endswith(mark[:length]):
            return length
    return 0


class HeldSpace:
    """Passes text on, and holds back white space until it is known whether more text follows it."""

    def __init__(self) -> None:
        self._held = ""

    def push(self, text: str) -> str:
        """The text up to the white space at its end."""
        text = self._held + text
        kept = text.rstrip()
        self._held = text[len(kept) :]
        return kept

    def take(self) -> str:
        """The white space that was held back; it is held no more."""
        held, self._held = self._held, ""
        return held
