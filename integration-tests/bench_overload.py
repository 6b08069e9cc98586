"""Measures the router under more load than its shard can bear: the real router before a simulated H100.

    python integration-tests/bench_overload.py [--seconds 20] [--seed 1]

Prints JSON lines. `unloaded`: one request after the other. `capacity`: as many at once as the limit allows.
`overload`: requests come at three times the rate that the capacity row had; the limit on TTFT is twice the unloaded
p99 and the time in which as many requests as the limit allows are served. `fairness`: two API keys before a batch of
half the limit; key B sends a few requests, once beside a flood from key A and once beside the same flood under its own.
`probes`: a thousand long prompts come at once, and each is refused once its tokens are counted; meanwhile another
process asks for the server's health.
"""

import argparse
import asyncio
import dataclasses
import json
import multiprocessing
import random
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
from bench_processes import start_router
from bench_rows import BenchmarkFailed, demo_tokenizer_folder

LIMIT = 64
FLOOD = 3.0  # times the capacity
OWN_SHARE = 0.1  # of the capacity: what key B sends for itself
NUM_LONG, LONG_WORDS, LONG_LIMIT = 1000, 4000, 1000  # prompts, words of one, tokens that one may have
KEYS = {"a": "key-of-a", "b": "key-of-b"}
WORDS = ("stone", "river", "paper", "seven", "window", "green", "under", "copper", "letter", "north", "often", "glass")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one request; times in seconds."""

    status: int
    ttft_s: float  # of a refusal: until it was read
    is_own: bool


class Client:
    """Sends requests, no two with the same prompt, and notes what becomes of them."""

    def __init__(self, session: aiohttp.ClientSession, url: str, choices: random.Random) -> None:
        self._session = session
        self.url = url
        self._choices = choices
        self.outcomes: list[Outcome] = []

    def _body(self, num_words: int | None) -> dict[str, Any]:
        choices = self._choices
        words = choices.choices(WORDS, k=num_words or choices.randrange(50, 400))
        prompt = f"{choices.getrandbits(64):x} {' '.join(words)}"
        return {"prompt": prompt, "max_tokens": choices.randrange(16, 128), "stream": True, "ignore_eos": True}

    async def send(self, key: str | None, is_own: bool = False, num_words: int | None = None) -> None:
        """One request, read to its end."""
        headers = {} if key is None else {"Authorization": f"Bearer {KEYS[key]}"}
        body, ttft_s, started_s = self._body(num_words), 0.0, time.monotonic()
        async with self._session.post("/v1/completions", json=body, headers=headers) as response:
            async for line in response.content:
                if line.strip() and not ttft_s:
                    ttft_s = time.monotonic() - started_s
        self.outcomes.append(Outcome(response.status, ttft_s, is_own))

    async def send_at(self, rate: float, seconds: float, key: str | None, is_own: bool = False) -> None:
        """Requests at random moments, so many a second on average."""
        end_s, tasks = time.monotonic() + seconds, []
        next_s = time.monotonic()
        while (next_s := next_s + self._choices.expovariate(rate)) < end_s:
            await asyncio.sleep(max(0.0, next_s - time.monotonic()))
            tasks.append(asyncio.create_task(self.send(key, is_own)))
        await asyncio.gather(*tasks)

    async def keep_up(self, concurrency: int, seconds: float, key: str | None) -> None:
        """So many requests at any time."""
        end_s = time.monotonic() + seconds

        async def repeat() -> None:
            while time.monotonic() < end_s:
                await self.send(key)

        await asyncio.gather(*(repeat() for _ in range(concurrency)))


def ask_for_health(url: str, connection: Connection) -> None:
    """Ask a hundred times a second until told to end; sends the seconds that each answer took. All must be good."""
    took_s = []
    while not connection.poll(0.01):
        started_s = time.monotonic()
        with urllib.request.urlopen(f"{url}/health"):
            took_s.append(time.monotonic() - started_s)
    connection.send(took_s)


def percentiles(seconds: Iterable[float], name: str) -> dict[str, float]:
    """p50 and p99 in milliseconds."""
    values = [*seconds] or [float("nan")]
    return {f"{name}_p{p}_ms": round(float(np.percentile(values, p)) * 1e3, 1) for p in (50, 99)}


def figures(outcomes: list[Outcome], seconds: float) -> dict[str, Any]:
    """What all requests of a row had."""
    good = [outcome.ttft_s for outcome in outcomes if outcome.status == 200]
    refused = [outcome.ttft_s for outcome in outcomes if outcome.status == 429]
    if len(good) + len(refused) != len(outcomes):
        raise BenchmarkFailed(f"other answers: { ({outcome.status for outcome in outcomes} - {200, 429}) }")
    row: dict[str, Any] = {
        "requests": len(outcomes),
        "accepted": len(good),
        "accepted_per_s": round(len(good) / seconds, 1),
    }
    row |= percentiles(good, "ttft")
    if refused:
        row |= {
            "refused": len(refused),
            **percentiles(refused, "refusal"),
            "refusal_max_ms": round(max(refused) * 1e3, 1),
        }
    return row


class Benchmark:
    """The rows, one after the other; each has a router of its own."""

    def __init__(self, config: dict[str, Any], seconds: float, seed: int) -> None:
        self._config = config
        self._seconds = seconds
        self._seed = seed

    def _run(self, row: Any, **config: Any) -> tuple[list[Outcome], float]:
        """Run `row(client)` before a fresh router; the outcomes and how long it took."""

        async def run(url: str) -> tuple[list[Outcome], float]:
            connector = aiohttp.TCPConnector(limit=0)
            async with aiohttp.ClientSession(url, connector=connector) as session:
                client = Client(session, url, random.Random(self._seed))
                key = "a" if "api_keys_file" in config else None
                await asyncio.gather(*(client.send(key) for _ in range(8)))  # warm up
                client.outcomes.clear()
                started_s = time.monotonic()
                await row(client)
                return client.outcomes, time.monotonic() - started_s

        with start_router({**self._config, **config}, None) as router:
            return asyncio.run(run(router.url))

    async def _one_by_one(self, client: Client) -> None:
        await client.keep_up(1, self._seconds, None)

    async def _all_at_once(self, client: Client) -> None:
        await client.keep_up(LIMIT, self._seconds, None)

    def overload(self) -> None:
        """Three rows: unloaded, capacity, overload."""
        unloaded = figures(*self._run(self._one_by_one))
        print(json.dumps({"name": "unloaded", **unloaded}), flush=True)
        capacity = figures(*self._run(self._all_at_once))
        print(json.dumps({"name": "capacity", **capacity}), flush=True)
        rate = FLOOD * capacity["accepted_per_s"]
        row = figures(*self._run(lambda client: client.send_at(rate, self._seconds, None)))
        limit_ms = 2 * unloaded["ttft_p99_ms"] + LIMIT / row["accepted_per_s"] * 1e3
        print(
            json.dumps({"name": "overload", "rate": round(rate, 1), "ttft_limit_ms": round(limit_ms), **row}),
            flush=True,
        )

    def fairness(self, keys_file: Path) -> None:
        """Two rows: key B beside a flood from key A, and beside its own."""
        config = {"api_keys_file": str(keys_file), "max_batch_size": LIMIT // 2}

        async def fill(client: Client) -> None:
            await client.keep_up(LIMIT // 2, self._seconds, "a")

        capacity = figures(*self._run(fill, **config))["accepted_per_s"]
        for flooding in ("a", "b"):

            async def flood(client: Client, key: str = flooding) -> None:
                own = client.send_at(OWN_SHARE * capacity, self._seconds, "b", is_own=True)
                await asyncio.gather(own, client.send_at(FLOOD * capacity, self._seconds, key))

            outcomes, seconds = self._run(flood, **config)
            own = figures([outcome for outcome in outcomes if outcome.is_own], seconds)
            others = figures([outcome for outcome in outcomes if not outcome.is_own], seconds)
            shown = {"name": f"fairness-flood-of-{flooding}", "capacity_per_s": capacity, **own}
            print(json.dumps({**shown, "flood": others}), flush=True)

    def probes(self) -> None:
        """One row, of the prober's answers."""
        took_s: list[float] = []

        async def send_long(client: Client) -> None:
            context = multiprocessing.get_context("spawn")
            here, there = context.Pipe()
            prober = context.Process(target=ask_for_health, args=(client.url, there), daemon=True)
            prober.start()
            there.close()  # or its end would not be seen here
            await asyncio.gather(*(client.send(None, num_words=LONG_WORDS) for _ in range(NUM_LONG)))
            here.send("end")
            try:
                took_s.extend(here.recv())
            except EOFError:
                raise BenchmarkFailed("a probe had another answer than 200") from None
            prober.join()

        config = {"max_concurrent_requests": NUM_LONG, "max_input_tokens": LONG_LIMIT}
        outcomes, seconds = self._run(send_long, **config)
        if {outcome.status for outcome in outcomes} != {422}:
            raise BenchmarkFailed("a long prompt was not refused for its length")
        row = {"seconds": round(seconds, 1), "probes": len(took_s), **percentiles(took_s, "health")}
        print(json.dumps({"name": "probes", **row, "health_max_ms": round(max(took_s) * 1e3, 1)}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each row")
    parser.add_argument("--seed", type=int, default=1, help="of the requests")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        keys_file = folder / "keys"
        keys_file.write_text("".join(f"{tenant}:key:{key}\n" for tenant, key in KEYS.items()))
        config = {"tokenizer_folder": str(demo_tokenizer_folder(folder)), "max_concurrent_requests": LIMIT}
        benchmark = Benchmark(config, arguments.seconds, arguments.seed)
        benchmark.overload()
        benchmark.fairness(keys_file)
        benchmark.probes()


if __name__ == "__main__":
    try:
        main()
    except BenchmarkFailed as error:
        sys.exit(f"bench_overload: {error}")
