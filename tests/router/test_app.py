"""The server around the routes: keys, CORS, limits, clients that leave, draining, ports, logs, the command line."""

import asyncio
import io
import json
import logging
import os
import signal
import socket
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import aiohttp
import pytest
from text_generation_router.app import bind, write_ports
from text_generation_router.command_line import InvalidConfig, parse_config
from text_generation_router.logs import JsonFormatter, PlainFormatter

GENERATE = {"inputs": "abc"}


async def until(condition):
    """Wait until `condition()` holds; the test's own time limit ends a wait in vain."""
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.005)


def test_service_routes(serving):
    async def run():
        async with serving(served_model_name="short", docker_label="tag") as served:
            for path in ("/", "/health", "/ping"):
                async with served.client.get(path) as response:
                    assert response.status == 200
                    assert await response.read() == b""
            async with served.client.get("/v1/models") as response:
                model = {"id": "short", "object": "model", "created": 0, "owned_by": "short"}
                assert await response.json() == {"object": "list", "data": [model]}
            async with served.client.get("/info") as response:
                assert await response.json() == {
                    "model_id": "short",
                    "model_sha": None,
                    "model_pipeline_tag": None,
                    "max_concurrent_requests": 128,
                    "max_best_of": 2,
                    "max_stop_sequences": 4,
                    "max_input_tokens": 64,
                    "max_total_tokens": 100,
                    "validation_workers": 2,
                    "max_client_batch_size": 4,
                    "router": "text-generation-router",
                    "version": "4.0.0",
                    "sha": None,
                    "docker_label": "tag",
                }
            served.engine.healthy = False
            for path in ("/", "/health", "/ping"):
                async with served.client.get(path) as response:
                    assert response.status == 503
                    assert await response.json() == {"error": "unhealthy", "error_type": "healthcheck"}

    asyncio.run(run())


def test_metrics_on_both_ports(serving):
    async def run():
        async with serving(api_key="k") as served:
            for url in (f"{served.url}/metrics", f"{served.metrics_url}/metrics"):
                headers = {"Accept": "application/openmetrics-text; version=1.0.0"}
                async with served.client.get(url, headers=headers) as response:
                    assert response.status == 200
                    assert response.headers["Content-Type"].startswith("text/plain; version=0.0.4")
                    assert "tgi_request_count 0" in (await response.text()).splitlines()
            async with served.client.post(f"{served.metrics_url}/generate", json=GENERATE) as response:
                assert response.status == 404

    asyncio.run(run())


