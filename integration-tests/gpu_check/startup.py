"""Starts the server and notes where the time went: the first start compiles every kernel, later ones find them."""

import argparse
import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench_processes import start_server

_SHARD_PHASE = re.compile(r"Start-up phase (.+?) took ([\d.]+) s")
_LAUNCHER_PHASES = re.compile(r"Start-up took ([\d.]+) s: (.*)")
_PHASE = re.compile(r"(.+?) ([\d.]+) s(?:, |$)")
_MEMORY = re.compile(r"(?:GPU|KV) memory: .*")


def timeline(log: str) -> dict[str, Any]:
    """Phases in seconds and the memory's parts, as the log tells them."""
    found = _LAUNCHER_PHASES.search(log)
    return {
        "launcher_s": {name: float(seconds) for name, seconds in _PHASE.findall(found[2])} if found else {},
        "shard_s": {name: float(seconds) for name, seconds in _SHARD_PHASE.findall(log)},
        "memory": _MEMORY.findall(log),
    }


def measure_start(flags: list[str]) -> dict[str, Any]:
    """One start, from the command to healthy, and the end."""
    with tempfile.TemporaryDirectory() as name:
        log_path = Path(name, "log")
        started_s = time.monotonic()
        with start_server(*flags, log_path=log_path):
            healthy_s = time.monotonic() - started_s
            log = log_path.read_text(errors="replace")
        return {"healthy_s": round(healthy_s, 2), **timeline(log), "log": log.splitlines()}


def server_flags(model: Path, more: list[str]) -> list[str]:
    """A benchmark's server: random weights, and room for all of a row's requests at once."""
    return ["--model-id", str(model), "--load-format", "dummy", "--max-concurrent-requests", "2000", *more]


def main() -> int:
    """0 when each start got as far as healthy."""
    parser = argparse.ArgumentParser(prog="gpu_check.startup", description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--times", type=int, default=2)
    parser.add_argument("flags", nargs="*", help="more flags for the launcher")
    arguments = parser.parse_args()
    figures: dict[str, Any] = {"starts": []}
    with tempfile.TemporaryDirectory(prefix="triton-") as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        for _ in range(arguments.times):
            figures["starts"].append(measure_start(server_flags(arguments.model, arguments.flags)))
            print(f"healthy after {figures['starts'][-1]['healthy_s']} s", flush=True)
            arguments.json.write_text(json.dumps(figures, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
