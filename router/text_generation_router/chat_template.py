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
from jinja2.meta import find_undeclared_variables
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from text_generation_router.conversation import Conversation, template_messages
from text_generation_router.errors import TemplateError, ValidationError
from text_generation_router.model_family import detect_family
from text_generation_router.tokenizer_files import DEFAULT_TEMPLATE, TokenizerFiles

MAX_RENDER_S = 5.0
MAX_PROMPT_CHARACTERS = 8_000_000
NUM_THREADS = 2
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
_TOOL_TEMPLATE = "tool_use"
# What a template is given by us alone, whatever a client asks for.
_OWN_VARIABLES = frozenset((*_SPECIAL_TOKENS, "messages", "tools", "documents", "add_generation_prompt"))

_deadline: ContextVar[float] = ContextVar("deadline")


class ModelTemplate:
    """One of the model's templates: compiled, and what it makes use of."""

    def __init__(self, source: str, environment: jinja2.Environment) -> None:
        self.compiled: jinja2.Template | None = None
        self.variables: frozenset[str] = frozenset()
        self.reason = ""
        try:
            self.variables = frozenset(find_undeclared_variables(environment.parse(source)))
            self.compiled = environment.from_string(source)
        except jinja2.TemplateError as error:
            self.reason = f"the model's chat template does not compile: {error}"
        self.takes_tools = "tools" in self.variables
        self.takes_tool_calls = "tool_calls" in source
        # Variables that a client may set: those that neither we nor the environment set.
        self.switches = self.variables - _OWN_VARIABLES - environment.globals.keys()


class ChatTemplate:
    """The chat templates of the model in `folder`. Raises BrokenTokenizer for files that cannot be read."""

    def __init__(self, folder: str | Path, max_render_s: float = MAX_RENDER_S) -> None:
        files = TokenizerFiles.read(folder)
        self._special_tokens = {
            name: token for name in _SPECIAL_TOKENS if (token := files.special_token(name)) is not None
        }
        self._max_render_s = max_render_s
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="chat-template")
        environment = _environment()
        self._templates = {name: ModelTemplate(source, environment) for name, source in files.chat_templates.items()}
        self.family = detect_family(files.chat_templates.values())

    def choose(self, name: str | None, has_tools: bool) -> ModelTemplate:
        """The template of a name; without one the default, or the one for tools where the model has it apart.

        Raises ValidationError for a name that is none, and TemplateError for a model without a template.
        """
        if name is not None:
            if name not in self._templates:
                known = ", ".join(self._templates) or "none"
                reason = f"`chat_template` must be the name of one of the model's templates: {known}"
                raise ValidationError(reason, param="chat_template")
            return self._templates[name]
        names = (_TOOL_TEMPLATE, DEFAULT_TEMPLATE) if has_tools else (DEFAULT_TEMPLATE,)
        for chosen in names:
            if chosen in self._templates:
                return self._templates[chosen]
        raise TemplateError("the model has no chat template")

    async def render(self, conversation: Conversation) -> str:
        """The prompt for a conversation; a last message from the assistant is left open to be continued.

        Raises TemplateError, and ValidationError for what the model's template has no use for.
        """
        work = partial(self.render_now, conversation)
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def render_now(self, conversation: Conversation) -> str:
        """`render` in the calling thread."""
        template = self.choose(conversation.template, bool(conversation.tools))
        if template.compiled is None:
            raise TemplateError(template.reason)
        _check_use(template, conversation)
        shown = template_messages(conversation, template.takes_tool_calls, template.takes_tools)
        content = shown[-1].get("content") if shown[-1]["role"] == "assistant" else None
        if not isinstance(content, str):
            return self._render(template.compiled, conversation, shown, add_generation_prompt=True)
        # No message can hold the marker, so where it comes out the last content ends.
        marker = secrets.token_hex(16)
        shown[-1] = shown[-1] | {"content": f"{content}{marker} "}
        rendered = self._render(template.compiled, conversation, shown, add_generation_prompt=False)
        before, found, after = rendered.rpartition(marker)
        if not found:
            raise TemplateError("the template drops the last message, so it cannot be continued")
        # A template that trims the content took the space after the marker: trim what it would have trimmed.
        return before if after.startswith(" ") else before.rstrip()

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _render(
        self,
        template: jinja2.Template,
        conversation: Conversation,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool,
    ) -> str:
        variables = conversation.switches | self._special_tokens
        variables |= {
            "messages": messages,
            "add_generation_prompt": add_generation_prompt,
            "tools": conversation.tools or None,
            "documents": conversation.documents or None,
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


def _check_use(template: ModelTemplate, conversation: Conversation) -> None:
    """Refuse what the template would leave out without a word."""
    for name in conversation.switches:
        if name not in template.switches:
            known = ", ".join(sorted(template.switches)) or "none"
            where = "reasoning_effort" if name == "reasoning_effort" else f"chat_template_kwargs.{name}"
            reason = f"`{where}` is no switch of this model's chat template; it has: {known}"
            raise ValidationError(reason, param=where)
    if conversation.documents and "documents" not in template.variables:
        raise ValidationError("`documents` have no place in this model's chat template", param="documents")


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
