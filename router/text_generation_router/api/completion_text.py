"""The text of one completion as it comes, with its log-probabilities; where it is echoed, the prompt before it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from text_generation_router.api.context import Tokenizer
from text_generation_router.token_scores import PromptScores, TokenScore
from text_generation_router.token_stream import TokenOutput


@dataclass
class Piece:
    """Some of the text."""

    text: str
    logprobs: dict[str, Any] | None


@dataclass
class _Columns:
    """The four lists of this route's log-probabilities."""

    tokens: list[str] = field(default_factory=list)
    token_logprobs: list[float | None] = field(default_factory=list)
    top_logprobs: list[dict[str, float] | None] = field(default_factory=list)
    text_offset: list[int] = field(default_factory=list)


def joined(pieces: Sequence[Piece]) -> Piece:
    """Several pieces as one."""
    logprobs = [piece.logprobs for piece in pieces if piece.logprobs is not None]
    columns = {name: [value for one in logprobs for value in one[name]] for name in logprobs[0]} if logprobs else None
    return Piece("".join(piece.text for piece in pieces), columns)


class CompletionText:
    """Makes pieces of tokens; `num_top` is None where nobody asked for log-probabilities."""

    def __init__(self, tokenizer: Tokenizer, num_top: int | None) -> None:
        self._tokenizer = tokenizer
        self._num_top = num_top
        self._offset = 0  # characters that came before

    def prompt(self, prompt: str | list[int], token_ids: list[int], scores: PromptScores | None) -> Piece:
        """The prompt, `token_ids` once it is encoded."""
        columns = _Columns()
        texts = self._tokenizer.pieces(token_ids) if scores is not None or not isinstance(prompt, str) else []
        for token_id, text, score in zip(token_ids, texts, scores or [], strict=False):
            self._add(columns, token_id, text, score.logprob if score else None, score.top_tokens if score else ())
        text = prompt if isinstance(prompt, str) else "".join(texts)
        self._offset = len(text)
        return self._piece(text, columns)

    def generated(self, outputs: Iterable[TokenOutput]) -> Piece:
        """Some generated tokens."""
        columns, texts = _Columns(), []
        for output in outputs:
            texts.append(output.text)
            if self._num_top is not None:
                self._add(columns, output.token_id, output.text, output.logprob, output.top_tokens)
        return self._piece("".join(texts), columns)

    def _piece(self, text: str, columns: _Columns) -> Piece:
        return Piece(text, None if self._num_top is None else vars(columns))

    def _add(
        self, columns: _Columns, token_id: int, text: str, logprob: float | None, top_tokens: Iterable[TokenScore]
    ) -> None:
        token_text = self._tokenizer.token_text
        columns.tokens.append(token_text(token_id))
        columns.token_logprobs.append(logprob)
        columns.text_offset.append(self._offset)
        self._offset += len(text)
        if logprob is None:
            columns.top_logprobs.append(None)
            return
        top: dict[str, float] = {}
        # Tokens that look alike share a name, which is then the better one's.
        for name, value in [(token_text(best), value) for best, value in islice(top_tokens, self._num_top)]:
            top.setdefault(name, value)
        top.setdefault(token_text(token_id), logprob)
        columns.top_logprobs.append(top)
