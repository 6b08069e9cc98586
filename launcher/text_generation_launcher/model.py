"""The model to serve: asks a short-lived child which files it is made of, since that needs the Hub's library."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from text_generation_launcher.errors import LauncherError, SettingsError
from text_generation_launcher.processes import Child

# What routers read besides tokenizer_config.json, and what carries a template of its own.
_MORE_TEMPLATES = "additional_chat_templates"  # a folder of them
_TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json", _MORE_TEMPLATES)


@dataclass(frozen=True)
class ResolvedModel:
    """What the child `text_generation_shard.model_files` answered."""

    model_id: str
    revision: str | None
    sha: str | None
    model_folder: str
    weight_files: tuple[str, ...]
    config: Mapping[str, Any]


def read_answer(child: Child, answer: bytes) -> ResolvedModel:
    """The resolved model, or the child's reason why there is none."""
    try:
        fields = json.loads(answer.splitlines()[-1])
        if "error" in fields:
            raise LauncherError(str(fields["error"]))
        return ResolvedModel(
            model_id=fields["model_id"],
            revision=fields["revision"],
            sha=fields["sha"],
            model_folder=fields["model_folder"],
            weight_files=tuple(fields["weight_files"]),
            config=fields["config"],
        )
    except (IndexError, KeyError, TypeError, ValueError) as error:
        reason = "\n".join([f"Resolving the model failed: {child.name} {child.ending()}.", *child.last_lines])
        raise LauncherError(reason) from error


def tokenizer_folder(model_folder: Path, tokenizer_config: Path, run_folder: Path) -> Path:
    """A folder of links to the model's files with `tokenizer_config` in place of the model's own.

    A chat template in that file is the one that counts, so separate template files of the model are left out.
    """
    try:
        replaced = json.loads(tokenizer_config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SettingsError(f"--tokenizer-config-path {tokenizer_config} cannot be read: {error}.") from error
    if not isinstance(replaced, dict):
        raise SettingsError(f"--tokenizer-config-path {tokenizer_config} does not hold a JSON object.")
    left_out = {"tokenizer_config.json", *(_TEMPLATE_FILES if replaced.get("chat_template") else ())}
    folder = run_folder / "tokenizer"
    folder.mkdir()
    for entry in model_folder.iterdir():
        if (entry.is_file() or entry.name == _MORE_TEMPLATES) and entry.name not in left_out:
            (folder / entry.name).symlink_to(entry.resolve())
    (folder / "tokenizer_config.json").symlink_to(tokenizer_config.resolve())
    return folder
