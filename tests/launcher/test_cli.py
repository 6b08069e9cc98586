"""The launcher's flags against the list of Text Generation Inference's own (tgi_flags.json)."""

import json
from pathlib import Path
from typing import Any

import pytest
from text_generation_launcher.cli import Flag, Settings, all_flags, parse
from text_generation_launcher.refusals import REFUSED, refusals_of

TGI_FLAGS: list[dict[str, Any]] = json.loads(Path(__file__).with_name("tgi_flags.json").read_text())
FLAGS = {flag.option: flag for flag in all_flags()}
TAKES_VALUE = [row for row in TGI_FLAGS if row["takes_value"]]
SWITCHES = [row for row in TGI_FLAGS if not row["takes_value"]]

# Where ours differs on purpose, and why.
DEFAULT_DIFFERENCES = {
    "--model-id": "unset serves the embedded demo model",
    "--shard-uds-path": "unset is a private folder",
    "--master-port": "unset is a free port",
}
# A value that each flag with a limited form takes; any text serves for the others.
SAMPLES = {str: "some-text", int: "17", float: "0.5"}


def sample(row: dict[str, Any]) -> str:
    """A value other than the default that TGI takes."""
    if row["choices"]:
        return str(row["choices"][-1])
    return SAMPLES[FLAGS[row["flag"]].value_type]


def expected(row: dict[str, Any], text: str) -> Any:
    flag = FLAGS[row["flag"]]
    value = {int: int, float: float, str: str}[flag.value_type](text)
    return (value,) if flag.is_list else value


def given(settings: Settings, row: dict[str, Any]) -> Any:
    return settings.given[row["flag"].removeprefix("--").replace("-", "_")]


def name_of(row: dict[str, Any]) -> str:
    return str(row["flag"])


@pytest.mark.parametrize("row", TAKES_VALUE, ids=name_of)
def test_flag_and_variable_set_the_same_value_and_the_flag_wins(row: dict[str, Any]) -> None:
    text = sample(row)
    assert given(parse([row["flag"], text], {}), row) == expected(row, text)
    assert given(parse([f"{row['flag']}={text}"], {}), row) == expected(row, text)
    assert given(parse([], {row["env"]: text}), row) == expected(row, text)
    other = row["choices"][0] if row["choices"] else {"some-text": "other", "17": "18", "0.5": "0.25"}[text]
    assert given(parse([row["flag"], text], {row["env"]: other}), row) == expected(row, text)


@pytest.mark.parametrize("row", SWITCHES, ids=name_of)
def test_switch_and_its_variable(row: dict[str, Any]) -> None:
    assert given(parse([row["flag"]], {}), row) is True
    if row["env"] is None:
        assert FLAGS[row["flag"]].variable is None
        return
    for text, value in {"true": True, "1": True, "false": False, "0": False, "TRUE": True}.items():
        assert given(parse([], {row["env"]: text}), row) is value


@pytest.mark.parametrize("row", TGI_FLAGS, ids=name_of)
def test_defaults_are_those_of_the_list(row: dict[str, Any]) -> None:
    flag = FLAGS[row["flag"]]
    if row["flag"] in DEFAULT_DIFFERENCES:
        assert flag.default is None
    elif row["default"] is None:
        assert flag.default in (None, False, ())
    else:
        assert flag.default == flag.value_type(row["default"])


@pytest.mark.parametrize("row", [row for row in TGI_FLAGS if row["env"]], ids=name_of)
def test_an_empty_variable_is_unset(row: dict[str, Any]) -> None:
    assert parse([], {row["env"]: " "}).given == {}


def test_short_flags() -> None:
    assert parse(["-p", "80", "-e", "-g", "5"], {}).given == {
        "port": 80,
        "env": True,
        "graceful_termination_timeout": 5,
    }


def test_lists_repeat_as_flags_and_have_commas_as_variable() -> None:
    flags = ["--cors-allow-origin", "https://a.example", "--cors-allow-origin", "https://b.example"]
    origins = ("https://a.example", "https://b.example")
    assert parse(flags, {}).given == {"cors_allow_origin": origins}
    assert parse([], {"CORS_ALLOW_ORIGIN": ",".join(origins)}).given == {"cors_allow_origin": origins}


def test_prefix_caching_can_be_turned_off() -> None:
    assert parse([], {"PREFIX_CACHING": "0"}).given == {"prefix_caching": False}
    assert parse(["--prefix-caching", "false"], {"PREFIX_CACHING": "1"}).given == {"prefix_caching": False}


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["--no-such-flag"], {}, "--no-such-flag"),
        (["--max-best", "3"], {}, "--max-best"),  # no abbreviations
        (["a-model"], {}, "a-model"),
        (["--port"], {}, "expected one argument"),
        (["--port", "x"], {}, "whole number"),
        (["--port", "65536"], {}, "at most 65535"),
        (["--port", "-1"], {}, "at least 0"),
        (["--max-concurrent-requests", "0"], {}, "at least 1"),
        (["--max-concurrent-requests", "1.5"], {}, "whole number"),
        (["--waiting-served-ratio", "nan"], {}, "number"),
        (["--dtype", "float8"], {}, "must be one of"),
        (["--sharded", "yes"], {}, "must be one of"),
        ([], {"PORT": "http"}, "environment variable PORT"),
        ([], {"JSON_OUTPUT": "maybe"}, "environment variable JSON_OUTPUT"),
        ([], {"USAGE_STATS": "all"}, "environment variable USAGE_STATS"),
    ],
)
def test_what_cannot_be_understood_ends_with_code_2(
    arguments: list[str], environment: dict[str, str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ending:
        parse(arguments, environment)
    assert ending.value.code == 2
    assert message in capsys.readouterr().err


def test_help_names_every_flag_and_variable(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ending:
        parse(["--help"], {})
    assert ending.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for row in TGI_FLAGS:
        assert f"{row['flag']} " in text
        assert row["env"] is None or f"[{row['env']}]" in text.replace("- ", "-")
    assert "Nothing is ever sent anywhere" in text


def test_every_flag_is_explained() -> None:
    def is_sentence(flag: Flag) -> bool:
        text = flag.metadata["help"]
        return text[0].isupper() and text.endswith(".")

    assert [flag.option for flag in FLAGS.values() if not is_sentence(flag)] == []


def test_defaults_refuse_nothing() -> None:
    assert refusals_of(parse([], {}).launcher) == []


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_unavailable_features_are_refused_as_flag_and_as_variable(name: str) -> None:
    flag = next(flag for flag in all_flags() if flag.name == name)
    text = SAMPLES.get(flag.value_type, "true")
    arguments = [flag.option] if flag.is_switch else [flag.option, text]
    for settings in (parse(arguments, {}), parse([], {str(flag.variable): text})):
        (message,) = refusals_of(settings.launcher)
        assert message.startswith(flag.option)
        assert "is not available: " in message


@pytest.mark.parametrize("row", TGI_FLAGS, ids=name_of)
def test_values_that_turn_a_feature_off_are_accepted(row: dict[str, Any]) -> None:
    neutral = {"--speculate": "0", "--cuda-graphs": "0", "--cuda-memory-fraction": "1.0"}.get(row["flag"])
    if not row["takes_value"] and row["env"]:
        neutral = "false"
    if neutral is not None:
        assert refusals_of(parse([], {row["env"]: neutral}).launcher) == []


def test_secrets_are_not_shown_in_refusals() -> None:
    (message,) = refusals_of(parse(["--ngrok-authtoken", "hush"], {}).launcher)
    assert "hush" not in message
