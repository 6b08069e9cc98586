"""The rows of the request suite on one life of the server, with our load client or with one that is handed in.

A client that is handed in is `load.py` beside a folder `workloads`; its rows are those of the table all the same.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench_processes import start_server
from bench_rows import GPU_ROWS, BenchmarkFailed, Row, read_lines, run_client, write_set

from gpu_check.startup import server_flags

SEED = 1
REHEARSED = (Row("warm-up", "chat", 2, concurrency=2), Row("chat-c1", "chat", 2, concurrency=1))
REHEARSED_SET = "small-chat"

RunRow = Callable[[Row], dict[str, Any]]


def own_client(url: str, model: Path, folder: Path) -> RunRow:
    """Runs a row with our load client, on sets made from the seed with the model's tokenizer."""

    def run(row: Row) -> dict[str, Any]:
        figures, _ = run_client(row, url, write_set(row.request_set, folder, model, SEED), folder, "--quiet")
        return figures

    return run


def client_of(bench: Path, url: str, folder: Path) -> RunRow:
    """Runs a row with the load client in `bench`, on its own workloads."""

    def run(row: Row) -> dict[str, Any]:
        out = folder / "figures.jsonl"
        out.unlink(missing_ok=True)
        command = [sys.executable, str(bench / "load.py"), "--url", url, "--api", "openai", "--out", str(out)]
        command += ["--data", str(bench / "workloads" / f"{row.request_set}.jsonl"), "--name", row.name]
        for flag, value in (("-n", row.num_requests), ("--concurrency", row.concurrency), ("--rate", row.rate)):
            command += [] if value is None else [flag, str(value)]
        ended = subprocess.run(command, check=False)
        if ended.returncode or not out.exists():
            raise BenchmarkFailed(f"{row.name}: the client ended with {ended.returncode}")
        [figures] = read_lines(out)
        return dict(figures)

    return run


def main() -> int:
    """0 when every row was measured and every request brought what it was asked for."""
    parser = argparse.ArgumentParser(prog="gpu_check.suite", description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--bench", type=Path)
    parser.add_argument("--rehearse", action="store_true", help="a few requests")
    parser.add_argument("flags", nargs="*", help="more flags for the launcher")
    arguments = parser.parse_args()
    figures: dict[str, Any] = {"rows": [], "failed": []}
    log_path = arguments.json.with_suffix(".server.log")
    with (
        tempfile.TemporaryDirectory(prefix="suite-") as name,
        start_server(*server_flags(arguments.model, arguments.flags), log_path=log_path) as url,
    ):
        folder = Path(name)
        run = client_of(arguments.bench, url, folder) if arguments.bench else own_client(url, arguments.model, folder)
        for row in REHEARSED if arguments.rehearse else GPU_ROWS:
            if arguments.rehearse and not arguments.bench:
                row = replace(row, request_set=REHEARSED_SET)
            try:
                figures["rows"].append(run(row))
                print(json.dumps(figures["rows"][-1]), flush=True)
            except BenchmarkFailed as error:
                figures["failed"].append(str(error))
                print(error, flush=True)
            arguments.json.write_text(json.dumps(figures, indent=1))
    return 1 if figures["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
