"""The messages of a chat request: the one place where they are checked, content parts joined."""

from typing import Any

from text_generation_router.api.fields import Fields
from text_generation_router.errors import ValidationError

_TEXT_FIELDS = ("name", "tool_call_id")


def read_messages(body: Fields) -> list[dict[str, Any]]:
    """Read `messages`; never empty. Keys that are null or missing are left out."""
    items = body.items("messages")
    if not items:
        raise body.error("messages", "must be a list of at least one message")
    return [_read_message(body.child("messages", item)) for item in items]


def _read_message(item: Fields) -> dict[str, Any]:
    message: dict[str, Any] = {"role": item.required_string("role")}
    content = _read_content(item)
    tool_calls = item.items("tool_calls")
    if content is None and not tool_calls:
        raise item.error("content", "is missing")
    if content is not None:
        message["content"] = content
    if tool_calls:
        message["tool_calls"] = [_read_tool_call(item.child("tool_calls", call)) for call in tool_calls]
    for name in _TEXT_FIELDS:
        if (text := item.string(name)) is not None:
            message[name] = text
    return message


def _read_content(item: Fields) -> str | None:
    content = item.value("content")
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise item.error("content", "must be a string or a list of parts")
    return "".join(_read_part(item.child("content", part)) for part in content)


def _read_part(part: Fields) -> str:
    kind = part.required_string("type")
    if kind != "text":
        # Text is never scanned for links, and nothing is ever fetched.
        raise ValidationError("`content` parts other than text are not supported by this model", param="messages")
    return part.required_string("text")


def _read_tool_call(call: Fields) -> dict[str, Any]:
    function = call.object("function")
    if function is None:
        raise call.error("function", "is missing")
    arguments = function.value("arguments")
    if arguments is not None and not isinstance(arguments, (str, dict)):
        raise function.error("arguments", "must be JSON text or an object")
    called = {"name": function.required_string("name"), "arguments": arguments}
    return {"id": call.string("id"), "type": call.string("type") or "function", "function": called}
