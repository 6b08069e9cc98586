"""Measures what a grammar costs per token: as many streams with one and without, in turns, on the demo model.

    python integration-tests/bench_grammars.py [--grammars objects,regex] [--streams 64] [--tokens 48] [--pairs 5]

Starts our server, or takes the one at --url. One JSON line for each grammar: the wall time of a token of all streams
with the grammar over that without it (each pair's and their median), the spread of equal runs, and, by the server's own
metrics, what a step that only decodes took and the work on masks beside it.
"""

import argparse
import asyncio
import contextlib
import json
import statistics
import sys
import time
import urllib.request
from dataclasses import dataclass
from typing import Any

import aiohttp
from bench_processes import start_server
from bench_rows import BenchmarkFailed

NAME = {"type": "string", "minLength": 1, "maxLength": 24}
PERSON = {
    "type": "object",
    "properties": {
        "name": NAME,
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "city": {"enum": ["Paris", "Rome", "Oslo", "Cairo"]},
        "tags": {"type": "array", "items": NAME, "maxItems": 3},
    },
    "required": ["name", "age", "city", "tags"],
}
# All go on for longer than any run.
MANY = 2000
GRAMMARS: dict[str, dict[str, Any]] = {
    "objects": {"type": "json", "value": {"type": "array", "items": PERSON, "minItems": MANY}},
    "anything": {"type": "json", "value": {"type": "array", "minItems": MANY}},
    "strings": {"type": "json", "value": {"type": "array", "items": {"type": "string"}, "minItems": MANY}},
    "short-strings": {"type": "json", "value": {"type": "array", "items": NAME, "minItems": MANY}},
    "regex": {"type": "regex", "value": f"([a-z]{{1,9}}[ ,]){{{MANY}}}"},
}
METRICS = ("tgi_step_duration", "tgi_batch_mask_duration")


@dataclass(frozen=True)
class Cost:
    """One run."""

    token_us: float  # wall time, divided by the tokens of all streams
    step_ms: float
    mask_ms: float  # work beside a step; 0 without a grammar


async def run_streams(url: str, grammar: dict[str, Any] | None, num_streams: int, num_tokens: int) -> float:
    """Read all streams at once, and give the seconds that it took."""

    async def read(session: aiohttp.ClientSession, number: int) -> None:
        parameters = {"max_new_tokens": num_tokens, "do_sample": True, "seed": number}
        parameters |= {"ignore_eos": True} if grammar is None else {"grammar": grammar}
        body = {"inputs": f"{number} people in JSON:", "parameters": parameters}
        num_read = 0
        async with session.post(f"{url}/generate_stream", json=body) as response:
            async for line in response.content:
                num_read += line.startswith(b'data: {"index"')
        if num_read != num_tokens:
            raise BenchmarkFailed(f"a stream had {num_read} tokens of {num_tokens}")

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        started = time.perf_counter()
        await asyncio.gather(*(read(session, number) for number in range(num_streams)))
        return time.perf_counter() - started


def read_metrics(url: str) -> dict[str, tuple[float, float]]:
    """Sum and count of what is looked at; of steps those that only decode."""
    with urllib.request.urlopen(f"{url}/metrics") as reply:
        lines = [line.rsplit(" ", 1) for line in reply.read().decode().splitlines() if not line.startswith("#")]
    values = {name.replace('{kind="decode"}', ""): float(value) for name, value in lines}
    return {name: (values[f"{name}_sum"], values[f"{name}_count"]) for name in METRICS}


def mean_ms(before: tuple[float, float], after: tuple[float, float]) -> float:
    """Of what came between."""
    count = after[1] - before[1]
    return (after[0] - before[0]) / count * 1e3 if count else 0.0


def measure(url: str, grammar: dict[str, Any] | None, num_streams: int, num_tokens: int) -> Cost:
    """One run of all streams."""
    before = read_metrics(url)
    seconds = asyncio.run(run_streams(url, grammar, num_streams, num_tokens))
    after = read_metrics(url)
    step_ms, mask_ms = (mean_ms(before[name], after[name]) for name in METRICS)
    return Cost(seconds * 1e6 / (num_streams * num_tokens), step_ms, mask_ms)


def compare(url: str, name: str, num_pairs: int, num_streams: int, num_tokens: int) -> dict[str, Any]:
    """Pairs of runs, neither always the first."""
    runs: dict[bool, list[Cost]] = {False: [], True: []}
    for has_grammar in (True, False):
        measure(url, GRAMMARS[name] if has_grammar else None, num_streams, 8)  # compiled, and its prompts cached
    for number in range(2 * num_pairs):
        has_grammar = number % 4 in (1, 2)
        runs[has_grammar].append(measure(url, GRAMMARS[name] if has_grammar else None, num_streams, num_tokens))
    token_us = {has_grammar: [run.token_us for run in costs] for has_grammar, costs in runs.items()}
    ratios = [with_one / without for with_one, without in zip(token_us[True], token_us[False], strict=True)]
    return {
        "name": name,
        "ratios": [round(ratio, 4) for ratio in ratios],
        "median_ratio": round(statistics.median(ratios), 4),
        "spread_of_equal_runs": [round(max(values) / min(values) - 1, 4) for values in token_us.values()],
        "token_us": [round(statistics.median(values), 1) for values in token_us.values()],
        "step_ms": [round(statistics.median(run.step_ms for run in costs), 2) for costs in runs.values()],
        "mask_ms_per_step": round(statistics.median(run.mask_ms for run in runs[True]), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grammars", default=",".join(GRAMMARS), help="names, separated by commas")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=48, help="of each stream")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--url", help="our server, if it runs already")
    arguments = parser.parse_args()
    names = arguments.grammars.split(",")
    if unknown := set(names) - GRAMMARS.keys():
        raise BenchmarkFailed(f"no such grammar: {', '.join(sorted(unknown))}; there are {[*GRAMMARS]}")
    with contextlib.ExitStack() as ends:
        url = arguments.url or ends.enter_context(start_server())
        for name in names:
            line = compare(url, name, arguments.pairs, arguments.streams, arguments.tokens)
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    try:
        main()
    except BenchmarkFailed as error:
        sys.exit(f"bench_grammars: {error}")
