"""Measures the router: the real process before a simulated shard that takes an H100's time.

    python integration-tests/bench_router.py [--rows chat-c1,chat-all] [--seed 1] [--config JSON] [--profile FILE]
    python integration-tests/bench_router.py --observed-pairs 5 [--rows chat-c32]

Prints one JSON line for each row. Each row has a router and a shard of its own, so that rows do not depend on what
others left in the prefix cache. What is compared: `out_tok_s` with `ideal_tok_s`, the same requests through the same
scheduler without any overhead (ideal_replay.py), and `idle_share`, the part of the time with open requests in which
no step ran. Imports the router for that replay alone; what is measured is a process of its own.

`--observed-pairs` tells what metrics and traces cost instead: so many times a row's first requests before the router
that also traces a tenth of them, to a collector that takes the spans, and before one that records and traces nothing
(silent_router.py), in turns; CPU time per token of each run, and the median of the pairs' ratios.
"""

import argparse
import dataclasses
import json
import signal
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from bench_processes import RouterUnderLoad, start_router, start_traced_router
from bench_rows import (
    ROUTER_ROWS,
    BenchmarkFailed,
    Row,
    demo_tokenizer_folder,
    read_lines,
    run_client,
    select_rows,
    write_set,
)
from ideal_replay import Ideal, IdealRequest, Replay
from simulated_shard import BLOCK_SIZE, DEVICE_NAME, MAX_POSITION_EMBEDDINGS, StepTimes
from text_generation_router.config import RouterConfig
from text_generation_router.limits import step_limits
from text_generation_router.shard_client import ShardInfo
from text_generation_router.tokenizer import Tokenizer

CONFIG = {"max_concurrent_requests": 2000}
PAIR_REQUESTS = 400
WARM_UP = Row("warm-up", "warm-up", concurrency=4)
KEPT = ("ttft_p50_ms", "ttft_p99_ms", "tpot_p50_ms", "tpot_p99_ms", "itl_p99_ms")
COUNTERS = {"preemptions": "tgi_preemptions", "prefix_hit_tokens": "tgi_prefix_cache_hit_tokens"}


@dataclass(frozen=True)
class Measured:
    """One row: its figures, what was asked, and what became of each request."""

    figures: dict[str, Any]
    requests: list[dict[str, Any]]
    records: list[dict[str, Any]]

    @property
    def num_tokens(self) -> int:
        """Output tokens of the whole row."""
        return sum(record["tokens"] for record in self.records)


def idle_share(records: Sequence[dict[str, Any]], steps: Sequence[tuple[int, int]]) -> float:
    """The part of the time with an open request in which no step ran; `steps` are (start, end) in order."""
    open_ns = merge([(record["start_ns"], record["end_ns"]) for record in records])
    busy_ns, first = 0, 0
    for start_ns, end_ns in open_ns:
        while first < len(steps) and steps[first][1] <= start_ns:
            first += 1
        index = first
        while index < len(steps) and steps[index][0] < end_ns:
            busy_ns += min(steps[index][1], end_ns) - max(steps[index][0], start_ns)
            index += 1
    return 1 - busy_ns / sum(end_ns - start_ns for start_ns, end_ns in open_ns)


def merge(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans that overlap, joined; in order."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def measure(row: Row, router: RouterUnderLoad, requests: Path, folder: Path) -> Measured:
    """Put the load on, and gather what client, router and shard say of it."""
    num_steps, cpu_s = router.num_steps(), router.cpu_s()
    counters = {name: router.metric(name) for name in COUNTERS.values()}
    client, records = run_client(row, router.url, requests, folder)
    cpu_s = router.cpu_s() - cpu_s
    steps = np.fromfile(router.steps, np.int64).reshape(-1, 3)[num_steps:]
    num_tokens = sum(record["tokens"] for record in records)
    figures = {
        "out_tok_s": client["out_tok_s"],
        "idle_share": round(idle_share(records, steps[:, :2].tolist()), 4),
        **{name: client[name] for name in KEPT},
        "router_cpu_us_per_token": round(cpu_s * 1e6 / num_tokens, 1),
        "client_cpu_us_per_token": round(client["client_cpu_us_per_token"], 1),
        "steps": len(steps),
        **{short: int(router.metric(name) - counters[name]) for short, name in COUNTERS.items()},
    }
    return Measured(figures, read_lines(requests)[: row.num_requests], records)


def warm_up(router: RouterUnderLoad, folder: Path, is_profiled: bool) -> None:
    """A few short requests, none of which share a block with the rows'."""
    path = folder / "warm-up.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Warm up {i}", "max_tokens": 32}) + "\n" for i in range(16)))
    run_client(WARM_UP, router.url, path, folder, "--quiet")
    if is_profiled:
        router.process.send_signal(signal.SIGUSR2)  # forget the samples so far


