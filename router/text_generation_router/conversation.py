"""A request's conversation, as api/messages.py and api/tools.py read it, and the form that chat templates take."""

import json
from dataclasses import dataclass, field
from typing import Any

# Arguments nested deeper stay the text that the client sent.
MAX_ARGUMENTS_DEPTH = 128
DEFAULT_TOOL_PROMPT = (
    "You can call the functions above. If one of them helps, answer with JSON alone that names the function and gives "
    "its arguments."
)


@dataclass(frozen=True)
class Conversation:
    """What a chat template renders; every text in it is a client's, fit to be encoded as plain text."""

    messages: list[dict[str, Any]]  # at least one; keys that are null or missing are left out
    tools: list[dict[str, Any]] = field(default_factory=list)  # as the client wrote them; []: none to be shown
    documents: list[dict[str, Any]] = field(default_factory=list)
    switches: dict[str, Any] = field(default_factory=dict)  # variables of the template that clients may set
    template: str | None = None  # the name of one of the model's templates; None: chosen as transformers does
    tool_prompt: str = DEFAULT_TOOL_PROMPT

    @property
    def continued_text(self) -> str | None:
        """What the assistant has begun to say, where the last message is its own."""
        last = self.messages[-1]
        content = last.get("content")
        return content if last["role"] == "assistant" and isinstance(content, str) else None


def template_messages(conversation: Conversation, takes_tool_calls: bool, takes_tools: bool) -> list[dict[str, Any]]:
    """Copies of the messages for a template.

    Tool calls stay beside the content for a template that takes them, their arguments read from JSON; for another,
    they become the content, as JSON, where there is none. Tools are written into the last message where the template
    does not show them.
    """
    shown = [_template_message(message, takes_tool_calls) for message in conversation.messages]
    if conversation.tools and not takes_tools and isinstance(content := shown[-1].get("content"), str):
        tools = json.dumps(conversation.tools, ensure_ascii=False, separators=(",", ":"))
        shown[-1] = shown[-1] | {"content": f"{content}\n---\n{tools}\n{conversation.tool_prompt}"}
    return shown


def _template_message(message: dict[str, Any], takes_tool_calls: bool) -> dict[str, Any]:
    shown = message.copy()
    tool_calls = shown.pop("tool_calls", None)
    if not tool_calls:
        return shown
    if takes_tool_calls:
        return {"content": None} | shown | {"tool_calls": [_readable_call(call) for call in tool_calls]}
    return shown if shown.get("content") else shown | {"content": json.dumps(tool_calls, ensure_ascii=False)}


def readable_messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Copies whose tool calls have arguments read from JSON: escapes in them are the text that they stand for."""
    return [
        message | {"tool_calls": [_readable_call(call) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for message in messages
    ]


def _readable_call(call: dict[str, Any]) -> dict[str, Any]:
    """A tool call with its arguments as an object, where they are the JSON text of one."""
    function = call["function"]
    arguments = function["arguments"]
    if not isinstance(arguments, str) or arguments.count("{") + arguments.count("[") > MAX_ARGUMENTS_DEPTH:
        return call
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        return call
    return call | {"function": function | {"arguments": value}} if isinstance(value, dict) else call
