"""text-generation-benchmark: reads flags, makes the requests, runs one load or a sweep, prints and writes figures."""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path

import orjson

from text_generation_launcher.benchmark.arguments import build_parser
from text_generation_launcher.benchmark.client import Call, Record, Target, prepare
from text_generation_launcher.benchmark.load import Pace, run_load
from text_generation_launcher.benchmark.plot import PlotError, check_plot, draw
from text_generation_launcher.benchmark.progress import Progress
from text_generation_launcher.benchmark.report import Summary, Targets, find_knee, summarize
from text_generation_launcher.benchmark.request_sets import (
    BadRequestSet,
    LoadRequest,
    make_requests,
    read_requests,
    write_requests,
)


def load_requests(arguments: argparse.Namespace) -> list[LoadRequest]:
    """The requests that the flags name, all of them."""
    if arguments.requests is not None:
        return read_requests(arguments.requests)
    if arguments.tokenizer is not None:
        return make_requests(arguments.set, arguments.tokenizer, arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        # The demo model's tokenizer is inside its weight file; the shard's package knows how to read it.
        command = [sys.executable, "-m", "text_generation_shard.model_files", "--run-folder", folder]
        answer = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=False).stdout or b"{}")
        if "model_folder" not in answer:
            raise BadRequestSet(f"no tokenizer, name one by --tokenizer: {answer.get('error', 'no demo model')}")
        return make_requests(arguments.set, Path(answer["model_folder"]), arguments.seed)


def make_paces(arguments: argparse.Namespace) -> list[Pace]:
    """The loads to run, one after the other."""
    if arguments.sweep_concurrency is not None:
        return [Pace(concurrency=concurrency) for concurrency in arguments.sweep_concurrency]
    rates = arguments.sweep_rate or [arguments.rate]
    return [Pace(arguments.concurrency, rate, arguments.arrivals, arguments.seed) for rate in rates]


def append_records(path: Path, records: Sequence[Record]) -> None:
    """One line for each request; times are nanoseconds of the monotonic clock."""
    with path.open("ab") as file:
        for record in records:
            fields = {
                "start_ns": record.start_ns,
                "first_token_ns": record.times_ns[0] if record.times_ns else None,
                "end_ns": record.end_ns,
                "prompt_tokens": record.num_prompt_tokens,
                "tokens": record.num_tokens,
                "error": record.error,
            }
            file.write(orjson.dumps(fields, option=orjson.OPT_APPEND_NEWLINE))


def run_all(arguments: argparse.Namespace, target: Target, calls: list[Call]) -> list[Summary]:
    """Run every load, report each as it ends; a load with a failure is the last."""
    name = arguments.name or (arguments.requests.stem if arguments.requests else arguments.set)
    targets = Targets(arguments.slo_ttft_ms, arguments.slo_itl_ms)
    # A sweep takes other requests at each load, as far as there are any: a prefix cache would know the same ones.
    supply = cycle(calls)
    summaries: list[Summary] = []
    paces = make_paces(arguments)
    for pace in paces:
        share = list(islice(supply, arguments.num_requests or max(1, len(calls) // len(paces))))
        progress = Progress(name, None if arguments.quiet else sys.stderr)
        result = run_load(target, share, pace, progress)
        summaries.append(summarize(name, pace, result, targets))
        print(summaries[-1].as_text(), flush=True)
        if arguments.records is not None:
            append_records(arguments.records, result.records)
        if arguments.json is not None:
            with arguments.json.open("ab") as file:
                file.write(orjson.dumps(summaries[-1].as_json(), option=orjson.OPT_APPEND_NEWLINE))
        if not summaries[-1].is_clean:
            break
    return summaries


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the command; returns its exit code."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    is_sweep = arguments.sweep_concurrency is not None or arguments.sweep_rate is not None
    try:
        if arguments.plot is not None:
            if not is_sweep:
                parser.error("--plot draws latency over load: it needs --sweep-concurrency or --sweep-rate")
            check_plot(arguments.plot)
        requests = load_requests(arguments)
        if arguments.write_requests is not None:
            write_requests(arguments.write_requests, requests[: arguments.num_requests])
            return 0
        target = Target(arguments.url, arguments.route, arguments.model, arguments.api_key, arguments.new_connections)
        calls = prepare(target, requests)
    except (BadRequestSet, PlotError, ValueError) as error:
        parser.error(str(error))
    summaries = run_all(arguments, target, calls)
    if is_sweep and (knee := find_knee(summaries)) is not None:
        print(f"knee: {knee.pace.label}, {knee.output_tokens_per_s:.1f} tok/s")
        if arguments.plot is not None:
            draw(arguments.plot, summaries, knee)
    is_clean = all(summary.is_clean for summary in summaries)
    if not is_clean:
        print(f"FAILED: {summaries[-1].first_error}", file=sys.stderr)
    return 0 if is_clean else 1


if __name__ == "__main__":
    sys.exit(main())
