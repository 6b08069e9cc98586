"""Predicts the rows of the GPU's request suite, before any GPU has run them.

    python integration-tests/predict_rows.py [--rows chat-c1,chat-all] [--seed 1] [--steps FILE] [--step-tokens 2048]

The request sets go through the router's own scheduler in virtual time, and each step lasts as long as
`text_generation_kernels.benchmarks.prediction` says from bytes, operations and occupancy. Host, network and router take
no time at all; each row finds the prefix cache cold. Prints what the targets ask beside it.

`--steps` takes the times of steps from measurements (h100_steps.json) instead; `--step-tokens` and `--free-contexts`
show what other rules for a step's budget would give.
"""

import argparse
import dataclasses
import math
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from itertools import accumulate, pairwise
from pathlib import Path

from bench_rows import GPU_ROWS, BenchmarkFailed, Row, demo_tokenizer_folder, read_lines, select_rows, write_set
from gpu_check.targets import TARGETS
from ideal_replay import Ideal, IdealRequest, Replay
from simulated_shard import BLOCK_SIZE, StepTimes
from text_generation_kernels.benchmarks import prediction
from text_generation_router.config import RouterConfig
from text_generation_router.limits import step_limits
from text_generation_router.scheduler import SchedulerLimits
from text_generation_router.shard_client import ShardInfo
from text_generation_router.tokenizer import Tokenizer

KV_TOKENS = 500_000  # what an H100 holds beside the weights
QUERY_FEATURES, KV_FEATURES = prediction.HEADS * prediction.HEAD_DIM, prediction.KV_HEADS * prediction.HEAD_DIM
H100 = ShardInfo(
    "NVIDIA H100",
    "bfloat16",
    vocab_size=prediction.VOCABULARY,
    max_position_embeddings=131_072,
    block_size=BLOCK_SIZE,
    num_layer_weights=prediction.LAYERS
    * prediction.HIDDEN
    * (2 * QUERY_FEATURES + 2 * KV_FEATURES + 3 * prediction.INNER),
    num_context_features=prediction.LAYERS * QUERY_FEATURES,
)
MAX_SAMPLES = 256  # the head's product takes as long for fewer


class PredictedTimes:
    """How long steps take, as `StepTimes` of simulated_shard.py tells it from measurements."""

    capacity_tokens = KV_TOKENS

    def step_ns(self, num_rows: int, num_cached_tokens: int, num_prefill_pairs: int) -> int:
        """`num_rows` tokens computed, `num_cached_tokens` read, `num_prefill_pairs` of query and key multiplied."""
        attention = [prediction.narrow_attention(num_cached_tokens)]
        if num_prefill_pairs:
            attention.append(prediction.wide_attention(num_prefill_pairs, prediction.query_bytes(num_rows)))
        launches = prediction.step_with(attention, num_rows, min(num_rows, MAX_SAMPLES))
        return int(sum(prediction.by_part(launches).values()) * 1e3)


def replay(row: Row, requests: list[IdealRequest], times: StepTimes | PredictedTimes, limits: SchedulerLimits) -> Ideal:
    """The row's requests in virtual time."""
    concurrency = None if row.rate is not None else row.concurrency or len(requests)
    return Replay(times, limits, requests).run(concurrency)


def limits_of(step_tokens: int | None, has_free_contexts: bool) -> SchedulerLimits:
    """The router's own for this GPU and model, but for what is asked for."""
    limits = step_limits(RouterConfig(max_batch_prefill_tokens=step_tokens), H100)
    return dataclasses.replace(limits, equal_context_tokens=math.inf) if has_free_contexts else limits


def requests_of(row: Row, path: Path, tokenizer: Tokenizer, seed: int) -> list[IdealRequest]:
    """The row's part of the set; at a rate with exponential gaps."""
    lines = read_lines(path)[: row.num_requests]
    gaps = random.Random(seed)
    offsets = [0.0] * len(lines)
    if row.rate is not None:
        offsets = list(accumulate((gaps.expovariate(row.rate) for _ in lines[1:]), initial=0.0))
    return [
        IdealRequest(tokenizer.encode_now(line["prompt"]), line["max_tokens"], int(offset * 1e9))
        for line, offset in zip(lines, offsets, strict=True)
    ]


def figures_of(ideal: Ideal) -> dict[str, float]:
    """The figures that targets are set for."""
    tokens_ns = [times.token_ns for times in ideal.times]
    ttft_ms = [(times.token_ns[0] - times.start_ns) / 1e6 for times in ideal.times]
    tpot_ms = [(ends[-1] - ends[0]) / 1e6 / (len(ends) - 1) for ends in tokens_ns if len(ends) > 1]
    itl_ms = [(later - earlier) / 1e6 for ends in tokens_ns for earlier, later in pairwise(ends)]
    return {
        "out_tok_s": sum(map(len, tokens_ns)) / ideal.duration_ns * 1e9,
        **percentiles("ttft", ttft_ms),
        **percentiles("tpot", tpot_ms),
        **percentiles("itl", itl_ms),
    }


def percentiles(name: str, values_ms: Sequence[float]) -> dict[str, float]:
    """The median and the 99th percentile."""
    cuts = statistics.quantiles(values_ms, n=100, method="inclusive")
    return {f"{name}_p50_ms": cuts[49], f"{name}_p99_ms": cuts[98]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="", help="names, separated by commas; all of them by default")
    parser.add_argument("--seed", type=int, default=1, help="of the request sets and of arrivals")
    parser.add_argument("--steps", type=Path, help="measured times of steps, as simulated_shard.py reads them")
    parser.add_argument("--step-tokens", type=int, help="token budget of a step; the router's own by default")
    parser.add_argument("--free-contexts", action="store_true", help="tokens count the same behind every context")
    arguments = parser.parse_args()
    times = PredictedTimes() if arguments.steps is None else StepTimes(arguments.steps)
    limits = limits_of(arguments.step_tokens, arguments.free_contexts)
    rows = select_rows(GPU_ROWS[1:], [name for name in arguments.rows.split(",") if name])
    print("| row | figure | asked | predicted |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="predict-") as name:
        folder = Path(name)
        tokenizer_folder = demo_tokenizer_folder(folder)
        tokenizer = Tokenizer(str(tokenizer_folder), num_threads=1)
        for row in rows:
            path = write_set(row.request_set, folder, tokenizer_folder, arguments.seed)
            figures = figures_of(replay(row, requests_of(row, path, tokenizer, arguments.seed), times, limits))
            for figure, (rule, target) in TARGETS[row.name].items():
                predicted = f"{figures[figure]:.{0 if figure == 'out_tok_s' else 2}f}"
                print(f"| {row.name} | {figure} | {rule} {target:g} | {predicted} |", flush=True)
        tokenizer.close()


if __name__ == "__main__":
    try:
        main()
    except BenchmarkFailed as error:
        sys.exit(f"predict_rows: {error}")
