"""Text to token ids, off the event loop, and what the model's files say about special tokens."""

import asyncio
import json
import re
import secrets
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

from tokenizers import Encoding
from tokenizers import Tokenizer as BackendTokenizer

from text_generation_router.detokenizer import Detokenizer
from text_generation_router.errors import ValidationError
from text_generation_router.tokenizer_files import BrokenTokenizer, TokenizerFiles
from text_generation_router.vocabulary import Vocabulary, build_vocabulary

# Ends of a turn in well-known chat templates; one that the model's template names ends a text too.
END_OF_TURN_TOKENS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<|eot|>",
    "<|end_of_turn|>",
    "<end_of_turn>",
    "<turn|>",
)


@dataclass(frozen=True, slots=True)
class TokenSpan:
    """A token and the part of a text that it stands for, in bytes of UTF-8; a token that was added has none."""

    token_id: int
    text: str = ""
    start: int = 0
    stop: int = 0


# Takes a millisecond or less. A thread would end no sooner than the busy event loop lets it: up to Python's switch
# interval later, twice.
MAX_CHARACTERS_AT_ONCE = 1000


class Tokenizer:
    """One model's tokenizer; `num_threads` of texts are encoded at once. Raises BrokenTokenizer."""

    def __init__(self, folder: str | Path, num_threads: int) -> None:
        files = TokenizerFiles.read(folder)
        self._backend, decoder = _load_backend(Path(folder) / "tokenizer.json")
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="tokenizer")
        size = files.config.get("vocab_size")
        self.vocabulary: Vocabulary = build_vocabulary(self._backend, decoder, size if isinstance(size, int) else 0)
        self.bos_token_id = _bos_token_id(files, self._backend)
        self.eos_token_ids = frozenset(_eos_token_ids(files, self.vocabulary, self._backend))
        # Splits text where a special token's own text must stay text; no client can guess it.
        self._plain_mark = f"\ufdd0{secrets.token_hex(8)}\ufdd0"
        special = sorted(self.vocabulary.special_texts.values(), key=len, reverse=True)
        self._special_pattern = re.compile("|".join(map(re.escape, special))) if special else None
        # None: tokenizer.json alone decides; else tokenizer_config.json does.
        self._adds_bos: bool | None = files.tokenizer_config.get("add_bos_token")

    async def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`, special tokens in it included; BOS once where the model wants one.

        Runs in the thread pool, short texts at once; cancelling the caller takes a text that still waits out of it.
        """
        if len(text) <= MAX_CHARACTERS_AT_ONCE:
            return self.encode_now(text, add_special_tokens)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, partial(self.encode_now, text, add_special_tokens))

    def as_plain_text(self, value: Any) -> Any:
        """`value`, a string or JSON of strings, such that no special token in it is encoded as one.

        For what clients put into a chat template: only the template itself may write control tokens.
        """
        if isinstance(value, str):
            if self._special_pattern is None:
                return value
            return self._special_pattern.sub(lambda match: match[0][:1] + self._plain_mark + match[0][1:], value)
        if isinstance(value, dict):
            return {self.as_plain_text(key): self.as_plain_text(item) for key, item in value.items()}
        return [self.as_plain_text(item) for item in value] if isinstance(value, list) else value

    def visible_text(self, text: str) -> str:
        """`text` without the marks of `as_plain_text`, as a client may see it."""
        return text.replace(self._plain_mark, "")

    def encode_now(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """`encode` in the calling thread."""
        ids: list[int] = []
        for piece, adds_special in self._pieces(text, add_special_tokens):
            encoding, missing, num_doubled = self._encode_piece(piece, adds_special)
            ids += missing + encoding.ids[num_doubled:]
        return ids

    def spans_now(self, text: str, add_special_tokens: bool = True) -> Iterator[TokenSpan]:
        """What `encode` gives, with the part of `visible_text(text)` that each token stands for; in the calling thread.

        Two million characters take seconds, in which other threads get their turns.
        """
        num_bytes_before = 0
        for piece, adds_special in self._pieces(text, add_special_tokens):
            encoding, missing, num_doubled = self._encode_piece(piece, adds_special, has_offsets=True)
            ends = list(accumulate((len(c.encode()) for c in piece), initial=num_bytes_before))
            yield from map(TokenSpan, missing)
            for position, token_id in islice(enumerate(encoding.ids), num_doubled, None):
                # All offsets at once would take a tenth of a second in one call, which lets no other thread run.
                start, stop = encoding.token_to_chars(position) or (0, 0)
                if stop > start:
                    yield TokenSpan(token_id, piece[start:stop], ends[start], ends[stop])
                else:
                    yield TokenSpan(token_id)
            num_bytes_before = ends[-1]

    def _pieces(self, text: str, add_special_tokens: bool) -> Iterator[tuple[str, bool]]:
        """The parts of a text that are encoded on their own; special tokens are added before the first alone."""
        first, *others = text.split(self._plain_mark)
        yield first, add_special_tokens
        for other in others:
            yield other, False

    def _encode_piece(
        self, text: str, add_special_tokens: bool, has_offsets: bool = False
    ) -> tuple[Encoding, list[int], int]:
        """The encoding, the ids that are missing before it, and how many of its first tokens are doubled."""
        uses_processor = add_special_tokens and self._adds_bos is None
        try:
            # A batch of one lets other threads run meanwhile, as `encode` does not; the fast form finds no offsets.
            encode = self._backend.encode_batch if has_offsets else self._backend.encode_batch_fast
            [encoding] = encode([text], add_special_tokens=uses_processor)
        except TypeError as error:  # the library takes every string that is Unicode
            raise ValidationError("text holds a lone surrogate, which is no character") from error
        ids: list[int] = encoding.ids
        bos = self.bos_token_id
        if not add_special_tokens or bos is None:
            return encoding, [], 0
        if self._adds_bos and ids[:1] != [bos]:
            return encoding, [bos], 0
        return encoding, [], int(uses_processor and ids[:2] == [bos, bos])

    def grammar_tokens(self, vocab_size: int) -> tuple[list[bytes], list[int]] | None:
        """Bytes of the tokens that logits of this width can choose, and the ids that end a text.

        None where no grammar can be followed: tokens do not stand for bytes, or none ends a text.
        """
        ends = sorted(token_id for token_id in self.eos_token_ids if token_id < vocab_size)
        if not self.vocabulary.is_bytewise or not ends:
            return None
        return self.vocabulary.token_bytes[:vocab_size], ends

    def is_special(self, token_id: int) -> bool:
        """Whether the token is left out of visible text."""
        return self.vocabulary.is_special(token_id)

    def special_ids(self, texts: Iterable[str]) -> list[int]:
        """Ids of those special tokens whose own text is one of `texts`."""
        wanted = set(texts)
        return [token_id for token_id, text in self.vocabulary.special_texts.items() if text in wanted]

    def token_text(self, token_id: int) -> str:
        """A token's own text, special tokens included."""
        return self.vocabulary.token_text(token_id)

    def pieces(self, token_ids: list[int]) -> Iterator[str]:
        """The visible text that each of these tokens completes; all of them together are the tokens' text."""
        detokenizer = Detokenizer(self.vocabulary, [])
        for position, token_id in enumerate(token_ids, 1):
            text = detokenizer.push(token_id)
            yield text + detokenizer.flush() if position == len(token_ids) else text

    def token_bytes(self, token_id: int) -> bytes:
        """A token's own bytes, special tokens included; a character may be spread over several tokens."""
        return self.vocabulary.own_bytes(token_id)

    def close(self) -> None:
        """End the threads; texts that still wait are given up."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def _load_backend(path: Path) -> tuple[BackendTokenizer, dict[str, Any] | None]:
    """The tokenizer in a tokenizer.json, and how the file describes its decoder."""
    if not path.exists():
        raise BrokenTokenizer(f"{path} is missing")
    try:
        backend = BackendTokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise BrokenTokenizer(f"{path} is not usable: {error}") from error
    backend.no_truncation()
    backend.no_padding()
    decoder = backend.decoder
    return backend, None if decoder is None else json.loads(decoder.__getstate__())


def _bos_token_id(files: TokenizerFiles, backend: BackendTokenizer) -> int | None:
    token = files.special_token("bos_token")
    token_id: int | None = backend.token_to_id(token) if token is not None else None
    if token_id is None and isinstance(files.config.get("bos_token_id"), int):
        token_id = files.config["bos_token_id"]
    return token_id


def _eos_token_ids(files: TokenizerFiles, vocabulary: Vocabulary, backend: BackendTokenizer) -> Iterator[int]:
    """Every id that ends a text, from whichever file names it."""
    for values in (files.config, files.generation_config):
        ids = values.get("eos_token_id")
        for token_id in ids if isinstance(ids, list) else [ids]:
            if isinstance(token_id, int):
                yield token_id
    names = [files.special_token("eos_token")]
    names += [token for token in END_OF_TURN_TOKENS if any(token in t for t in files.chat_templates.values())]
    for name in names:
        token_id = backend.token_to_id(name) if name is not None else None
        if token_id is not None and (name == names[0] or vocabulary.is_special(token_id)):
            yield token_id
