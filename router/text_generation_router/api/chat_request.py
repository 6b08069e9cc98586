"""A chat request: its body, and the prompt that the model's template makes of it."""

from dataclasses import dataclass, replace
from typing import Any

import orjson

from text_generation_router.api.chat_schema import MAX_TEMPLATE_KWARGS
from text_generation_router.api.context import Context, Tokenizer
from text_generation_router.api.fields import Fields
from text_generation_router.api.messages import read_messages
from text_generation_router.api.openai import read_includes_usage, read_model_name, read_options, read_user
from text_generation_router.api.tools import ToolChoice, ToolUse, read_tools
from text_generation_router.chat_output.choose import TOOL_MARKS, forced_parser, tool_parser
from text_generation_router.chat_output.deltas import Parser, PlainText
from text_generation_router.chat_output.reasoning import ReasoningParser
from text_generation_router.conversation import DEFAULT_TOOL_PROMPT, Conversation, readable_messages
from text_generation_router.errors import ToolError, ValidationError
from text_generation_router.generation_options import GenerationOptions
from text_generation_router.grammar import Grammar
from text_generation_router.model_family import THINK_END, THINK_START, ModelFamily, Reasoning
from text_generation_router.tool_grammar import tool_grammar

MAX_SWITCH_CHARACTERS = 1024
# Of the functions that become one grammar: it is put together on the event loop.
MAX_FORCED_TOOLS_BYTES = 64 * 1024


@dataclass(frozen=True)
class ChatCall:
    """One request of this route."""

    conversation: Conversation
    tools: ToolUse
    model: str | None
    options: GenerationOptions
    has_logprobs: bool
    includes_usage: bool


def read_call(body: Fields, family: ModelFamily) -> ChatCall:
    """Read the types of a body; ranges are the validator's."""
    tools = read_tools(body)
    options = read_options(
        body,
        body.boolean("stream"),
        names={"inputs": "messages", "top_n_tokens": "top_logprobs"},
        top_n_tokens=body.integer("top_logprobs"),
        user=read_user(body, "safety_identifier"),
    )
    if tools.shown and options.grammar is not None:
        raise ToolError("`response_format` and `tools` exclude each other", param="response_format")
    has_logprobs = body.boolean("logprobs")
    if options.top_n_tokens and not has_logprobs:
        raise body.error("top_logprobs", "needs `logprobs`")
    body.string("prompt_cache_key")
    forced_call = _forced_call(tools, family)
    if forced_call is not None:
        options = replace(options, grammar=forced_call, names=options.names | {"grammar": "tools"})
    return ChatCall(
        conversation=_read_conversation(body, tools),
        tools=tools,
        model=read_model_name(body),
        options=options,
        has_logprobs=has_logprobs,
        includes_usage=read_includes_usage(body),
    )


def _forced_call(tools: ToolUse, family: ModelFamily) -> Grammar | None:
    """The grammar of an answer that must be a call, or the choice of none; None for any other answer."""
    if not _is_forced(tools, family):
        return None
    if (num_bytes := len(orjson.dumps(tools.shown))) > MAX_FORCED_TOOLS_BYTES:
        raise ToolError(
            f"`tools` of which one must be called may have at most {MAX_FORCED_TOOLS_BYTES} bytes. Given: {num_bytes}",
            param="tools",
        )
    return tool_grammar(tools.shown, may_call_none=tools.choice is ToolChoice.AUTO)


def _is_forced(tools: ToolUse, family: ModelFamily) -> bool:
    """Whether only a grammar makes the model call tools as asked."""
    return bool(tools.shown) and (tools.choice is ToolChoice.REQUIRED or family.tool_format is None)


def _read_conversation(body: Fields, tools: ToolUse) -> Conversation:
    documents = body.items("documents") or []
    if not all(isinstance(document, dict) for document in documents):
        raise body.error("documents", "must be a list of objects")
    return Conversation(
        messages=read_messages(body),
        tools=tools.shown,
        documents=documents,
        switches=_read_switches(body),
        template=body.string("chat_template"),
        tool_prompt=body.string("tool_prompt") or DEFAULT_TOOL_PROMPT,
    )


