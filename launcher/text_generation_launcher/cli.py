"""The user's flags, made from the config dataclasses of the three kinds of process.

Each field that is not internal is a flag, and has an environment variable (the flag in capitals with `_` for
`-`). A flag wins over its variable; an empty variable counts as unset.
"""

import argparse
import math
import types
from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, fields
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

from text_generation_router.config import RouterConfig
from text_generation_shard.config import ShardConfig

from text_generation_launcher.config import LauncherConfig
from text_generation_launcher.refusals import REFUSED

_TITLES: dict[type, str] = {
    LauncherConfig: "model, processes and logs",
    RouterConfig: "requests and HTTP",
    ShardConfig: "computation",
}
_REFUSED_TITLE = "known from Text Generation Inference, refused at start"
_TRUE, _FALSE = ("true", "1"), ("false", "0")


@dataclass(frozen=True)
class Flag:
    """One field of a config dataclass, as a flag."""

    owner: type
    name: str
    value_type: Any  # bool, int, float or str
    is_list: bool
    default: Any
    metadata: Mapping[str, Any]

    @property
    def option(self) -> str:
        """The long flag."""
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str | None:
        """The environment variable, if the flag has one."""
        name: str | None = self.metadata.get("env", self.name.upper())
        return name

    @property
    def is_switch(self) -> bool:
        """Whether the flag takes no value."""
        return self.value_type is bool and not self.default

    def convert(self, text: str) -> Any:
        """The value that `text` stands for, or ValueError with the reason."""
        if self.value_type is bool:
            return _boolean(text)
        if self.value_type is int:
            value = _integer(text)
            self._check_range(value)
            return value
        if self.value_type is float:
            number = float(text)
            if not math.isfinite(number) or number < 0:
                raise ValueError("must be a number of at least 0")
            return number
        choices = self.metadata.get("choices")
        if choices and text not in choices:
            raise ValueError(f"must be one of {', '.join(choices)}")
        return text

    def _check_range(self, value: int) -> None:
        lowest = 1 if self.metadata.get("positive") else 0
        highest = self.metadata.get("max", 65535 if self.name.endswith("port") else None)
        if value < lowest:
            raise ValueError(f"must be at least {lowest}")
        if highest is not None and value > highest:
            raise ValueError(f"must be at most {highest}")


@dataclass(frozen=True)
class Settings:
    """What the user asked for: the values given, by field name, and where each came from."""

    launcher: LauncherConfig
    given: Mapping[str, Any]
    from_environment: frozenset[str]

    def values_for(self, config_type: type) -> dict[str, Any]:
        """The given values of one config dataclass's fields."""
        names = {flag.name for flag in all_flags() if flag.owner is config_type}
        return {name: value for name, value in self.given.items() if name in names}


def all_flags() -> list[Flag]:
    """Every flag, in the order of declaration."""
    flags = [_flag(owner, item) for owner in _TITLES for item in fields(owner) if _is_flag(item)]
    assert len({flag.name for flag in flags}) == len(flags), "two configs declare one flag"
    return flags


def parse(arguments: Sequence[str], environment: Mapping[str, str]) -> Settings:
    """Read flags and variables; ends the process with code 2 when they cannot be understood."""
    flags = all_flags()
    parser = _parser(flags)
    given = vars(parser.parse_args(arguments))
    from_environment = set()
    for flag in flags:
        text = environment.get(flag.variable, "").strip() if flag.variable else ""
        if not text or flag.name in given:
            continue
        try:
            given[flag.name] = _from_variable(flag, text)
        except ValueError as error:
            parser.error(f"environment variable {flag.variable}: {error}")
        from_environment.add(flag.name)
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    own = {flag.name for flag in flags if flag.owner is LauncherConfig}
    launcher = LauncherConfig(**{name: value for name, value in given.items() if name in own})
    return Settings(launcher, given, frozenset(from_environment))


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are two lines, not the usage of all flags."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\nSee {self.prog} --help for all flags.\n")


def _parser(flags: list[Flag]) -> argparse.ArgumentParser:
    parser = _Parser(
        prog="text-generation-launcher",
        usage="%(prog)s [--model-id MODEL_ID] [FLAGS]",
        description="Starts the server: its shards and its router. Each flag may also be given as the environment "
        "variable named in brackets; the flag wins. LOG_LEVEL sets the log level: error, warn, info or debug.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    groups = {title: parser.add_argument_group(title) for title in (*_TITLES.values(), _REFUSED_TITLE)}
    for flag in flags:
        title = _REFUSED_TITLE if flag.name in REFUSED else _TITLES[flag.owner]
        _add(groups[title], flag)
    return parser


def _add(group: Any, flag: Flag) -> None:
    names = [f"-{flag.metadata['short']}"] if "short" in flag.metadata else []
    names.append(flag.option)
    options: dict[str, Any] = {"dest": flag.name, "help": _help(flag).replace("%", "%%")}
    if flag.is_switch:
        group.add_argument(*names, action="store_true", **options)
        return
    choices = _TRUE[:1] + _FALSE[:1] if flag.value_type is bool else flag.metadata.get("choices")
    options["metavar"] = "{" + ",".join(choices) + "}" if choices else flag.name.upper()
    group.add_argument(*names, type=_reader(flag), action="append" if flag.is_list else "store", **options)


def _help(flag: Flag) -> str:
    parts = [flag.metadata["help"]]
    if flag.default not in (None, ()) and not flag.is_switch:
        shown = str(flag.default).lower() if flag.value_type is bool else flag.default
        parts.append(f"Default: {shown}.")
    if flag.variable:
        parts.append(f"[{flag.variable}]")
    return " ".join(parts)


def _reader(flag: Flag) -> Any:
    def read(text: str) -> Any:
        try:
            return flag.convert(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None

    return read


def _from_variable(flag: Flag, text: str) -> Any:
    if flag.is_list:
        return tuple(flag.convert(part.strip()) for part in text.split(",") if part.strip())
    try:
        return flag.convert(text)
    except ValueError as error:
        raise ValueError(f"{text!r}: {error}") from None


def _is_flag(item: "Field[Any]") -> bool:
    return not item.metadata.get("internal") and "help" in item.metadata


def _flag(owner: type, item: "Field[Any]") -> Flag:
    hint = get_type_hints(owner)[item.name]
    if get_origin(hint) in (Union, types.UnionType):
        (hint,) = (part for part in get_args(hint) if part is not type(None))
    is_list = get_origin(hint) is tuple
    return Flag(owner, item.name, get_args(hint)[0] if is_list else hint, is_list, item.default, item.metadata)


def _boolean(text: str) -> bool:
    if text.lower() in _TRUE:
        return True
    if text.lower() in _FALSE:
        return False
    raise ValueError("must be true or false")


def _integer(text: str) -> int:
    if not text.isascii() or not text.lstrip("-").isdigit():
        raise ValueError("must be a whole number")
    return int(text)
