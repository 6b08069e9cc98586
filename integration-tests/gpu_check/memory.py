"""Shows what memory the server holds after so many requests of mixed size, on a small random model.

Alone: `python integration-tests/gpu_check --parts memory --model FOLDER`, whose tokenizer and kind of model it takes.
"""

import argparse
import json
import math
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from bench_memory import SETTLE_S, private_kib
from bench_processes import start_server
from bench_rows import BenchmarkFailed, Row, run_client

from gpu_check.startup import server_flags

SMALL = {
    "num_hidden_layers": 4, "hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 64,
}  # fmt: skip
NUM_LOOKS = 5
CONCURRENCY = 256
MAX_PROMPT_TOKENS, MAX_OUTPUT_TOKENS = 2000, 64
# What a model of 8 billion parameters has on 80 GB: the router notes every cached block, and the cache of the small
# model's own KV memory would still be filling at the last look.
KV_FLAGS = ["--max-batch-total-tokens", "500000"]
PARTS = ("text_generation_launcher", "text_generation_router", "text_generation_shard")


def write_small_model(model: Path, folder: Path) -> None:
    """The same model with fewer and thinner layers."""
    for path in model.glob("*.json"):
        shutil.copy(path, folder)
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | SMALL))


def write_mixed_requests(path: Path, count: int, vocab_size: int, seed: int) -> None:
    """Lengths spread evenly on a logarithmic scale; no two prompts share a prefix to speak of."""
    numbers = random.Random(seed)
    with path.open("w") as file:
        for _ in range(count):
            num_prompt, num_output = (
                int(math.exp(numbers.uniform(0, math.log(most + 1)))) for most in (MAX_PROMPT_TOKENS, MAX_OUTPUT_TOKENS)
            )
            prompt = [numbers.randrange(vocab_size) for _ in range(num_prompt)]
            file.write(json.dumps({"prompt": prompt, "max_tokens": num_output}) + "\n")


def look(num_requests: int) -> dict[str, Any]:
    """What the server's processes and the GPU hold; memory in KiB, and in MiB on the GPU (null without one)."""
    time.sleep(SETTLE_S)
    figures: dict[str, Any] = {"requests": num_requests, "open_files": 0, "threads": 0}
    for process in psutil.Process().children(recursive=True):
        for name in set(PARTS) & set(process.cmdline()):
            figures[f"{name}_kib"] = figures.get(f"{name}_kib", 0) + private_kib(process.pid)
            figures["open_files"] += process.num_fds()
            figures["threads"] += process.num_threads()
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    used = None
    if shutil.which(query[0]):
        used = sum(map(int, subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()))
    return figures | {"gpu_mib": used}


def looks(model: Path, flags: list[str], num_requests: int, folder: Path) -> Iterator[dict[str, Any]]:
    """What is held after each fifth of the requests."""
    write_small_model(model, folder)
    vocab_size = json.loads((folder / "config.json").read_text())["vocab_size"]
    row, num_each = Row("mixed", "mixed", concurrency=CONCURRENCY), num_requests // NUM_LOOKS
    with start_server(*server_flags(folder, [*KV_FLAGS, *flags])) as url:
        for turn in range(NUM_LOOKS):
            requests = folder / "requests.jsonl"
            write_mixed_requests(requests, num_each, vocab_size, seed=turn)
            answered, _ = run_client(row, url, requests, folder, "--quiet")
            if answered["failed"] or answered["short"]:
                raise BenchmarkFailed(f"{answered['failed']} requests failed, {answered['short']} came up short")
            yield look((turn + 1) * num_each)


def main() -> int:
    """0 when every request was answered in full."""
    parser = argparse.ArgumentParser(prog="gpu_check.memory", description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=50_000, help="default: %(default)s")
    parser.add_argument("flags", nargs="*", help="more flags for the launcher")
    arguments = parser.parse_args()
    figures: dict[str, Any] = {"looks": []}
    with tempfile.TemporaryDirectory(prefix="memory-") as name:
        try:
            for line in looks(arguments.model, arguments.flags, arguments.requests, Path(name)):
                figures["looks"].append(line)
                print(json.dumps(line), flush=True)
                arguments.json.write_text(json.dumps(figures, indent=1))
        except BenchmarkFailed as error:
            print(error)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
