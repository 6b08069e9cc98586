"""What each token id stands for, as tables that are built once at start.

A byte-level or sentencepiece tokenizer gives every id its bytes. A tokenizer with another decoder has no such table
(`is_bytewise` is False), and its texts come from the decoder itself.
"""

from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

# Stands for a character outside the byte alphabet: it cannot be encoded in latin-1.
_NOT_A_BYTE = "\uffff"


@dataclass(frozen=True)
class Vocabulary:
    """Tables by token id. They are as long as the logits are wide; an id without a token stands for no bytes."""

    # What a token adds to the visible text; b"" for special tokens.
    token_bytes: list[bytes]
    # The same where it is whole characters, else None.
    visible_texts: list[str | None]
    # Ids left out of visible text, with their own text.
    special_texts: dict[int, str]
    # Whether the decoder drops the space that begins a text.
    strips_first_space: bool
    is_bytewise: bool
    tokenizer: Tokenizer

    def __len__(self) -> int:
        return len(self.token_bytes)

    def is_special(self, token_id: int) -> bool:
        """Whether the token is left out of visible text."""
        return token_id in self.special_texts

    def token_text(self, token_id: int) -> str:
        """The token's own text, special tokens included; bytes that are no whole character become U+FFFD."""
        return self.own_bytes(token_id).decode("utf-8", "replace")

    def own_bytes(self, token_id: int) -> bytes:
        """The token's own bytes, special tokens included."""
        special = self.special_texts.get(token_id)
        return self.token_bytes[token_id] if special is None else special.encode()


def build_vocabulary(tokenizer: Tokenizer, decoder: dict[str, Any] | None, size: int) -> Vocabulary:
    """Build the tables for `tokenizer`, whose decoder is as tokenizer.json describes it, for at least `size` ids."""
    token_ids = tokenizer.get_vocab(with_added_tokens=True)
    special_texts = {
        token_id: token.content for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special
    }
    size = max(size, max(token_ids.values(), default=-1) + 1)
    is_byte_level = _is_byte_level(decoder)
    word_decoder = None if is_byte_level else _WordDecoder.from_description(decoder)
    if is_byte_level:
        table = _byte_level_table(token_ids, size)
    elif word_decoder is not None:
        table = word_decoder.table(token_ids, size)
    else:
        table = _decoded_table(tokenizer, token_ids, size)
    for token_id in special_texts:
        table[token_id] = b""
    return Vocabulary(
        token_bytes=table,
        visible_texts=[_whole_text(value) for value in table],
        special_texts=special_texts,
        strips_first_space=word_decoder is not None and word_decoder.strips_first_space,
        is_bytewise=is_byte_level or word_decoder is not None,
        tokenizer=tokenizer,
    )


def _whole_text(value: bytes) -> str | None:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return None


def _parts(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    """A decoder's steps, in order."""
    if decoder is None:
        return []
    return list(decoder["decoders"]) if decoder["type"] == "Sequence" else [decoder]


def _is_byte_level(decoder: dict[str, Any] | None) -> bool:
    kinds = [part["type"] for part in _parts(decoder)]
    return "ByteLevel" in kinds and set(kinds) <= {"ByteLevel", "Fuse"}


def byte_alphabet() -> dict[str, int]:
    """The printable characters that byte-level vocabularies write bytes with.

    Printable latin-1 characters stand for themselves, the other 68 bytes are counted up from U+0100.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


def _byte_level_table(token_ids: dict[str, int], size: int) -> list[bytes]:
    """A token of characters outside the alphabet, which only added tokens have, stands for its own text."""
    alphabet = byte_alphabet()
    translation = {code: _NOT_A_BYTE for code in range(0x100) if chr(code) not in alphabet}
    translation |= {ord(character): chr(byte) for character, byte in alphabet.items()}
    table = [b""] * size
    for token, token_id in token_ids.items():
        try:
            table[token_id] = token.translate(translation).encode("latin-1")
        except UnicodeEncodeError:
            table[token_id] = token.encode()
    return table


@dataclass(frozen=True)
class _WordDecoder:
    """A sentencepiece-style decoder: a mark for the space, bytes spelled `<0x41>`, perhaps no first space."""

    mark: str
    has_byte_tokens: bool
    strips_first_space: bool

    @classmethod
    def from_description(cls, decoder: dict[str, Any] | None) -> "_WordDecoder | None":
        """The decoder if it is one of these, else None."""
        parts = _parts(decoder)
        if [part["type"] for part in parts] == ["Metaspace"]:
            strips = parts[0].get("prepend_scheme", "always") != "never" and parts[0].get("add_prefix_space", True)
            return cls(parts[0]["replacement"], has_byte_tokens=False, strips_first_space=bool(strips))
        kinds = [part["type"] for part in parts if part["type"] not in ("ByteFallback", "Fuse")]
        if not parts or kinds not in (["Replace"], ["Replace", "Strip"]) or parts[0]["type"] != "Replace":
            return None
        strip = parts[-1] if kinds[-1] == "Strip" else {"content": " ", "start": 0, "stop": 0}
        is_known_strip = strip["content"] == " " and strip["start"] in (0, 1) and strip["stop"] == 0
        is_fused = any(part["type"] == "Fuse" for part in parts)
        mark = parts[0]["pattern"].get("String")
        if mark is None or parts[0]["content"] != " " or not is_known_strip or (strip["start"] and not is_fused):
            return None
        return cls(mark, any(part["type"] == "ByteFallback" for part in parts), strip["start"] == 1)

    def table(self, token_ids: dict[str, int], size: int) -> list[bytes]:
        """Bytes of every id."""
        table = [b""] * size
        byte_tokens = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(0x100)} if self.has_byte_tokens else {}
        for token, token_id in token_ids.items():
            table[token_id] = byte_tokens.get(token) or token.replace(self.mark, " ").encode()
        return table


def _decoded_table(tokenizer: Tokenizer, token_ids: dict[str, int], size: int) -> list[bytes]:
    """Each token decoded alone: what `token_text` shows where a decoder looks at more than one token."""
    table = [b""] * size
    ids = list(token_ids.values())
    for token_id, text in zip(ids, tokenizer.decode_batch([[token_id] for token_id in ids]), strict=True):
        table[token_id] = text.encode()
    return table