OPEN = ["/", "/health", "/ping", "/info", "/metrics", "/v1/models"]
CLOSED = [
    ("POST", "/"),
    ("POST", "/generate"),
    ("POST", "/generate_stream"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("GET", "/generate"),
    ("GET", "/nowhere"),
    ("GET", "/health/"),
    ("GET", "//health"),
    ("POST", "/health"),
    ("DELETE", "/v1/models"),
    ("OPTIONS", "/generate"),
]


def test_api_key(serving):
    async def run():
        async with serving(api_key="Säcret") as served:
            for path in OPEN:
                for method in ("GET", "HEAD"):
                    async with served.client.request(method, path) as response:
                        assert response.status == 200, path
            for method, path in CLOSED:
                async with served.client.request(method, served.url + path, json=GENERATE) as response:
                    assert response.status == 401, path
                    assert await response.read() == b""
            for header, status in (
                ("Bearer Säcret", 200),
                ("bearer Säcret", 200),
                ("Bearer säcret", 401),
                ("Bearer Säcret ", 200),  # HTTP itself strips white space around a value
                ("Bearer Säcre", 401),
                ("Bearer", 401),
                ("Basic Säcret", 401),
                ("Säcret", 401),
                ("", 401),
            ):
                headers = {"Authorization": header}
                async with served.client.post("/generate", json=GENERATE, headers=headers) as response:
                    assert response.status == status, header
            headers = {"Authorization": "Bearer Säcret"}
            async with served.client.get("/nowhere", headers=headers) as response:
                assert response.status == 404
                assert (await response.json())["error_type"] == "not_found"
            async with served.client.get("/v1/completions", headers=headers) as response:
                assert response.status == 405
                assert response.headers["Allow"] == "POST"
                assert (await response.json())["error"]["type"] == "method_not_allowed"

    asyncio.run(run())


def test_cors(serving):
    preflight = {"Origin": "http://a", "Access-Control-Request-Method": "POST"}

    async def run():
        async with serving(api_key="k") as served:
            async with served.client.options("/generate", headers=preflight) as response:
                assert response.status == 200
                assert response.headers["Access-Control-Allow-Origin"] == "*"
                assert response.headers["Access-Control-Allow-Methods"] == "GET,POST"
                assert response.headers["Access-Control-Allow-Headers"] == "content-type"
            async with served.client.post("/generate", json=GENERATE) as response:
                assert response.status == 401
                assert response.headers["Access-Control-Allow-Origin"] == "*"
        async with serving(cors_allow_origin=("http://a", "http://b")) as served:
            for origin, allowed in (("http://a", "http://a"), ("http://b", "http://b"), ("http://c", None)):
                headers = {"Origin": origin}
                async with served.client.post("/generate_stream", json=GENERATE, headers=headers) as response:
                    assert response.headers.get("Access-Control-Allow-Origin") == allowed
                    assert response.headers["Vary"] == "Origin"
                    await response.read()

    asyncio.run(run())


def test_overload(serving, make_engine):
    async def run():
        async with serving(make_engine(is_hanging=True), max_concurrent_requests=2) as served:
            running = await served.client.post("/generate_stream", json=GENERATE)
            for path, body in (
                ("/v1/completions", {"prompt": ["a", "b"]}),
                ("/v1/completions", {"prompt": ["a", "b"], "stream": True}),
            ):
                async with served.client.post(path, json=body) as response:
                    assert response.status == 429
                    assert int(response.headers["Retry-After"]) >= 1
                    answer = await response.json()
                    assert answer["error_type"] == "overloaded"
                    assert answer["error"]["message"] == "Model is overloaded"
            second = await served.client.post("/generate_stream", json=GENERATE)
            for path in ("/generate", "/generate_stream", "/"):
                async with served.client.post(path, json=GENERATE) as response:
                    assert response.status == 429
                    assert await response.json() == {"error": "Model is overloaded", "error_type": "overloaded"}
            running.close()
            await until(lambda: served.context.permits.num_taken == 1)
            served.engine.is_hanging = False
            async with served.client.post("/generate", json=GENERATE) as response:
                assert response.status == 200
            second.close()
            await until(lambda: served.context.permits.num_taken == 0)
            counts = served.counts()
            assert counts["tgi_request_count"] == 2 + 2 + 2 + 3 + 1
            assert counts['tgi_request_failure{err="overloaded"}'] == 7
            assert counts['tgi_request_failure{err="dropped"}'] == 2
            assert counts["tgi_request_success"] == 1
            assert counts["tgi_request_running"] == 0

    asyncio.run(run())


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"inputs": "a"}),
        ("/generate_stream", {"inputs": "a"}),
        ("/v1/completions", {"prompt": ["a", "b"]}),
        ("/v1/completions", {"prompt": ["a", "b"], "stream": True}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "stream": True}),
    ],
)
def test_a_client_that_leaves_cancels_its_sequences(serving, make_engine, path, body):
    num_prompts = len(body.get("prompt", "a"))

    async def run():
        async with serving(make_engine(is_hanging=True)) as served:
            async with aiohttp.ClientSession(served.url) as client:
                asked = asyncio.create_task(client.post(path, json=body))
                await until(lambda: len(served.engine.log) == num_prompts)
                asked.cancel()
                answers = await asyncio.gather(asked, return_exceptions=True)
                for answer in answers:
                    if isinstance(answer, aiohttp.ClientResponse):
                        answer.close()
            await until(lambda: len(served.engine.left) == num_prompts)
            await until(lambda: served.context.permits.num_taken == 0)
            counts = served.counts()
            assert counts['tgi_request_failure{err="dropped"}'] == counts["tgi_request_count"] == num_prompts
            assert counts["tgi_request_running"] == 0

    asyncio.run(run())