def replay(row: Row, measured: Measured, tokenizer: Tokenizer, config: RouterConfig, times: StepTimes) -> Ideal:
    """The same requests without any overhead; at a rate, from the moments at which they really started."""
    start_ns = min(record["start_ns"] for record in measured.records)
    requests = []
    for request, record in zip(measured.requests, measured.records, strict=True):
        token_ids = tokenizer.encode_now(request["prompt"])
        if len(token_ids) != record["prompt_tokens"]:
            raise BenchmarkFailed(f"a prompt of {len(token_ids)} tokens was counted as {record['prompt_tokens']}")
        requests.append(IdealRequest(token_ids, request["max_tokens"], record["start_ns"] - start_ns))
    info = ShardInfo(
        DEVICE_NAME,
        dtype="",
        vocab_size=0,
        max_position_embeddings=MAX_POSITION_EMBEDDINGS,
        block_size=BLOCK_SIZE,
        num_layer_weights=times.num_layer_weights,
        num_context_features=times.num_context_features,
    )
    concurrency = None if row.rate is not None else row.concurrency or len(requests)
    return Replay(times, step_limits(config, info), requests).run(concurrency)


def compare(measured: Measured, ideal: Ideal) -> dict[str, Any]:
    """A row's figures and, beside them, the ideal."""
    ideal_tok_s = measured.num_tokens / ideal.duration_ns * 1e9
    counts = [request["max_tokens"] for request in measured.requests]
    ttft_ms = [(times.first_token_ns - times.start_ns) / 1e6 for times in ideal.times]
    tpot_ms = [
        (times.end_ns - times.first_token_ns) / 1e6 / (count - 1)
        for times, count in zip(ideal.times, counts, strict=True)
        if count > 1
    ]
    return {
        **measured.figures,
        "ideal_tok_s": round(ideal_tok_s, 1),
        "share_of_ideal": round(measured.figures["out_tok_s"] / ideal_tok_s, 4),
        "ideal_ttft_p50_ms": round(statistics.median(ttft_ms), 2),
        "ideal_tpot_p50_ms": round(statistics.median(tpot_ms), 3),
        "ideal_steps": ideal.num_steps,
        "ideal_preemptions": ideal.num_preemptions,
        "ideal_prefix_hit_tokens": ideal.num_prefix_hit_tokens,
    }


def compare_observed(row: Row, num_pairs: int, config: dict[str, Any], requests: Path, folder: Path) -> dict[str, Any]:
    """CPU microseconds per token with metrics and traces and with neither: each run's, and the median ratio."""
    short = dataclasses.replace(row, num_requests=min(row.num_requests or PAIR_REQUESTS, PAIR_REQUESTS))
    costs: dict[bool, list[float]] = {False: [], True: []}
    for number in range(2 * num_pairs):
        is_silent = number % 4 in (1, 2)  # neither is always the first of its pair
        with start_router(config, None, is_silent=True) if is_silent else start_traced_router(config) as router:
            warm_up(router, folder, is_profiled=False)
            costs[is_silent].append(measure(short, router, requests, folder).figures["router_cpu_us_per_token"])
    ratios = [observed / silent for observed, silent in zip(costs[False], costs[True], strict=True)]
    return {
        "observed": costs[False],
        "silent": costs[True],
        "median_ratio": round(statistics.median(ratios), 4),
        "spread_of_equal_runs": [round(max(values) / min(values) - 1, 4) for values in costs.values()],
    }


def profile_text(path: Path, us_per_token: float, num_lines: int = 25) -> str:
    """The functions of the router that took the most CPU time, what they call outside it included."""
    counts: Counter[str] = Counter()
    for line in path.read_text().splitlines():
        stack, count = line.rsplit(" ", 1)
        own = [name for name in stack.split(";") if name.startswith("router/")]
        counts[own[-1] if own else "other"] += int(count)
    share_us = us_per_token / counts.total()
    return "".join(f"{count * share_us:7.2f} us a token  {name}\n" for name, count in counts.most_common(num_lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="", help="names, separated by commas; all of them by default")
    parser.add_argument("--seed", type=int, default=1, help="of the request sets")
    parser.add_argument("--config", type=json.loads, default={}, help="more settings of the router, as JSON")
    parser.add_argument(
        "--profile",
        type=Path,
        help="sample the router's stacks into this file, and show where its CPU time went; for one row",
    )
    parser.add_argument(
        "--observed-pairs", type=int, default=0, help="measure what metrics and traces cost, so many times"
    )
    arguments = parser.parse_args()
    rows = select_rows(ROUTER_ROWS, [name for name in arguments.rows.split(",") if name])
    if arguments.profile is not None and len(rows) != 1:
        parser.error("--profile takes one row")
    config = {**CONFIG, **arguments.config}
    times = StepTimes(Path(__file__).with_name("h100_steps.json"))
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        config["tokenizer_folder"] = str(demo_tokenizer_folder(folder))
        tokenizer = Tokenizer(config["tokenizer_folder"], num_threads=1)
        for row in rows:
            path = write_set(row.request_set, folder, Path(config["tokenizer_folder"]), arguments.seed)
            if arguments.observed_pairs:
                pairs = compare_observed(row, arguments.observed_pairs, config, path, folder)
                print(json.dumps({"name": row.name, **pairs}), flush=True)
                continue
            with start_router(config, arguments.profile) as router:
                warm_up(router, folder, arguments.profile is not None)
                measured = measure(row, router, path, folder)
            ideal = replay(row, measured, tokenizer, RouterConfig(**config), times)
            print(json.dumps({"name": row.name, **compare(measured, ideal)}), flush=True)
            if arguments.profile is not None:
                sys.stderr.write(profile_text(arguments.profile, measured.figures["router_cpu_us_per_token"]))
        tokenizer.close()


if __name__ == "__main__":
    try:
        main()
    except BenchmarkFailed as error:
        sys.exit(f"bench_router: {error}")
