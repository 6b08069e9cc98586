"""Grammars as router and shard compile them: from the same text, over the same tokens, within the same limits.

So a grammar that the router has tried is one that the shard can follow. Loads llguidance; only the processes that
compile grammars import this.
"""

from collections.abc import Sequence
from typing import cast

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

# Work is counted, not timed: the limits mean the same on every machine. A mask's limits are 2 to 4 ms of it, over ten
# times what the masks of large schemas took. A state takes about 2 kB.
LIMITS = LLParserLimits(
    max_items_in_row=2000,
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=50_000,
    step_max_items=50_000,
    max_lexer_states=10_000,
    max_grammar_size=250_000,
    verbose_errors=False,
)

# Kinds of tokens that a state allows or excludes as a whole, which saves a look at each: the library's own, and those
# of 5 and 15 characters, with which the masks of bounded strings take 57 us and not 97 (49 152 tokens, one core).
_TEXT = r'[^"\\\x00-\x1F\x7F]'
_SLICES = [r"[\x20\x0A\x0D\x09]+", *(f"{_TEXT}{{1,{most}}}" for most in (5, 10, 15, 30)), f"{_TEXT}+"]


class InvalidGrammar(ValueError):
    """A text that is no grammar, or one beyond the limits; the text says why."""


class _Tokens:
    """What llguidance asks of a tokenizer: bytes by id. It never has to split text."""

    is_tokenizer_wrapper = True
    bos_token_id: int | None = None
    special_token_ids: Sequence[int] = ()

    def __init__(self, token_bytes: Sequence[bytes], eos_token_ids: Sequence[int]) -> None:
        self.tokens = token_bytes
        self.eos_token_id = eos_token_ids[0]

    def __call__(self, text: str) -> list[int]:
        raise NotImplementedError("grammars leave the choice of tokens to the model")


class TokenTable:
    """The tokens of one model: `token_bytes` by id, b"" for those that are never text; `eos_token_ids` end a text."""

    def __init__(self, token_bytes: Sequence[bytes], eos_token_ids: Sequence[int]) -> None:
        tokens = cast(TokenizerWrapper, _Tokens(list(token_bytes), eos_token_ids))
        self._tokens = LLTokenizer(tokens, eos_token=list(eos_token_ids), slices=_SLICES)

    def compile(self, text: str) -> LLMatcher:
        """A matcher at the beginning of a text; raises InvalidGrammar."""
        matcher = LLMatcher(self._tokens, text, log_level=0, limits=LIMITS)
        check(matcher)
        return matcher


def check(matcher: LLMatcher) -> None:
    """Raise InvalidGrammar for a matcher that cannot go on."""
    if matcher.is_error():
        lines = matcher.get_error().splitlines()
        raise InvalidGrammar(lines[0] if lines else "unknown error")
