"""Messages to prompt, by the model's own chat template.

A template comes with the model, never with a request, and still runs in an immutable sandbox, in a thread, with a cap
on its output and on its time. A template past its time ends at its next look-up, call or piece of output.
"""

import asyncio
import json
import secrets
import time
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar, copy_context
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from text_generation_router.chat_messages import template_messages
from text_generation_router.errors import TemplateError
from text_generation_router.tokenizer_files import TokenizerFiles

MAX_RENDER_S = 5.0
MAX_PROMPT_CHARACTERS = 8_000_000
NUM_THREADS = 2
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")

_deadline: ContextVar[float] = ContextVar("deadline")


class ChatTemplate:
    """The chat template of the model in `folder`. Raises BrokenTokenizer for files that cannot be read."""

    def __init__(self, folder: str | Path, max_render_s: float = MAX_RENDER_S) -> None:
        files = TokenizerFiles.read(folder)
        self._special_tokens = {
            name: token for name in _SPECIAL_TOKENS if (token := files.special_token(name)) is not None
        }
        source = files.chat_template
        self._max_render_s = max_render_s
        self._takes_tool_calls = "tool_calls" in source
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="chat-template")
        self._template: jinja2.Template | None = None
        self._reason = "the model has no chat template"
        if source:
            try:
                self._template = _environment().from_string(source)
            except jinja2.TemplateError as error:
                self._reason = f"the model's chat template does not compile: {error}"

    async def render(self, messages: list[dict[str, Any]]) -> str:
        """The prompt for a conversation; a last message from the assistant is left open to be continued.

        Raises TemplateError.
        """
        return await asyncio.get_running_loop().run_in_executor(self._threads, partial(self.render_now, messages))

    def render_now(self, messages: list[dict[str, Any]]) -> str:
        """`render` in the calling thread."""
        if self._template is None:
            raise TemplateError(self._reason)
        shown = template_messages(messages, self._takes_tool_calls)
        content = shown[-1].get("content") if shown and shown[-1]["role"] == "assistant" else None
        if not isinstance(content, str):
            return self._render(self._template, shown, add_generation_prompt=True)
        # No message can hold the marker, so where it comes out the last content ends.
        marker = secrets.token_hex(16)
        shown[-1] = shown[-1] | {"content": f"{content}{marker} "}
        before, found, after = self._render(self._template, shown, add_generation_prompt=False).rpartition(marker)
        if not found:
            raise TemplateError("the template drops the last message, so it cannot be continued")
        # A template that trims the content took the space after the marker: trim what it would have trimmed.
        return before if after.startswith(" ") else before.rstrip()

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _render(self, template: jinja2.Template, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        variables = self._special_tokens | {
            "messages": messages,
            "add_generation_prompt": add_generation_prompt,
            "tools": None,
            "documents": None,
        }
        return copy_context().run(self._generate, template, variables)

    def _generate(self, template: jinja2.Template, variables: dict[str, Any]) -> str:
        _deadline.set(time.monotonic() + self._max_render_s)
        pieces: list[str] = []
        num_characters = 0
        try:
            for piece in template.generate(variables):
                pieces.append(piece)
                num_characters += len(piece)
                if num_characters > MAX_PROMPT_CHARACTERS:
                    raise TemplateError(f"the prompt has more than {MAX_PROMPT_CHARACTERS} characters")
                _check_deadline()
        except jinja2.TemplateError as error:
            raise TemplateError(error.message or type(error).__name__) from error
        except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError) as error:
            # A template's own mistakes with what the messages hold.
            raise TemplateError(f"{type(error).__name__}: {error}") from error
        return "".join(pieces)


def _check_deadline() -> None:
    if time.monotonic() > _deadline.get():
        raise TemplateError("the template took too long")


class _Sandbox(ImmutableSandboxedEnvironment):
    """The sandbox, with the deadline checked at every look-up and call: a loop cannot do without them for long."""

    def getattr(self, obj: Any, attribute: str) -> Any:
        _check_deadline()
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        _check_deadline()
        return super().getitem(obj, argument)

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        _check_deadline()
        return super().call(context, obj, *args, **kwargs)


class _GenerationBlock(Extension):
    """`{% generation %}` marks what the assistant wrote, for training; here it only shows its content."""

    tags = {"generation"}  # noqa: RUF012 - as the base class declares it

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        """Take the tag away and leave what is inside."""
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=lineno)


def _environment() -> _Sandbox:
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: jinja's own filter escapes characters for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(str(message))


def _strftime_now(date_format: str) -> str:
    return datetime.now().strftime(date_format)
