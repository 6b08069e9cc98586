"""Starts the server and notes where the time went.

cold: from safetensors that lie in the page cache, every kernel to be compiled; warm: the same once more; dummy: random
weights, made on the GPU. Alone: `python integration-tests/gpu_check --parts startup --model FOLDER`.
"""

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

from gpu_check.random_checkpoint import write_checkpoint

KINDS = ("cold", "warm", "dummy")

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


def page_in(folder: Path) -> float:
    """Read every weight file once; answers GB/s."""
    started_s, num_bytes, buffer = time.monotonic(), 0, bytearray(1 << 24)
    for path in folder.glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while num_read := file.readinto(buffer):
                num_bytes += num_read
    return num_bytes / 1e9 / (time.monotonic() - started_s)


def measure_start(flags: list[str]) -> dict[str, Any]:
    """One start, from the command to healthy, and the end."""
    with tempfile.TemporaryDirectory() as name:
        log_path = Path(name, "log")
        started_s = time.monotonic()
        with start_server(*flags, log_path=log_path):
            healthy_s = time.monotonic() - started_s
            log = log_path.read_text(errors="replace")
        return {"healthy_s": round(healthy_s, 2), **timeline(log), "log": log.splitlines()}


def server_flags(model: Path, more: list[str], load_format: str = "dummy") -> list[str]:
    """A benchmark's server: random weights, and room for all of a row's requests at once."""
    return ["--model-id", str(model), "--load-format", load_format, "--max-concurrent-requests", "2000", *more]


def measure(arguments: argparse.Namespace, checkpoint: Path) -> None:
    """Write the checkpoint, then start once for each kind; figures are kept as they come."""
    figures: dict[str, Any] = {"starts": []}
    num_bytes = write_checkpoint(arguments.model, checkpoint)
    figures |= {"weights_gb": round(num_bytes / 1e9, 2), "page_cache_gb_s": round(page_in(checkpoint), 2)}
    print(f"{figures['weights_gb']} GB of weights, read once at {figures['page_cache_gb_s']} GB/s", flush=True)
    for kind in arguments.kinds.split(","):
        model, load_format = (arguments.model, "dummy") if kind == "dummy" else (checkpoint, "auto")
        start = measure_start(server_flags(model, arguments.flags, load_format))
        figures["starts"].append({"kind": kind, **start})
        print(f"{kind}: healthy after {start['healthy_s']} s, {start['shard_s']}", flush=True)
        arguments.json.write_text(json.dumps(figures, indent=1))


def main() -> int:
    """0 when each start got as far as healthy."""
    parser = argparse.ArgumentParser(prog="gpu_check.startup", description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--kinds", default=",".join(KINDS), help="in this order; default: %(default)s")
    parser.add_argument("flags", nargs="*", help="more flags for the launcher")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="startup-") as name:
        cache, checkpoint = Path(name, "triton"), Path(name, "model")
        checkpoint.mkdir()
        os.environ["TRITON_CACHE_DIR"] = str(cache)
        measure(arguments, checkpoint)
    return 0


if __name__ == "__main__":
    sys.exit(main())
