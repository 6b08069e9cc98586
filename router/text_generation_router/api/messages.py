"""The messages of a chat request: the one place where they are checked, content parts joined."""

from typing import Any

from text_generation_router.api.chat_schema import MAX_PARTS, PART
from text_generation_router.api.fields import Fields
from text_generation_router.errors import ValidationError

_TEXT_FIELDS = ("name", "tool_call_id", "reasoning_content")


def read_messages(body: Fields) -> list[dict[str, Any]]:
    """Read `messages`; never empty. Keys that are null or missing are left out."""
    messages = [_read_message(item) for item in body.objects("messages")]
    if not messages:
        raise body.error("messages", "must be a list of at least one message")
    return messages


def _read_message(item: Fields) -> dict[str, Any]:
    message: dict[str, Any] = {"role": item.required_string("role")}
    for name in item.refused():
        raise item.error(name, "is not supported by this server")
    content = _read_content(item)
    tool_calls = [_read_tool_call(call) for call in item.objects("tool_calls")]
    if content is None and not tool_calls:
        raise item.error("content", "is missing")
    if content is not None:
        message["content"] = content
    if tool_calls:
        message["tool_calls"] = tool_calls
    for name in _TEXT_FIELDS:
        if (text := item.string(name)) is not None:
            message[name] = text
    return message


def _read_content(item: Fields) -> str | None:
    content = item.any("content")
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise item.error("content", "must be a string or a list of parts")
    if len(content) > MAX_PARTS:
        raise item.error("content", f"may hold at most {MAX_PARTS} parts. Given: {len(content)}")
    return "".join(_read_part(item.child("content", part, PART)) for part in content)


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
    arguments = function.any("arguments")
    if arguments is not None and not isinstance(arguments, (str, dict)):
        raise function.error("arguments", "must be JSON text or an object")
    called = {"name": function.required_string("name"), "arguments": arguments}
    return {"id": call.string("id"), "type": call.string("type") or "function", "function": called}
