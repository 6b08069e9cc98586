"""What goes between the router and its grammar workers: frames, which are a length of four bytes and then a content."""

from text_generation_router.grammar import Grammar, GrammarKind
from text_generation_router.model_family import Reasoning

LENGTH_BYTES = 4
# What an answer begins with: a canonical text follows, or the reason of a refusal.
GOOD, BAD = b"+", b"-"


def frame(content: bytes) -> bytes:
    """A frame with this content."""
    return len(content).to_bytes(LENGTH_BYTES) + content


def pack(grammar: Grammar) -> bytes:
    """A grammar as a frame's content."""
    return f"{grammar.kind}\n{grammar.reasoning}\n{grammar.text}".encode()


def unpack(content: bytes) -> Grammar:
    """The grammar in a frame's content."""
    kind, reasoning, text = content.decode().split("\n", 2)
    return Grammar(GrammarKind(kind), text, Reasoning(reasoning))
