"""The router's own command line: `--config-json` as the launcher writes it, or a flag for each field."""

import argparse
import dataclasses
import json
import types
import typing
from collections.abc import Sequence
from typing import Any

from text_generation_router.config import RouterConfig


class InvalidConfig(Exception):
    """A configuration that names unknown fields or holds values of the wrong type."""


def parse_config(arguments: Sequence[str]) -> RouterConfig:
    """Read the command line; argparse ends the process for unknown flags."""
    parser = argparse.ArgumentParser(prog="text-generation-router", description="HTTP router of one model's shards")
    parser.add_argument("--config-json", help="all fields as one JSON object; flags beside it win")
    for field in dataclasses.fields(RouterConfig):
        _add_flag(parser, field)
    given = {name: value for name, value in vars(parser.parse_args(arguments)).items() if value is not None}
    config_json = given.pop("config_json", "{}")
    return _build(_read_object(config_json) | given)


def _add_flag(parser: argparse.ArgumentParser, field: "dataclasses.Field[Any]") -> None:
    kind = _base_type(field.name)
    options: dict[str, Any] = {"help": field.metadata.get("help", "set by the launcher"), "default": None}
    if kind is bool:
        options["action"] = argparse.BooleanOptionalAction
    elif kind is tuple:
        options["action"] = "append"
    else:
        options["type"] = kind
    names = [f"--{field.name.replace('_', '-')}"]
    if "short" in field.metadata:
        names.insert(0, f"-{field.metadata['short']}")
    parser.add_argument(*names, dest=field.name, **options)


def _base_type(name: str) -> type:
    """A field's type without `| None` and without what a tuple holds."""
    hint = typing.get_type_hints(RouterConfig)[name]
    if isinstance(hint, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not types.NoneType)
    kind: type = typing.get_origin(hint) or hint
    return kind


def _read_object(config_json: str) -> dict[str, Any]:
    try:
        values = json.loads(config_json)
    except ValueError as error:
        raise InvalidConfig(f"--config-json is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise InvalidConfig("--config-json must be an object")
    return values


def _build(values: dict[str, Any]) -> RouterConfig:
    fields = {field.name: field for field in dataclasses.fields(RouterConfig)}
    for name, value in values.items():
        if name not in fields:
            raise InvalidConfig(f"unknown field {name!r}")
        kind = _base_type(name)
        if kind is tuple and isinstance(value, list):
            values[name] = tuple(value)
        elif kind is float and type(value) is int:
            values[name] = float(value)
        elif not (type(value) is kind or (value is None and fields[name].default is None)):
            raise InvalidConfig(f"{name} must be {kind.__name__}, not {value!r}")
        if fields[name].metadata.get("positive") and value is not None and value < 1:
            raise InvalidConfig(f"{name} must be at least 1, not {value}")
    return RouterConfig(**values)
