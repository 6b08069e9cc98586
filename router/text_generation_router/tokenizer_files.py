"""The text side of a model folder: what tokenizer.json and the files beside it say."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class BrokenTokenizer(ValueError):
    """A file of the model is missing or not usable; the text says which and why."""


@dataclass(frozen=True)
class TokenizerFiles:
    """Their contents; {} or "" for a file that the model does not have."""

    tokenizer_config: dict[str, Any]
    generation_config: dict[str, Any]
    config: dict[str, Any]
    chat_template: str

    @classmethod
    def read(cls, folder: str | Path) -> "TokenizerFiles":
        """Read all but tokenizer.json, which is large; raises BrokenTokenizer."""
        folder = Path(folder)
        tokenizer_config = read_json(folder / "tokenizer_config.json")
        return cls(
            tokenizer_config=tokenizer_config,
            generation_config=read_json(folder / "generation_config.json"),
            config=read_json(folder / "config.json"),
            chat_template=_chat_template(folder, tokenizer_config),
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


def _chat_template(folder: Path, tokenizer_config: dict[str, Any]) -> str:
    """The template from the first place that has one."""
    path = folder / "chat_template.jinja"
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        raise BrokenTokenizer(f"{path} cannot be read: {error}") from error
    for values in (
        read_json(folder / "chat_template.json"),
        tokenizer_config,
        read_json(folder / "processor_config.json"),
    ):
        source = values.get("chat_template")
        if isinstance(source, list):
            named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
            source = named.get("default")
        if isinstance(source, str) and source:
            return source
    return ""
