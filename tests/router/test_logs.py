"""Log lines: their two formats, and the line of a request that ended well."""

import asyncio
import io
import json
import logging
import sys

from text_generation_router.errors import GenerationError
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


def lines_of(caplog):
    """The lines about requests: word and values."""
    return [
        (record.getMessage().partition(" request_id=")[0], record.fields)
        for record in caplog.records
        if hasattr(record, "fields")
    ]


def test_every_end_has_one_line(serving, make_engine, caplog, until):
    caplog.set_level(logging.INFO)

    async def run():
        async with serving(make_engine(), max_concurrent_requests=2) as served:
            engine = served.engine
            async with served.client.post("/generate", json={"inputs": "good"}) as response:
                assert response.status == 200
            async with served.client.post("/generate", json={"inputs": "", "parameters": {"top_p": 2}}) as response:
                assert response.status == 422
            engine.error = GenerationError("the shard says so")
            async with served.client.post("/v1/completions", json={"prompt": ["a", "b"], "stream": True}) as response:
                assert "the shard says so" in await response.text()
            engine.error, engine.is_hanging = None, True
            streams = [await served.client.post("/generate_stream", json={"inputs": "a"}) for _ in range(2)]
            async with served.client.post("/generate", json={"inputs": "one too many"}) as response:
                assert response.status == 429
            for stream in streams:
                stream.close()
            await until(lambda: served.context.permits.num_taken == 0)
            for path in ("/health", "/metrics", "/ping", "/", "/info", "/none"):
                async with served.client.get(path) as response:
                    await response.read()

    asyncio.run(run())
    words = [word for word, _ in lines_of(caplog)]
    assert words == ["Success", "Refused", "Failed", "Refused", "Client left", "Client left"]
    good, invalid, failed, refused, left, _ = (fields for _, fields in lines_of(caplog))
    sizes = ("input_tokens", "cached_tokens", "generated_tokens", "recomputed_tokens")
    assert [good[name] for name in sizes] == [5, 2, 7, 3]
    assert good["finish_reason"] == "eos_token"
    order = ("queue_time_ms", "time_to_first_token_ms", "total_time_ms")
    assert 0 <= good[order[0]] <= good[order[1]] <= good[order[2]]
    assert (invalid["status"], invalid["error_type"], invalid["param"]) == (422, "validation", "top_p")
    assert "reason" not in invalid
    assert (failed["status"], failed["input_tokens"]) == (424, 4)
    assert "the shard says so" in failed["reason"]
    assert (refused["status"], refused["error_type"], refused["reason"]) == (429, "overloaded", "Model is overloaded")
    assert left["generated_tokens"] > 0
    levels = [record.levelname for record in caplog.records if hasattr(record, "fields")]
    assert levels == ["INFO", "INFO", "WARNING", "INFO", "INFO", "INFO"]


def test_prompts_are_logged_when_asked_for(serving, caplog):
    caplog.set_level(logging.INFO)

    async def run():
        async with serving(log_prompts=True) as served:
            async with served.client.post("/generate", json={"inputs": 'two\nlines "and" more'}) as response:
                assert response.status == 200
            async with served.client.post("/v1/completions", json={"prompt": [97, 98]}) as response:
                assert response.status == 200

    asyncio.run(run())
    prompts = [fields["prompt"] for word, fields in lines_of(caplog) if word == "Prompt"]
    assert prompts == ['two\nlines "and" more', [97, 98]]
    assert r'prompt="two\nlines \"and\" more"' in caplog.text


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


def test_the_values_of_a_line_are_fields_of_its_json():
    line = record("Success a=1")
    line.fields = {"a": 1, "parameters": {"seed": 2}}
    assert json.loads(JsonFormatter().format(line))["fields"] == {"message": "Success a=1", **line.fields}
