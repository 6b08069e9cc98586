"""Checks and measures on a GPU: tests, parity, kernel benchmarks, a trace of steps, start-up, request suite, memory.

    python integration-tests/gpu_check --model FOLDER [--parts kernels,trace] [--demo FILE.gguf] [--bench FOLDER]

FOLDER holds config.json and tokenizer.json of the model to measure; its weights are random. Needs no network, and a
source tree need not be installed. Ends with 1 when a part failed or ran out of time; what it had is kept.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

if __package__ in (None, ""):  # started by its path
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from gpu_check.parts import PARTS, Options, run_part, source_environment
from gpu_check.rehearsal import write_tiny_model
from gpu_check.report import markdown

ROOT = Path(__file__).resolve().parent.parent.parent


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", type=Path, help="folder of the model to measure; needed by trace, startup, suite and memory"
    )
    parser.add_argument("--parts", default=",".join(PARTS), help="names with commas between them; default: %(default)s")
    parser.add_argument("--demo", type=Path, help="the demo model's GGUF file, for parity; default: its package's")
    parser.add_argument("--bench", type=Path, help="folder with load.py and workloads/, to use in place of our own")
    parser.add_argument("--output", type=Path, default=Path("gpu-check"), help="folder of reports and logs")
    parser.add_argument("--limit-s", type=float, default=1500.0, help="time for all parts together")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) // 2), help="test files run at once")
    parser.add_argument(
        "--trace-flags", default="", help="more options for `python -m text_generation_shard.profiling`"
    )
    parser.add_argument("--server-flags", default="", help="more flags for the launcher in startup, suite and memory")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, with tiny shapes: that every part runs")
    return parser


def main() -> int:
    """Run the parts, write both reports after each of them."""
    parser = build_parser()
    arguments = parser.parse_args()
    names = [name for name in arguments.parts.split(",") if name]
    if unknown := set(names) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    output = arguments.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    environment = source_environment(ROOT, os.environ)
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as name:
        model = arguments.model and arguments.model.resolve()
        if arguments.rehearse and model is None:
            model = write_tiny_model(Path(name), environment)
        if model is None and any(PARTS[part].needs_model for part in names):
            parser.error("--model is needed; --rehearse makes a tiny one")
        options = Options(
            root=ROOT,
            output=output,
            model=model,
            demo=arguments.demo and arguments.demo.resolve(),
            bench=arguments.bench and arguments.bench.resolve(),
            num_jobs=arguments.jobs,
            trace_flags=tuple(arguments.trace_flags.split()),
            server_flags=tuple(arguments.server_flags.split()),
            is_rehearsal=arguments.rehearse,
        )
        return run(names, options, environment, arguments.limit_s)


def run(names: list[str], options: Options, environment: dict[str, str], limit_s: float) -> int:
    """The exit code."""
    started_s = time.monotonic()
    report = {"python": platform.python_version(), "is_rehearsal": options.is_rehearsal, "parts": {}}
    is_good = True
    for name in names:
        left_s = limit_s - (time.monotonic() - started_s)
        outcome = run_part(PARTS[name], options, environment, left_s)
        is_good = is_good and outcome["failure"] is None
        report["parts"][name] = outcome
        report["wall_s"] = round(time.monotonic() - started_s, 1)
        (options.output / "gpu-check.json").write_text(json.dumps(report, indent=1))
        (options.output / "gpu-check.md").write_text(markdown(report))
        print(f"{name}: {outcome['failure'] or 'good'}, {outcome['wall_s']:.1f} s", flush=True)
    print(f"reports: {options.output}/gpu-check.md and gpu-check.json")
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
