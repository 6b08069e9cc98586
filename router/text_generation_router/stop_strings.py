"""Finds the stop strings of one sequence in its text, across any token boundary.

Stop strings also match the text of special tokens, which is never released.
"""


class StopStrings:
    """Fed with text as it comes; says what may be released and whether a stop string ended the text.

    The match that ends first counts; of several that end together, the longest. With `keep` the text is released
    at once, through the end of the stop string. Without, it is cut before the stop string, and the longest suffix
    that could begin one is held back.
    """

    def __init__(self, strings: tuple[str, ...], keep: bool) -> None:
        assert all(strings), "a stop string is never empty"
        self._searches = [_Search(string) for string in strings]
        self._first_characters = {string[0] for string in strings}
        self._keep = keep
        self._held = ""
        # Which characters of `_held` are visible.
        self._held_visible: list[bool] = []
        self._is_inside = False

    def push(self, text: str, special_text: str = "") -> tuple[str, bool]:
        """Take visible text, then a special token's text; return the text to release and whether it ends here."""
        released, has_matched = self._feed(text, is_visible=True) if text else ("", False)
        if special_text and not has_matched:
            more, has_matched = self._feed(special_text, is_visible=False)
            released += more
        return released, has_matched

    def flush(self) -> str:
        """What was held back, once no more text comes."""
        held = self._visible(len(self._held))
        self._held, self._held_visible = "", []
        return held

    def _feed(self, text: str, is_visible: bool) -> tuple[str, bool]:
        if not self._is_inside and self._first_characters.isdisjoint(text):
            return (text if is_visible else ""), False
        end, length = self._search(text)
        if self._keep:
            return (text[:end] if is_visible else ""), bool(length)
        num_held_before = len(self._held)
        self._held += text
        self._held_visible += [is_visible] * len(text)
        if length:
            return self._visible(num_held_before + end - length), True
        keep = max(search.num_matched for search in self._searches)
        return self._release(len(self._held) - keep), False

    def _search(self, text: str) -> tuple[int, int]:
        """Where in `text` the first match ends and how long it is; (len(text), 0) without a match."""
        for position, character in enumerate(text):
            lengths = [search.length for search in self._searches if search.advance(character)]
            if lengths:
                return position + 1, max(lengths)
        self._is_inside = any(search.num_matched for search in self._searches)
        return len(text), 0

    def _visible(self, count: int) -> str:
        """The visible ones of the first `count` held characters."""
        return "".join(self._held[i] for i in range(count) if self._held_visible[i])

    def _release(self, count: int) -> str:
        released = self._visible(count)
        self._held, self._held_visible = self._held[count:], self._held_visible[count:]
        return released


class _Search:
    """One string, searched character by character (Knuth, Morris and Pratt)."""

    def __init__(self, string: str) -> None:
        self._string = string
        self.length = len(string)
        # How many of the string's first characters the text ends with now.
        self.num_matched = 0
        # Where to go on when the character after n matched ones differs: the longest proper prefix that is
        # a suffix of those n characters.
        self._fallback = [0] * (self.length + 1)
        for n in range(2, self.length + 1):
            self._fallback[n] = self._next(self._fallback[n - 1], string[n - 1])

    def _next(self, num_matched: int, character: str) -> int:
        while num_matched and self._string[num_matched] != character:
            num_matched = self._fallback[num_matched]
        return num_matched + (self._string[num_matched] == character)

    def advance(self, character: str) -> bool:
        """Take one more character; True when the text now ends with the string. Not to be called after that."""
        self.num_matched = self._next(self.num_matched, character)
        return self.num_matched == self.length
