"""The tools of a chat request: the functions a model may call, and which of them it must."""

import re
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

from text_generation_router.api.chat_schema import NAMED_CHOICE
from text_generation_router.api.fields import Fields
from text_generation_router.errors import ToolError

_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")


class ToolChoice(Enum):
    """Whether the model has to call a tool."""

    AUTO = auto()
    NONE = auto()
    REQUIRED = auto()  # one of those that are shown


@dataclass(frozen=True)
class ToolUse:
    """The tools that the model is shown: [] when there are none, or none may be called."""

    shown: list[dict[str, Any]] = field(default_factory=list)  # as the client wrote them
    choice: ToolChoice = ToolChoice.NONE
    is_parallel: bool = True

    @property
    def names(self) -> frozenset[str]:
        """The names that may be called."""
        return frozenset(tool["function"]["name"] for tool in self.shown)


def read_tools(body: Fields) -> ToolUse:
    """Read `tools`, `tool_choice` and `parallel_tool_calls`; raises ValidationError and ToolError."""
    tools = [_read_tool(tool) for tool in body.objects("tools")]
    names = [tool["function"]["name"] for tool in tools]
    if len(set(names)) < len(names):
        raise body.error("tools", "must have different names")
    choice, name = _read_choice(body)
    is_parallel = body.boolean("parallel_tool_calls", default=True)
    if name is not None:
        if name not in names:
            raise ToolError(f"Tool with name {name} not found", param="tool_choice")
        return ToolUse([tools[names.index(name)]], choice, is_parallel)
    if choice is ToolChoice.REQUIRED and not tools:
        raise body.error("tool_choice", "is `required`, but there are no `tools`")
    return ToolUse(tools, choice, is_parallel) if tools and choice is not ToolChoice.NONE else ToolUse()


def _read_choice(body: Fields) -> tuple[ToolChoice, str | None]:
    """The choice, and the one tool that must be called, where there is one. A name alone is TGI's short form."""
    choice = body.any("tool_choice")
    if choice is None or choice == "auto":
        return ToolChoice.AUTO, None
    if choice == "none":
        return ToolChoice.NONE, None
    if choice == "required":
        return ToolChoice.REQUIRED, None
    if isinstance(choice, str):
        return ToolChoice.REQUIRED, choice
    if not isinstance(choice, dict):
        raise body.error("tool_choice", "must be auto, none, required or a tool")
    named = body.child("tool_choice", choice, NAMED_CHOICE)
    if named.string("type") not in (None, "function"):
        raise named.error("type", "must be function")
    function = named.object("function")
    if function is None:
        raise named.error("function", "is missing")
    return ToolChoice.REQUIRED, function.required_string("name")


def _read_tool(tool: Fields) -> dict[str, Any]:
    if tool.string("type") not in (None, "function"):
        raise tool.error("type", "must be function")
    function = tool.object("function")
    if function is None:
        raise tool.error("function", "is missing")
    if not _NAME.fullmatch(function.required_string("name")):
        raise function.error("name", "must have 1 to 64 letters, digits, `_`, `.` or `-`")
    function.string("description")
    function.boolean("strict")
    parameters, arguments = function.mapping("parameters"), function.mapping("arguments")
    whole = dict(function.whole())
    if parameters is None and arguments is not None:
        whole = {key: value for key, value in whole.items() if key != "arguments"} | {"parameters": arguments}
    return {**tool.whole(), "type": "function", "function": whole}
