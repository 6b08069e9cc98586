"""Which parser an answer needs, and which special tokens it has to see as text."""

import secrets
import string
from collections.abc import Callable

from text_generation_router.chat_output.deltas import CallArguments, CallStart, Delta, Parser
from text_generation_router.chat_output.forced import ForcedParser
from text_generation_router.chat_output.hermes import HermesParser
from text_generation_router.chat_output.llama3 import PYTHON_TAG, Llama3Parser
from text_generation_router.chat_output.mistral import ARGUMENTS, CALL_ID, START, MistralParser
from text_generation_router.model_family import ToolFormat

# Marks that some models have as special tokens, which are no text otherwise.
TOOL_MARKS: dict[ToolFormat, tuple[str, ...]] = {
    ToolFormat.HERMES: ("<tool_call>", "</tool_call>"),
    ToolFormat.LLAMA3: (PYTHON_TAG,),
    ToolFormat.MISTRAL: (START, ARGUMENTS, CALL_ID),
}
_ALPHANUMERIC = string.ascii_letters + string.digits


def tool_parser(tool_format: ToolFormat, names: frozenset[str], is_parallel: bool) -> Parser:
    """The parser of one answer that may call tools."""
    parsers: dict[ToolFormat, Callable[[], Parser]] = {
        ToolFormat.HERMES: lambda: HermesParser(make_call_id),
        ToolFormat.LLAMA3: lambda: Llama3Parser(make_call_id, names),
        ToolFormat.MISTRAL: lambda: MistralParser(_make_short_call_id),
    }
    parser = parsers[tool_format]()
    return parser if is_parallel else _FirstCall(parser)


def make_call_id() -> str:
    """A call's id; no two calls have the same."""
    return f"call_{secrets.token_hex(12)}"


def _make_short_call_id() -> str:
    """Mistral's templates demand nine letters and digits."""
    return "".join(secrets.choice(_ALPHANUMERIC) for _ in range(9))


def forced_parser() -> Parser:
    """The parser of one answer that a grammar forces to be a call, or the choice of none."""
    return ForcedParser(make_call_id)


class _FirstCall:
    """Leaves out all calls but the first."""

    def __init__(self, parser: Parser) -> None:
        self._parser = parser

    def push(self, text: str) -> list[Delta]:
        return [delta for delta in self._parser.push(text) if not _is_later_call(delta)]

    def end(self) -> list[Delta]:
        return [delta for delta in self._parser.end() if not _is_later_call(delta)]


def _is_later_call(delta: Delta) -> bool:
    return isinstance(delta, (CallStart, CallArguments)) and delta.index > 0
