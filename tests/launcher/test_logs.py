"""Levels, shapes and the children's lines."""

import io
import json
import logging

import pytest
from text_generation_launcher.logs import LogWriter, RecordHandler, level_name

CHILD_RECORD = {"timestamp": "2030-01-01T00:00:00Z", "level": "WARN", "message": "careful", "target": "a.b", "rank": 2}


@pytest.mark.parametrize(
    ("log_filter", "level"),
    [
        ("", "info"),
        ("debug", "debug"),
        ("WARN", "warn"),
        ("warning", "warn"),
        ("trace", "debug"),
        ("info,text_generation_router=debug", "info"),
        ("text_generation_router=debug,info", "debug"),
        ("off", "error"),
        ("nonsense", "info"),
    ],
)
def test_level_of_a_filter(log_filter: str, level: str) -> None:
    assert level_name(log_filter) == level


def test_a_childs_record_keeps_level_time_and_further_keys() -> None:
    stream = io.StringIO()
    lines = LogWriter(json_output=True, stream=stream).write_child_line("shard-0", json.dumps(CHILD_RECORD))
    expected = {**CHILD_RECORD, "target": "shard-0: a.b", "fields": {"message": "careful"}}
    assert json.loads(stream.getvalue()) == expected
    assert lines == ["careful"]


@pytest.mark.parametrize(
    "line", ["plain words", '{"broken', '{"level": "INFO"}', '["list"]', '{"level": "?", "message": ""}', "{" * 9999]
)
def test_other_lines_are_wrapped(line: str) -> None:
    stream = io.StringIO()
    LogWriter(json_output=True, stream=stream).write_child_line("router", line)
    record = json.loads(stream.getvalue())
    assert (record["message"], record["fields"]["message"]) == (line, line)
    assert (record["level"], record["target"]) == ("INFO", "router")


def test_plain_lines_escape_control_characters() -> None:
    stream = io.StringIO()
    LogWriter(stream=stream).write_child_line("router", "red \x1b[31m text\rover")
    assert stream.getvalue().endswith(" INFO router: red \\x1b[31m text\\x0dover\n")


@pytest.mark.parametrize(("level", "shown"), [("debug", "DIWE"), ("info", "IWE"), ("warn", "WE"), ("error", "E")])
def test_level_filters_own_and_childrens_records(level: str, shown: str) -> None:
    stream = io.StringIO()
    writer = LogWriter(level, json_output=True, stream=stream)
    logger = logging.Logger("own")
    logger.addHandler(RecordHandler(writer))
    for name in ("debug", "info", "warning", "error"):
        getattr(logger, name)("words %d", 1)
        writer.write_child_line("shard-1", json.dumps({**CHILD_RECORD, "level": name.upper()}))
    records = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [record["level"][0] for record in records if record["target"] == "own"] == list(shown)
    assert [record["level"][0] for record in records if record["target"] != "own"] == list(shown)


def test_a_traceback_is_part_of_the_message() -> None:
    stream = io.StringIO()
    logger = logging.Logger("own")
    logger.addHandler(RecordHandler(LogWriter(json_output=True, stream=stream)))
    try:
        raise KeyError("lost")
    except KeyError:
        logger.exception("failed")
    (line,) = stream.getvalue().splitlines()
    message = json.loads(line)["message"]
    assert message.startswith("failed\nTraceback")
    assert message.endswith("KeyError: 'lost'")


def test_a_log_that_nobody_reads_stops_nothing() -> None:
    stream = io.StringIO()
    stream.close()
    assert LogWriter(stream=stream).write_child_line("router", "words") == ["words"]
