"""Processes that are killed or told to stop while a stream runs: what ends, with what code, and what is left."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from conftest import Server

NUM_TOKENS = 1500
BODY = {"inputs": "Hello", "parameters": {"max_new_tokens": NUM_TOKENS, "ignore_eos": True, "details": True}}
SHARD, ROUTER = "text_generation_shard", "text_generation_router"
# A launcher that is killed takes its children along within 2 s; the rest is for a busy machine.
GONE_WITHIN_S = 5.0


@pytest.fixture
def server(request: pytest.FixtureRequest, launch: Any, tiny_model: Path) -> Iterator[Server]:
    """A server that the test itself ends; of one shard, or as many as the test says, which are not restarted."""
    flags = ("--num-shard", str(getattr(request, "param", 1)), "--max-shard-restarts", "0", "--json-output")
    with launch("--model-id", str(tiny_model), *flags) as server:
        server.wait_ready()
        yield server


@pytest.mark.parametrize(
    ("server", "package", "name"), [(3, SHARD, "shard-"), (3, ROUTER, "router")], indirect=["server"]
)
def test_a_killed_child_ends_everything(server: Server, package: str, name: str) -> None:
    with server.stream("/generate_stream", BODY) as lines:
        next(lines)
        # The package as a word of its own: the router has children that run modules of it.
        child = [process for process in server.children(package) if package in process.cmdline()][-1]
        child.kill()
        assert server.wait_end() == 1
        rest = [line for line in _read_to_end(lines) if line.startswith("data: ")]
    server.assert_nothing_left()
    assert not any('"finish_reason"' in line for line in rest), "a stream that was cut off must not look complete"
    if package == SHARD:
        assert '"error_type":"generation"' in rest[-1]
    last_line = server.log().splitlines()[-1]
    assert '"level": "ERROR"' in last_line
    assert name in last_line
    assert "SIGKILL" in last_line


@pytest.mark.parametrize(("number", "num_shards"), [(signal.SIGKILL, 3), (signal.SIGSTOP, 3)])
def test_a_stream_outlives_its_shards(launch: Any, tiny_model: Path, number: signal.Signals, num_shards: int) -> None:
    body = {**BODY, "parameters": {**BODY["parameters"], "max_new_tokens": 200}}
    with launch("--model-id", str(tiny_model), "--dtype", "float32", "--num-shard", str(num_shards)) as server:
        server.wait_ready()
        expected = server.generate(body["inputs"], **body["parameters"])["details"]["tokens"]
        shards = server.children(SHARD)
        with server.stream("/generate_stream", body) as lines:
            next(lines)
            shards[-1].send_signal(number)
            server.wait_for(lambda: server.get("/health/ready").status == 503, "notice that the shard is lost", 10.0)
            assert server.get("/health/live").status == 200
            events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
        assert [event["token"]["id"] for event in events] == [token["id"] for token in expected][1:]
        assert server.get("/health/ready").status == 200
        assert not any(shard.is_running() for shard in shards)
        if number == signal.SIGSTOP:
            # Stopped in a step, or between two.
            step = r"step \d+ \(\d+ tokens that attend to \d+\)"
            operation = "the forward pass|the choice of tokens|waiting for the device"
            last = rf"(in {step} for .* last operation: ({operation})|idle for [\d.]+ s since {step})"
            line = re.compile(rf"^shard {num_shards - 1}: {last}$", re.MULTILINE)
            server.wait_for(lambda: line.search(server.log()), "what the shard did last in the log", 10.0)
            for rank in range(num_shards - 1):
                stack = rf'^shard-{rank}:\n.*hread 0x\w+ \(most recent call first\):\n  File "'
                assert re.search(stack, server.log(), re.MULTILINE), rank
            assert f"shard-{num_shards - 1}:\nno answer: the process is T (stopped)" in server.log()
        else:
            assert f"shard-{num_shards - 1} was ended by signal SIGKILL" in server.log()
        server.stop()


def test_sigterm_lets_the_running_stream_finish(server: Server) -> None:
    with server.stream("/generate_stream", BODY) as lines:
        next(lines)
        server.signal(signal.SIGTERM)
        server.wait_for(lambda: server.get("/health").status == 503, "refusal of new requests")
        refused = server.post("/generate", BODY)
        assert refused.status == 503
        assert "retry-after" in refused.headers
        events = [line for line in lines if line.startswith("data: ")]
    assert len(events) == NUM_TOKENS - 1
    assert '"finish_reason":"length"' in events[-1]
    assert server.wait_end() == 0
    server.assert_nothing_left()


def test_shards_that_die_for_the_last_time_during_the_drain(server: Server) -> None:
    with server.stream("/generate_stream", BODY) as lines:
        next(lines)
        server.signal(signal.SIGTERM)
        server.wait_for(lambda: server.get("/health").status == 503, "the drain")
        server.children(SHARD)[0].kill()
        rest = [line for line in _read_to_end(lines) if line.startswith("data: ")]
    assert '"error_type":"generation"' in rest[-1]
    assert server.wait_end() == 1
    server.assert_nothing_left()


def test_a_second_sigterm_ends_it_at_once(server: Server) -> None:
    body = {"inputs": "Hello", "parameters": {"max_new_tokens": 8000, "ignore_eos": True}}
    with server.stream("/generate_stream", body) as lines:
        next(lines)
        server.signal(signal.SIGTERM)
        server.wait_for(lambda: server.get("/health").status == 503, "refusal of new requests")
        server.signal(signal.SIGTERM)
        assert server.wait_end(GONE_WITHIN_S) == 0
        assert not any('"finish_reason"' in line for line in _read_to_end(lines))
    server.assert_nothing_left()


def test_the_grace_ends(launch: Any, tiny_model: Path) -> None:
    body = {"inputs": "Hello", "parameters": {"max_new_tokens": 8000, "ignore_eos": True}}
    with launch("--model-id", str(tiny_model), "--graceful-termination-timeout", "1") as server:
        server.wait_ready()
        with server.stream("/generate_stream", body) as lines:
            next(lines)
            server.signal(signal.SIGTERM)
            rest = [line for line in _read_to_end(lines) if line.startswith("data: ")]
        assert '"error_type":"incomplete_generation_stream"' in rest[-1]
        assert server.wait_end() == 0
        server.assert_nothing_left()


@pytest.mark.parametrize("server", [1, 3], indirect=True)
def test_a_killed_launcher_takes_its_children_along(server: Server) -> None:
    with server.stream("/generate_stream", BODY) as lines:
        next(lines)
        server.signal(signal.SIGKILL)
        assert server.wait_end() == -signal.SIGKILL
        server.assert_nothing_left(timeout_s=GONE_WITHIN_S)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_while_starting(launch: Any, number: signal.Signals) -> None:
    with launch() as server:
        server.wait_for(lambda: "Starting shards" in server.log(), "the start of the shards")
        time.sleep(0.5)  # in the middle of the imports, most likely
        server.signal(number)
        assert server.wait_end() == 0, server.log()
        server.assert_nothing_left()


def test_a_model_that_does_not_exist(launch: Any) -> None:
    with launch("--model-id", "/no/such/folder") as server:
        assert server.wait_end() == 1
        assert "/no/such/folder" in server.log().splitlines()[-1]
        server.assert_nothing_left()


def _read_to_end(lines: Iterator[str]) -> list[str]:
    """What still comes; the connection may be cut."""
    rest: list[str] = []
    with contextlib.suppress(OSError, http.client.HTTPException):
        for line in lines:
            rest.append(line)
    return rest
