"""The servers under load: the router before a simulated shard, or the whole server on the demo model."""

import contextlib
import json
import os
import re
import signal
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from bench_rows import BenchmarkFailed

FOLDER = Path(__file__).parent
START_TIMEOUT_S = 120.0
_SAMPLING = {"OTEL_TRACES_SAMPLER": "parentbased_traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0.1"}
_READY = re.compile(r"Ready on \S+ port (\d+)")


@dataclass(frozen=True)
class RouterUnderLoad:
    """A router before a simulated shard, both running."""

    url: str
    process: psutil.Popen
    steps: Path  # the simulator's log

    def num_steps(self) -> int:
        """Steps run so far."""
        return self.steps.stat().st_size // (3 * 8)

    def metric(self, name: str) -> float:
        """A counter of the router."""
        with urllib.request.urlopen(f"{self.url}/metrics") as reply:
            for line in reply.read().decode().splitlines():
                if line.startswith(f"{name} "):
                    return float(line.split()[1])
        raise BenchmarkFailed(f"the router has no metric {name}")

    def cpu_s(self) -> float:
        """CPU time of the router so far."""
        times = self.process.cpu_times()
        return float(times.user + times.system)


@contextlib.contextmanager
def start_router(
    config: dict[str, Any], profile: Path | None, is_silent: bool = False, environment: Mapping[str, str] | None = None
) -> Iterator[RouterUnderLoad]:
    """Shard and router, ended with the block.

    `profile` is where profiled_router.py writes, if it should run; `is_silent`: run silent_router.py instead.
    `environment` are variables that the router has beside this process's own.
    """
    with tempfile.TemporaryDirectory(prefix="tg-", dir="/tmp") as name, contextlib.ExitStack() as ends:
        run_folder = Path(name)
        uds_path = str(run_folder / "shard")
        own = {"shard_uds_path": uds_path, "run_folder": name, "port": 0, "prometheus_port": 0, "model_id": "m"}
        module = ["-m", "text_generation_router"]
        if profile is not None:
            module = [str(FOLDER / "profiled_router.py"), str(profile)]
        elif is_silent:
            module = [str(FOLDER / "silent_router.py")]
        shard = [sys.executable, str(FOLDER / "simulated_shard.py"), uds_path, name]
        router = [sys.executable, *module, "--config-json", json.dumps({**config, **own})]
        ends.enter_context(_running(shard, run_folder / "shard.log"))
        process = ends.enter_context(_running(router, run_folder / "router.log", environment))
        ports = run_folder / "router.json"
        _wait_for(ports.exists, process, "the router")
        url = f"http://127.0.0.1:{json.loads(ports.read_text())['port']}"
        yield RouterUnderLoad(url, process, run_folder / "steps.bin")


@contextlib.contextmanager
def start_traced_router(config: dict[str, Any]) -> Iterator[RouterUnderLoad]:
    """Shard, collector and a router that traces a tenth of its requests, ended with the block."""
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        output = Path(name, "port")
        with _running([sys.executable, str(FOLDER / "silent_collector.py")], output) as collector:
            _wait_for(lambda: output.read_text().endswith("\n"), collector, "the collector")
            endpoint = f"http://127.0.0.1:{output.read_text().strip()}"
            with start_router({**config, "otlp_endpoint": endpoint}, None, environment=_SAMPLING) as router:
                yield router


@contextlib.contextmanager
def start_server(*flags: str, log_path: Path | None = None) -> Iterator[str]:
    """The whole server, on the demo model unless flags name another; yields its address once it is healthy.

    `log_path` is where its log is kept.
    """
    # As a module: a source tree that is not installed has no commands.
    command = [sys.executable, "-m", "text_generation_launcher", "--hostname", "127.0.0.1"]
    command += ["--port", "0", "--prometheus-port", "0", *flags]
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        log_path = log_path or Path(name, "log")
        with _running(command, log_path) as process:
            _wait_for(lambda: _READY.search(log_path.read_text(errors="replace")), process, "the server")
            match = _READY.search(log_path.read_text(errors="replace"))
            assert match is not None
            url = f"http://127.0.0.1:{match[1]}"
            _wait_for(lambda: _is_healthy(url), process, "the server")
            yield url


def _is_healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health") as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


@contextlib.contextmanager
def _running(
    command: list[str], log_path: Path, environment: Mapping[str, str] | None = None
) -> Iterator[psutil.Popen]:
    """A process, ended with the block; the end of its log is shown if it does not end well."""
    variables = {**os.environ, **(environment or {})}
    with log_path.open("wb") as log, psutil.Popen(command, stdout=log, stderr=log, env=variables) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()
            if process.wait(timeout=120) not in (0, -signal.SIGTERM):
                sys.stderr.write(log_path.read_text(errors="replace")[-4000:])


def _wait_for(is_true: Callable[[], object], process: psutil.Popen, what: str) -> None:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while not is_true():
        if process.poll() is not None or time.monotonic() > deadline_s:
            raise BenchmarkFailed(f"{what} did not start")
        time.sleep(0.02)
