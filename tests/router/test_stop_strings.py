"""Stop strings against the definition on the whole text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_generation_router.stop_strings import StopStrings

STRINGS = st.lists(st.text("ab<", min_size=1, max_size=4), min_size=1, max_size=4)
PIECES = st.lists(st.tuples(st.text("ab<", max_size=5), st.sampled_from(["", "", "", "<a", "b"])), max_size=10)


def first_match(text: str, strings: list[str]) -> tuple[int, int] | None:
    """Start and end of the match that ends first, the longest of those that end there."""
    for end in range(1, len(text) + 1):
        lengths = [len(string) for string in strings if text[:end].endswith(string)]
        if lengths:
            return end - max(lengths), end
    return None


def num_held(text: str, strings: list[str]) -> int:
    """How many of the last characters could begin a stop string."""
    return max(n for n in range(len(text) + 1) if n == 0 or any(s.startswith(text[-n:]) for s in strings))


@given(STRINGS, PIECES, st.booleans())
@settings(max_examples=1000, deadline=None)
def test_pieces_give_what_the_whole_text_gives(strings, pieces, keep):
    stop_strings = StopStrings(tuple(strings), keep)
    text, visible = "", []
    released, has_matched = "", False
    for piece, special in pieces:
        more, has_matched = stop_strings.push(piece, special)
        released += more
        text += piece + special
        visible += [True] * len(piece) + [False] * len(special)
        match = first_match(text, strings)
        assert has_matched == (match is not None)
        settled = len(text) - (0 if keep else num_held(text, strings))
        if match is not None:
            settled = match[1] if keep else match[0]
        assert released == "".join(text[i] for i in range(settled) if visible[i])
        if has_matched:
            return
    assert released + stop_strings.flush() == "".join(text[i] for i in range(len(text)) if visible[i])


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("strings", [("</tool>",), ("\n\nUser:", "\n\n\n"), ("aab", "ab"), ("tool", "</tool>")])
def test_every_split_into_three(strings, keep):
    text = "Say aaab </tol></tool>\n\n\nUser: x\n\nUser: y"
    match = first_match(text, list(strings))
    assert match is not None
    expected = text[: match[1]] if keep else text[: match[0]]
    for first in range(len(text) + 1):
        for second in range(first, len(text) + 1):
            stop_strings = StopStrings(strings, keep)
            released = ""
            for piece in (text[:first], text[first:second], text[second:]):
                more, has_matched = stop_strings.push(piece)
                released += more
                if has_matched:
                    break
            assert has_matched
            assert released == expected


def test_a_special_token_ends_the_text_without_being_shown():
    for keep in (True, False):
        stop_strings = StopStrings(("<|im_end|>",), keep)
        assert stop_strings.push("Hi <|im") == (("Hi <|im" if keep else "Hi "), False)
        assert stop_strings.push("", "<|im_end|>") == (("" if keep else "<|im"), True)


def test_a_long_almost_match_is_released_at_the_end():
    stop_strings = StopStrings(("a" * 1000 + "b",), keep=False)
    assert all(stop_strings.push("a" * 10) == ("", False) for _ in range(100))
    assert stop_strings.push("aaa") == ("aaa", False)
    assert stop_strings.flush() == "a" * 1000
