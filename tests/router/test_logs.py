"""Log lines: their two formats, and the line of a request that ended well."""

import asyncio
import io
import json
import logging
import sys

from text_generation_router.logs import JsonFormatter, PlainFormatter


def test_success_line(serving, caplog):
    caplog.set_level(logging.INFO)

    async def run():
        async with serving() as served:
            body = {"inputs": "my secret", "parameters": {"seed": 7, "do_sample": True, "stop": ["hidden"]}}
            async with served.client.post("/generate", json=body) as response:
                assert response.status == 200

    asyncio.run(run())
    assert "Connected" in caplog.messages
    [line] = [message for message in caplog.messages if message.startswith("Success")]
    assert "input_tokens=10 " in line
    assert "generated_tokens=7 " in line
    assert "seed=7 " in line
    assert '"do_sample":true' in line
    assert "secret" not in caplog.text
    assert "hidden" not in caplog.text


def record(message, level=logging.INFO, **more):
    return logging.LogRecord("target", level, "file", 1, message, None, more.get("exc_info"))


def test_log_lines():
    assert PlainFormatter().format(record("hello")) == "INFO target: hello"
    assert PlainFormatter().format(record("a\r\nINFO b: forged\x1b[0m", logging.WARNING)) == (
        "WARN target: a\\x0d\\nINFO b: forged\\x1b[0m"
    )
    try:
        raise ValueError("reason")
    except ValueError:
        failed = record("failed", logging.ERROR, exc_info=sys.exc_info())
    assert PlainFormatter().format(failed).splitlines()[-1] == "ValueError: reason"
    line = JsonFormatter().format(failed)
    assert len(io.StringIO(line).readlines()) == 1
    values = json.loads(line)
    assert set(values) == {"timestamp", "level", "message", "fields", "target"}
    assert values["level"] == "ERROR"
    assert values["message"].startswith("failed\nTraceback")
    assert values["fields"] == {"message": values["message"]}
