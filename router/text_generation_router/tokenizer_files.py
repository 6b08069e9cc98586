"""The text side of a model folder: what tokenizer.json and the files beside it say."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DEFAULT_TEMPLATE = "default"


class BrokenTokenizer(ValueError):
    """A file of the model is missing or not usable; the text says which and why."""


@dataclass(frozen=True)
class TokenizerFiles:
    """Their contents; {} for a file that the model does not have."""

    tokenizer_config: dict[str, Any]
    generation_config: dict[str, Any]
    config: dict[str, Any]
    # The model's chat templates by name; most models have one, "default".
    chat_templates: dict[str, str]

    @classmethod
    def read(cls, folder: str | Path) -> "TokenizerFiles":
        """Read all but tokenizer.json, which is large; raises BrokenTokenizer."""
        folder = Path(folder)
        tokenizer_config = read_json(folder / "tokenizer_config.json")
        return cls(
            tokenizer_config=tokenizer_config,
            generation_config=read_json(folder / "generation_config.json"),
            config=read_json(folder / "config.json"),
            chat_templates=_chat_templates(folder, tokenizer_config),
        )

    def special_token(self, name: str) -> str | None:
        """A token that tokenizer_config.json names, such as `bos_token`."""
        value = self.tokenizer_config.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        return value if isinstance(value, str) else None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} if there is no such file."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise BrokenTokenizer(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise BrokenTokenizer(f"{path} does not hold a JSON object")
    return value


def _chat_templates(folder: Path, tokenizer_config: dict[str, Any]) -> dict[str, str]:
    """The templates from the first place that has some, and those of the folder for additional ones."""
    additional = {path.stem: _read_text(path) for path in sorted(folder.glob("additional_chat_templates/*.jinja"))}
    path = folder / "chat_template.jinja"
    if path.exists():
        return additional | {DEFAULT_TEMPLATE: _read_text(path)}
    for values in (
        read_json(folder / "chat_template.json"),
        tokenizer_config,
        read_json(folder / "processor_config.json"),
    ):
        if named := _named_templates(values.get("chat_template")):
            return additional | named
    return additional


def _named_templates(value: Any) -> dict[str, str]:
    """One template, or a list of templates with names."""
    entries = value if isinstance(value, list) else [{"name": DEFAULT_TEMPLATE, "template": value}]
    pairs = [(entry.get("name"), entry.get("template")) for entry in entries if isinstance(entry, dict)]
    return {name: source for name, source in pairs if isinstance(name, str) and isinstance(source, str) and source}


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise BrokenTokenizer(f"{path} cannot be read: {error}") from error
