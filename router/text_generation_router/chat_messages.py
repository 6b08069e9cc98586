"""A request's chat messages in the form that chat templates take."""

import json
from typing import Any

from text_generation_router.errors import ValidationError


def template_messages(messages: list[dict[str, Any]], takes_tool_calls: bool) -> list[dict[str, Any]]:
    """Copies of `messages` whose content is one text; raises ValidationError for a message without any.

    Content wins over tool calls. Tool calls alone stay as they are for a template that takes them, their arguments
    read from JSON; for another template they become the content, as JSON.
    """
    return [_template_message(message, takes_tool_calls) for message in messages]


def _template_message(message: dict[str, Any], takes_tool_calls: bool) -> dict[str, Any]:
    shown = {name: value for name, value in message.items() if value is not None}
    tool_calls = shown.pop("tool_calls", None)
    content = _text(shown.get("content"))
    if content or not tool_calls:
        if content is None:
            raise ValidationError("`messages` need `content` or `tool_calls`", param="messages")
        return shown | {"content": content}
    if not takes_tool_calls:
        return shown | {"content": json.dumps(tool_calls, ensure_ascii=False)}
    return shown | {"content": content, "tool_calls": [_readable_call(call) for call in tool_calls]}


def _text(content: object) -> str | None:
    """Content as one text: its parts are joined without anything between them."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValidationError("`content` must be a string or a list of parts", param="messages")
    return "".join(_part_text(part) for part in content)


def _part_text(part: object) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(part, dict) or not isinstance(kind, str):
        raise ValidationError("parts of `content` must be objects with a `type`", param="messages")
    if kind != "text":
        raise ValidationError(f"this model reads text, not parts of type {kind[:40]!r}", param="messages")
    if not isinstance(part.get("text"), str):
        raise ValidationError("a text part of `content` needs a string `text`", param="messages")
    return str(part["text"])


def _readable_call(call: Any) -> Any:
    """A tool call with its arguments as an object, where they are the JSON text of one."""
    function = call.get("function") if isinstance(call, dict) else None
    arguments = function.get("arguments") if isinstance(function, dict) else None
    if not isinstance(function, dict) or not isinstance(arguments, str):
        return call
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        return call
    return call | {"function": function | {"arguments": value}} if isinstance(value, dict) else call
