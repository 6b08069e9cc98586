"""Grammars that are ready to be followed, by their text. Called from any thread."""

import logging
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llguidance import LLMatcher
    from text_generation_proto.matcher import TokenTable

logger = logging.getLogger(__name__)

# A matcher at the beginning of a text takes 1 to 50 MB, most of them 1.
MAX_GRAMMARS = 128
MAX_FURTHER_MATCHERS = 64  # bounded apart: none pushes out a grammar that is ready


class UnusableGrammar(ValueError):
    """A grammar that no sequence can follow; the text says why."""


class CompiledGrammars:
    """Matchers at the beginning of a text; the least recently used of them are forgotten.

    Copies of one matcher share its automaton, which grows as they go on, and a lock around it: two threads make their
    masks one after the other. So a grammar that many sequences follow is compiled several times: number 0 before anyone
    follows it, the further ones when they are asked for.
    """

    def __init__(self, vocab_size: int) -> None:
        """`vocab_size`: the width of the logits."""
        self.vocab_size = vocab_size
        self.eos_token_ids: frozenset[int] = frozenset()
        self._tokens: TokenTable | None = None
        self._matchers: OrderedDict[str, LLMatcher] = OrderedDict()
        self._further: OrderedDict[tuple[str, int], Future[LLMatcher]] = OrderedDict()
        self._lock = threading.Lock()
        self._compiler = ThreadPoolExecutor(1, thread_name_prefix="further-matchers")

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
            self._further.clear()

    def prepare(self, text: str) -> None:
        """Have a grammar ready; raises UnusableGrammar."""
        self._matcher(text)

    def matcher(self, text: str) -> "LLMatcher":
        """A matcher of one's own, at the beginning of a text, a copy of number 0; raises UnusableGrammar."""
        return self._matcher(text).deep_copy()

    def further(self, text: str, number: int) -> "Future[LLMatcher]":
        """The matcher of this number, from 1 on, of a grammar that is ready: to be copied once it is compiled."""
        with self._lock:
            future = self._further.get((text, number))
            if future is None:
                assert self._tokens is not None
                future = self._further[text, number] = self._compiler.submit(self._tokens.compile, text)
                if len(self._further) > MAX_FURTHER_MATCHERS:
                    self._further.popitem(last=False)
            self._further.move_to_end((text, number))
            return future

    def _matcher(self, text: str) -> "LLMatcher":
        with self._lock:
            if (matcher := self._matchers.get(text)) is not None:
                self._matchers.move_to_end(text)
                return matcher
        if (tokens := self._tokens) is None:
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
