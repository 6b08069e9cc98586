"""The text of one completion as it comes, with its log-probabilities; where it is echoed, the prompt before it."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice, repeat
from typing import Any

from text_generation_router.api.context import Tokenizer
from text_generation_router.api.responses import json_list
from text_generation_router.token_scores import PromptScores, TokenScore
from text_generation_router.token_stream import TokenOutput

# Tokens and the best ones at their places that are rendered in one go: a millisecond's work.
_SLICE_ENTRIES = 1000


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
    """Several pieces as one, whose columns are rendered."""
    logprobs = [piece.logprobs for piece in pieces if piece.logprobs is not None]
    columns = {name: json_list(value for one in logprobs for value in one[name]) for name in vars(_Columns())}
    return Piece("".join(piece.text for piece in pieces), columns if logprobs else None)


class CompletionText:
    """Makes pieces of tokens; `num_top` is None where nobody asked for log-probabilities."""

    def __init__(self, tokenizer: Tokenizer, num_top: int | None) -> None:
        self._tokenizer = tokenizer
        self._num_top = num_top
        self._offset = 0  # characters that came before

    def prompt(self, prompt: str | list[int], token_ids: list[int], scores: PromptScores | None) -> Iterator[Piece]:
        """The prompt, `token_ids` once it is encoded, in slices; the first has all text of a prompt that is text."""
        given = iter((prompt,)) if isinstance(prompt, str) else None
        if given is not None and scores is None:
            yield self._piece(next(given), _Columns())
            return
        rows = zip(token_ids, self._tokenizer.pieces(token_ids), scores or repeat(None), strict=False)
        num_rows = max(_SLICE_ENTRIES // (1 + (self._num_top or 0)), 1)
        while part := list(islice(rows, num_rows)):
            columns = _Columns()
            for token_id, text, score in part if self._num_top is not None else ():
                self._add(columns, token_id, text, score.logprob if score else None, score.top_tokens if score else ())
            yield self._piece("".join(text for _, text, _ in part) if given is None else next(given, ""), columns)
        if isinstance(prompt, str):
            self._offset = len(prompt)

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