def test_draining(serving, make_engine):
    async def run():
        async with serving(make_engine(answer="ab", is_hanging=True), graceful_termination_timeout_s=0.3) as served:
            streaming = await served.client.post("/generate_stream", json=GENERATE)
            waiting = asyncio.create_task(served.client.post("/v1/completions", json={"prompt": "a"}))
            await until(lambda: len(served.engine.log) == 2)
            stopping = asyncio.create_task(served.server.stop())
            await until(lambda: served.engine.is_draining)
            async with served.client.get("/health") as response:
                assert response.status == 503
            for path in ("/generate", "/generate_stream"):
                async with served.client.post(path, json=GENERATE) as response:
                    assert response.status == 503
                    assert int(response.headers["Retry-After"]) >= 1
                    assert (await response.json())["error_type"] == "overloaded"
            response = await waiting
            assert response.status == 500
            assert (await response.json())["error_type"] == "incomplete_generation"
            last = (await streaming.read()).decode().removesuffix("\n\n").split("\n\n")[-1]
            assert json.loads(last.removeprefix("data: "))["error_type"] == "incomplete_generation_stream"
            await stopping
            with pytest.raises(aiohttp.ClientConnectorError):
                await served.client.get("/health")
            counts = served.counts()
            assert counts['tgi_request_failure{err="incomplete"}'] == 2
            assert counts["tgi_request_running"] == 0

    asyncio.run(run())


def test_draining_lets_requests_finish(serving, make_engine):
    async def run():
        async with serving(make_engine(answer="x" * 60), graceful_termination_timeout_s=30.0) as served:
            streaming = await served.client.post("/generate_stream", json=GENERATE)
            await served.server.stop()
            events = (await streaming.read()).decode().removesuffix("\n\n").split("\n\n")
            assert json.loads(events[-1].removeprefix("data: "))["generated_text"] == "x" * 60
            assert served.counts()["tgi_request_success"] == 1

    asyncio.run(run())


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


def test_a_busy_port_shows_at_once():
    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(OSError, match="in use"):
        bind("127.0.0.1", other.getsockname()[1])


def test_ports_are_written_whole(tmp_path):
    write_ports(str(tmp_path), 1234, 5678)
    assert json.loads((tmp_path / "router.json").read_text()) == {"port": 1234, "prometheus_port": 5678}
    assert os.listdir(tmp_path) == ["router.json"]
    assert stat.S_ISREG((tmp_path / "router.json").stat().st_mode)


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


def test_command_line():
    values = {"port": 8080, "cors_allow_origin": ["a"], "api_key": None, "graceful_termination_timeout_s": 5}
    config = parse_config(["--config-json", json.dumps(values), "--max-best-of", "3", "--no-prefix-caching"])
    assert config.port == 8080
    assert config.cors_allow_origin == ("a",)
    assert config.graceful_termination_timeout_s == 5.0
    assert config.max_best_of == 3
    assert not config.prefix_caching
    assert parse_config(["-p", "1", "--cors-allow-origin", "a", "--cors-allow-origin", "b"]).cors_allow_origin == (
        "a",
        "b",
    )


@pytest.mark.parametrize("values", ['{"nope": 1}', '{"port": "1"}', '{"port": null}', '{"max_best_of": 0}', "[]", "{"])
def test_bad_configurations_are_refused(values):
    with pytest.raises(InvalidConfig):
        parse_config(["--config-json", values])


SIGNALS = """
import asyncio, sys
from text_generation_router.__main__ import StopSignal

async def run():
    stop = StopSignal()
    print("ready", flush=True)
    await stop.wait()
    print("draining", flush=True)
    await asyncio.sleep(60)

asyncio.run(run())
"""


def test_a_second_signal_ends_at_once():
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": f"{root / 'proto'}:{root / 'router'}"}
    command = [sys.executable, "-c", textwrap.dedent(SIGNALS)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "draining\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 1
