"""Measures whether the router's memory grows with the tokens it has served, before a simulated shard.

    python integration-tests/bench_memory.py [--tokens 1000000,5000000] [--row chat-all]

Repeats a row's requests; once the named numbers of tokens have been streamed and the router is idle, prints one JSON
line with its private memory (RssAnon and VmSwap), threads and open files. The last line compares the first with the
last.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from bench_processes import RouterUnderLoad, start_router
from bench_router import CONFIG, warm_up
from bench_rows import ROUTER_ROWS, BenchmarkFailed, demo_tokenizer_folder, run_client, select_rows, write_set

SETTLE_S = 5.0  # connections close, and the garbage of the last requests is collected


def private_kib(pid: int) -> int:
    """Memory that the process shares with nobody, in KiB, swapped or not."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    return sum(int(fields[name].split()[0]) for name in ("RssAnon", "VmSwap"))


def look(router: RouterUnderLoad, num_tokens: int) -> dict[str, int]:
    """What the idle router holds."""
    time.sleep(SETTLE_S)
    return {
        "tokens": num_tokens,
        "private_kib": private_kib(router.process.pid),
        "threads": router.process.num_threads(),
        "open_files": router.process.num_fds(),
        "running": int(router.metric("tgi_batch_current_size")),
        "waiting": int(router.metric("tgi_queue_size")),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="1000000,5000000", help="after how many to look; default: %(default)s")
    parser.add_argument("--row", default="chat-all", help="whose requests to repeat; default: %(default)s")
    arguments = parser.parse_args()
    (row,) = select_rows(ROUTER_ROWS, [arguments.row])
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        tokenizer_folder = demo_tokenizer_folder(folder)
        path = write_set(row.request_set, folder, tokenizer_folder, seed=1)
        with start_router({**CONFIG, "tokenizer_folder": str(tokenizer_folder)}, None) as router:
            warm_up(router, folder, is_profiled=False)
            num_tokens, lines = 0, []
            for wanted in sorted(map(int, arguments.tokens.split(","))):
                while num_tokens < wanted:
                    _, records = run_client(row, router.url, path, folder, "--quiet")
                    num_tokens += sum(record["tokens"] for record in records)
                lines.append(look(router, num_tokens))
                print(json.dumps(lines[-1]), flush=True)
    first, last = lines[0], lines[-1]
    growth = {name: last[name] - first[name] for name in ("private_kib", "threads", "open_files")}
    print(json.dumps({"growth": growth}), flush=True)


if __name__ == "__main__":
    try:
        main()
    except BenchmarkFailed as error:
        sys.exit(f"bench_memory: {error}")
