"""The server around the routes: keys, CORS, limits, clients that leave, draining, ports, logs, the command line."""

import asyncio
import json
import os
import socket
import stat

import aiohttp
import pytest
from text_generation_router.app import bind, write_ports

GENERATE = {"inputs": "abc"}


def test_service_routes(serving):
    async def run():
        async with serving(served_model_name="short", docker_label="tag") as served:
            for path in ("/", "/health", "/ping", "/health/ready"):
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
            for path in ("/", "/health", "/ping", "/health/ready"):
                async with served.client.get(path) as response:
                    assert response.status == 503
                    assert await response.json() == {"error": "unhealthy", "error_type": "healthcheck"}
            async with served.client.get("/health/live") as response:
                assert (response.status, await response.read()) == (200, b"")
            served.engine.alive = False
            async with served.client.get("/health/live") as response:
                assert response.status == 503

    asyncio.run(run())


def test_probes_answer_whatever_else_waits(serving, make_engine, until):
    """All permits taken, no turn left, every prompt waiting to be encoded; probes count nowhere."""

    async def run():
        async with serving(make_engine(is_hanging=True), max_concurrent_requests=2) as served:
            encoding = asyncio.Event()

            async def encode(*arguments, **options):
                await encoding.wait()

            served.context.tokenizer.encode = encode
            asked = [asyncio.create_task(served.client.post("/generate", json=GENERATE)) for _ in range(2)]
            await until(lambda: served.context.permits.num_taken == 2)
            before = served.counts()
            for path in ("/health", "/health/ready", "/health/live"):
                async with served.client.get(path) as response:
                    assert response.status == 200
            assert served.counts() == before
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)

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


OPEN = ["/", "/health", "/health/ready", "/health/live", "/ping", "/info", "/metrics", "/v1/models"]
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


def test_overload(serving, make_engine, until):
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
def test_a_client_that_leaves_cancels_its_sequences(serving, make_engine, path, body, until):
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


def test_a_busy_port_shows_at_once():
    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(OSError, match="in use"):
        bind("127.0.0.1", other.getsockname()[1])


def test_ports_are_written_whole(tmp_path):
    write_ports(str(tmp_path), 1234, 5678)
    assert json.loads((tmp_path / "router.json").read_text()) == {"port": 1234, "prometheus_port": 5678}
    assert os.listdir(tmp_path) == ["router.json"]
    assert stat.S_ISREG((tmp_path / "router.json").stat().st_mode)
