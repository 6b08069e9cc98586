"""Measures the whole server with the demo model on this machine's CPU, beside a peer if there is one.

    python integration-tests/bench_cpu.py [--rows chat-c1,chat-c8] [--peer http://127.0.0.1:8080] [--seed 1]

Starts our server, or takes the one at --url. Rows run in one life of each server and in the order of the table, so
that later rows find prompts of earlier ones in the prefix cache. With a peer, each row is run on ours and at once on
the peer, which must serve the same model with /v1/completions; `ratios` is ours divided by the peer's. One JSON line
for each row.
"""

import argparse
import contextlib
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench_processes import start_server
from bench_rows import CPU_ROWS, BenchmarkFailed, Row, demo_tokenizer_folder, run_client, select_rows, write_set

WARM_UP = Row("warm-up", "small-chat", 6, concurrency=2)
KEPT = ("out_tok_s", "ttft_p50_ms", "ttft_p99_ms", "tpot_p50_ms", "tpot_p99_ms", "itl_p99_ms", "wall_s")


def ratios(ours: Mapping[str, float | None], peer: Mapping[str, float | None]) -> dict[str, float | None]:
    """Ours divided by the peer's, figure by figure; null where one has none."""
    return {
        name: round(value / other, 4) if value is not None and (other := peer[name]) else None
        for name, value in ours.items()
    }


def measure(row: Row, url: str, requests: Path, folder: Path) -> dict[str, Any]:
    """One row on one server."""
    # A connection for each request: some servers drop idle ones.
    figures, _ = run_client(row, url, requests, folder, "--new-connections")
    return {name: figures[name] for name in KEPT}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="", help="names, separated by commas; all of them by default")
    parser.add_argument("--seed", type=int, default=1, help="of the request sets")
    parser.add_argument("--url", help="our server, if it runs already")
    parser.add_argument("--peer", help="another server, to compare with")
    arguments = parser.parse_args()
    rows = select_rows(CPU_ROWS, [name for name in arguments.rows.split(",") if name])
    with tempfile.TemporaryDirectory(prefix="bench-") as name, contextlib.ExitStack() as ends:
        folder = Path(name)
        tokenizer_folder = demo_tokenizer_folder(folder)
        servers = {"ours": arguments.url or ends.enter_context(start_server())}
        if arguments.peer:
            servers["peer"] = arguments.peer
        for row in (WARM_UP, *rows):
            path = write_set(row.request_set, folder, tokenizer_folder, arguments.seed)
            line: dict[str, Any] = {who: measure(row, url, path, folder) for who, url in servers.items()}
            if "peer" in line:
                line["ratios"] = ratios(line["ours"], line["peer"])
            if row is not WARM_UP:
                print(json.dumps({"name": row.name, **line}), flush=True)


if __name__ == "__main__":
    try:
        main()
    except BenchmarkFailed as error:
        sys.exit(f"bench_cpu: {error}")
