"""The router's command line, and the signals that end it."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from text_generation_router.command_line import InvalidConfig, parse_config


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
        assert process.wait(20) == 0
