"""The rows of both benchmarks, and how the load client is run for one of them."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CLIENT = (sys.executable, "-m", "text_generation_launcher.benchmark")


@dataclass(frozen=True)
class Row:
    """One load: the first `num_requests` of a set (None: all), at a concurrency, at a rate, or all at once."""

    name: str
    request_set: str
    num_requests: int | None = None
    concurrency: int | None = None
    rate: float | None = None


ROUTER_ROWS = (
    Row("chat-c1", "chat", 12, concurrency=1),
    Row("chat-c32", "chat", 400, concurrency=32),
    Row("chat-rate24", "chat", 600, rate=24),
    Row("chat-all", "chat"),
    Row("uniform-all", "uniform"),
    Row("summarize-c16", "summarize", concurrency=16),
    Row("sharedprefix-c32", "sharedprefix", concurrency=32),
)
GPU_ROWS = (
    Row("warm-up", "chat", 40, concurrency=4),
    Row("chat-c1", "chat", 12, concurrency=1),
    Row("chat-c4", "chat", 48, concurrency=4),
    Row("chat-c32", "chat", 400, concurrency=32),
    Row("chat-rate8", "chat", 240, rate=8),
    Row("chat-rate24", "chat", 600, rate=24),
    Row("chat-all", "chat"),
    Row("uniform-all", "uniform"),
    Row("summarize-c16", "summarize", concurrency=16),
    Row("sharedprefix-c32", "sharedprefix", concurrency=32),
)
CPU_ROWS = (
    Row("chat-c1", "small-chat", 16, concurrency=1),
    Row("chat-c8", "small-chat", 64, concurrency=8),
    Row("chat-c32", "small-chat", concurrency=32),
    Row("longprompt-c1", "small-longprompt", concurrency=1),
    Row("sharedprefix-c8", "small-sharedprefix", concurrency=8),
)


class BenchmarkFailed(Exception):
    """A row that cannot be measured; the text says why."""


def select_rows(rows: tuple[Row, ...], names: list[str]) -> list[Row]:
    """The rows named, in the order of the table; all of them when none is."""
    if unknown := set(names) - {row.name for row in rows}:
        raise BenchmarkFailed(f"no such row: {', '.join(sorted(unknown))}; there are {[row.name for row in rows]}")
    return [row for row in rows if not names or row.name in names]


def write_set(name: str, folder: Path, tokenizer_folder: Path, seed: int) -> Path:
    """Make a request set, unless it is there already."""
    path = folder / f"{name}.jsonl"
    if not path.exists():
        arguments = ["--set", name, "--tokenizer", str(tokenizer_folder), "--seed", str(seed)]
        subprocess.run([*CLIENT, *arguments, "--write-requests", str(path)], check=True)
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def run_client(row: Row, url: str, requests: Path, folder: Path, *more: str) -> tuple[dict[str, Any], list[Any]]:
    """Put a row's load on a server: the figures, and the records of its requests."""
    figures, records = folder / "figures.jsonl", folder / "records.jsonl"
    for path in (figures, records):
        path.unlink(missing_ok=True)
    command = [*CLIENT, "--url", url, "--name", row.name, "--requests", str(requests)]
    command += ["--json", str(figures), "--records", str(records), *more]
    for flag, value in (("-n", row.num_requests), ("--concurrency", row.concurrency), ("--rate", row.rate)):
        command += [] if value is None else [flag, str(value)]
    ended = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
    if ended.returncode:
        raise BenchmarkFailed(f"{row.name}: the client ended with {ended.returncode}")
    return read_lines(figures)[0], read_lines(records)


def demo_tokenizer_folder(folder: Path) -> Path:
    """A folder with the embedded demo model's tokenizer, written below `folder`."""
    command = [sys.executable, "-m", "text_generation_shard.model_files", "--run-folder", str(folder)]
    answer = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    return Path(answer["model_folder"])
