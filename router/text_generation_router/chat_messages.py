"""A request's chat messages, as api/messages.py reads them, in the form that chat templates take."""

import json
from typing import Any


def template_messages(messages: list[dict[str, Any]], takes_tool_calls: bool) -> list[dict[str, Any]]:
    """Copies of `messages`, each with its content or its tool calls.

    Content wins over tool calls. Tool calls alone stay as they are for a template that takes them, their arguments
    read from JSON; for another template they become the content, as JSON.
    """
    return [_template_message(message, takes_tool_calls) for message in messages]


def _template_message(message: dict[str, Any], takes_tool_calls: bool) -> dict[str, Any]:
    shown = message.copy()
    tool_calls = shown.pop("tool_calls", None)
    if shown.get("content") or not tool_calls:
        return shown
    if not takes_tool_calls:
        return shown | {"content": json.dumps(tool_calls, ensure_ascii=False)}
    return {"content": None} | shown | {"tool_calls": [_readable_call(call) for call in tool_calls]}


def _readable_call(call: dict[str, Any]) -> dict[str, Any]:
    """A tool call with its arguments as an object, where they are the JSON text of one."""
    function = call["function"]
    if not isinstance(function["arguments"], str):
        return call
    try:
        value = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        return call
    return call | {"function": function | {"arguments": value}} if isinstance(value, dict) else call
