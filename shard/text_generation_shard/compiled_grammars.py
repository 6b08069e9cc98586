"""Grammars that are ready to be followed, by their text. Called from any thread."""

import logging
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llguidance import LLMatcher
    from text_generation_proto.matcher import TokenTable

logger = logging.getLogger(__name__)

# A matcher at the beginning of a text takes 1 to 50 MB, most of them 1.
MAX_GRAMMARS = 128


class UnusableGrammar(ValueError):
    """A grammar that no sequence can follow; the text says why."""


class CompiledGrammars:
    """Matchers at the beginning of a text; the least recently used of them are forgotten."""

    def __init__(self, vocab_size: int) -> None:
        """`vocab_size`: the width of the logits."""
        self.vocab_size = vocab_size
        self.eos_token_ids: frozenset[int] = frozenset()
        self._tokens: TokenTable | None = None
        self._matchers: OrderedDict[str, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def load(self, token_bytes: Sequence[bytes], eos_token_ids: Sequence[int]) -> None:
        """Take the tokens in; ids beyond the logits' width cannot be sampled and are left out."""
        # Not needed, and not loaded, where no grammar is.
        from text_generation_proto.matcher import TokenTable

        size = self.vocab_size
        tokens = [*token_bytes[:size], *[b""] * (size - len(token_bytes))]
        ends = [token_id for token_id in eos_token_ids if 0 <= token_id < size]
        if not ends:
            raise UnusableGrammar(f"no EOS id is below the logits' width of {size}")
        with self._lock:
            self._tokens = TokenTable(tokens, ends)
            self.eos_token_ids = frozenset(ends)
            self._matchers.clear()

    def prepare(self, text: str) -> None:
        """Have a grammar ready; raises UnusableGrammar."""
        self._find(text)

    def matcher(self, text: str) -> "LLMatcher":
        """A matcher of one's own, at the beginning of a text; raises UnusableGrammar."""
        return self._find(text).deep_copy()

    def _find(self, text: str) -> "LLMatcher":
        with self._lock:
            tokens, matcher = self._tokens, self._matchers.get(text)
            if matcher is not None:
                self._matchers.move_to_end(text)
                return matcher
        if tokens is None:
            raise UnusableGrammar("the router has told no tokens")
        from text_generation_proto.matcher import InvalidGrammar

        try:
            matcher = tokens.compile(text)  # lets other threads run
        except InvalidGrammar as error:
            raise UnusableGrammar(str(error)) from None
        with self._lock:
            if tokens is self._tokens:
                self._matchers[text] = matcher
                if len(self._matchers) > MAX_GRAMMARS:
                    self._matchers.popitem(last=False)
        return matcher
