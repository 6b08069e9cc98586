"""What a model's chat templates tell about the way in which it writes: its reasoning, and its tool calls."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum, StrEnum

THINK_START, THINK_END = "<think>", "</think>"


class Reasoning(StrEnum):
    """Whether a text begins with `<think>…</think>`."""

    NONE = "none"
    POSSIBLE = "possible"
    BEGUN = "begun"  # by the prompt: its end is still to come


class ToolFormat(Enum):
    """How a family of models writes a tool call."""

    HERMES = "<tool_call> with a JSON object of name and arguments: Hermes, Qwen 2.5 and 3"
    LLAMA3 = "a JSON object of name and parameters: Llama 3.1 and later"
    MISTRAL = "[TOOL_CALLS] with a list of JSON objects, or a name and a JSON object: Mistral"


@dataclass(frozen=True)
class ModelFamily:
    """How a model writes what is no plain text. None: it has no way of its own to call tools."""

    tool_format: ToolFormat | None
    has_reasoning: bool


def detect_family(templates: Iterable[str]) -> ModelFamily:
    """Read it from the marks that the templates write."""
    source = "\n".join(templates)
    return ModelFamily(_tool_format(source), THINK_END in source)


def _tool_format(source: str) -> ToolFormat | None:
    if "[TOOL_CALLS]" in source:
        return ToolFormat.MISTRAL
    if "<tool_call>" in source and "<function=" not in source:
        return ToolFormat.HERMES
    if "<|start_header_id|>" in source and '"parameters"' in source:
        return ToolFormat.LLAMA3
    return None
