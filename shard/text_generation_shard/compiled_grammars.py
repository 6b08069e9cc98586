"""Grammars that are ready to be followed, by their text. Called from any thread."""

import logging
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
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
    """Matchers at the beginning of a text; the least recently used of them are forgotten.

    Copies of one matcher share its automaton, which grows as they go on, and a lock around it: two threads make their
    masks one after the other. So a grammar that many sequences follow is compiled several times, by number.
    """

    def __init__(self, vocab_size: int) -> None:
        """`vocab_size`: the width of the logits."""
        self.vocab_size = vocab_size
        self.eos_token_ids: frozenset[int] = frozenset()
        self._tokens: TokenTable | None = None
        self._matchers: OrderedDict[tuple[str, int], LLMatcher] = OrderedDict()  # by text and number
        self._lock = threading.Lock()
        self._compiler = ThreadPoolExecutor(1, thread_name_prefix="further-grammars")
        self._awaited: set[tuple[str, int]] = set()  # what the compiler will have

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
        self._matcher(text, 0)

    def matcher(self, text: str, number: int = 0) -> "LLMatcher":
        """A matcher of one's own, at the beginning of a text; raises UnusableGrammar.

        It shares its lock with those of the same number: until that has been compiled, with those of number 0.
        """
        if number and self._find(text, number) is None:
            self._compile_later(text, number)
            number = 0
        return self._matcher(text, number).deep_copy()

    def _find(self, text: str, number: int) -> "LLMatcher | None":
        with self._lock:
            if (matcher := self._matchers.get((text, number))) is not None:
                self._matchers.move_to_end((text, number))
            return matcher

    def _matcher(self, text: str, number: int) -> "LLMatcher":
        if (matcher := self._find(text, number)) is not None:
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
                self._matchers[text, number] = matcher
                if len(self._matchers) > MAX_GRAMMARS:
                    self._matchers.popitem(last=False)
        return matcher

    def _compile_later(self, text: str, number: int) -> None:
        """Have a further matcher ready some time: it would hold up the masks of all who wait for it."""
        with self._lock:
            if (text, number) in self._awaited:
                return
            self._awaited.add((text, number))

        def compile_now() -> None:
            try:
                self._matcher(text, number)
            finally:
                with self._lock:
                    self._awaited.discard((text, number))

        self._compiler.submit(compile_now)