def _read_switches(body: Fields) -> dict[str, Any]:
    """Variables for the template: plain values alone, so that none can stand for messages or tools."""
    switches = body.mapping("chat_template_kwargs") or {}
    if len(switches) > MAX_TEMPLATE_KWARGS:
        raise body.error("chat_template_kwargs", f"may hold at most {MAX_TEMPLATE_KWARGS} switches")
    for name, value in switches.items():
        if value is not None and not isinstance(value, (bool, int, float, str)):
            raise body.error("chat_template_kwargs", f"must hold true, false, numbers or text, not `{name}`'s value")
        if isinstance(value, str) and len(value) > MAX_SWITCH_CHARACTERS:
            raise body.error("chat_template_kwargs", f"text may have at most {MAX_SWITCH_CHARACTERS} characters")
    effort = body.string("reasoning_effort")
    return dict(switches) if effort is None else {**switches, "reasoning_effort": effort}


async def render_prompt(context: Context, conversation: Conversation) -> str:
    """The prompt, in which only the template's own text may be encoded as special tokens; raises TemplateError."""
    return await context.chat_template.render(plain_conversation(context.tokenizer, conversation))


def plain_conversation(tokenizer: Tokenizer, conversation: Conversation) -> Conversation:
    """The conversation, in which nothing can be encoded as a special token."""
    plain = tokenizer.as_plain_text
    return replace(
        conversation,
        # What a JSON text stands for is marked, not the text: escapes must not hide a special token.
        messages=plain(readable_messages(conversation.messages)),
        tools=plain(conversation.tools),
        documents=plain(conversation.documents),
        switches=plain(conversation.switches),
        tool_prompt=plain(conversation.tool_prompt),
    )


def shown_special_ids(context: Context, call: ChatCall) -> frozenset[int]:
    """Special tokens that the parser of the answer has to see."""
    family = context.chat_template.family
    marks: tuple[str, ...] = (THINK_START, THINK_END) if family.has_reasoning else ()
    if call.tools.shown and family.tool_format is not None and not _is_forced(call.tools, family):
        marks += TOOL_MARKS[family.tool_format]
    return frozenset(context.tokenizer.special_ids(marks)) if marks else frozenset()


def answer_options(context: Context, call: ChatCall, prompt: str) -> GenerationOptions:
    """The options with what follows from the prompt. Raises ValidationError."""
    shown, options = shown_special_ids(context, call), call.options
    if shown:
        options = replace(options, shown_special_ids=shown)
    if options.grammar is not None:
        options = replace(options, grammar=_answer_grammar(context, call, prompt))
    return options


def answer_parser(family: ModelFamily, call: ChatCall, prompt: str) -> Parser | None:
    """The parser of the answer to a prompt; None for one that is content alone."""
    parser: Parser | None = None
    if _is_forced(call.tools, family):
        parser = forced_parser()
    elif call.tools.shown and family.tool_format is not None:
        parser = tool_parser(family.tool_format, call.tools.names, call.tools.is_parallel)
    reasoning = expected_reasoning(family, call.conversation, prompt)
    if reasoning is Reasoning.NONE:
        return parser
    return ReasoningParser(parser or PlainText(), is_begun=reasoning is Reasoning.BEGUN)


def expected_reasoning(family: ModelFamily, conversation: Conversation, prompt: str) -> Reasoning:
    """Whether the answer to a prompt begins with reasoning; one that is being continued may be in the middle of it."""
    if not family.has_reasoning:
        return Reasoning.NONE
    begun = conversation.continued_text
    if begun is not None:
        return Reasoning.BEGUN if begun.rfind(THINK_START) > begun.rfind(THINK_END) else Reasoning.NONE
    return Reasoning.BEGUN if prompt.rstrip().endswith(THINK_START) else Reasoning.POSSIBLE


def _answer_grammar(context: Context, call: ChatCall, prompt: str) -> Grammar | None:
    """The grammar of the answer to a prompt: it holds once the reasoning has ended. Raises ValidationError."""
    grammar = call.options.grammar
    if grammar is None:
        return None
    reasoning = expected_reasoning(context.chat_template.family, call.conversation, prompt)
    if reasoning is not Reasoning.NONE and context.tokenizer.special_ids((THINK_END,)):
        name = call.options.client_name("grammar")
        raise ValidationError(f"`{name}` needs a grammar, and no text marks the end of this model's reasoning", name)
    return replace(grammar, reasoning=reasoning)
