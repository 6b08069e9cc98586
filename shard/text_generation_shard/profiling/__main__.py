"""Profiles steady decode and mixed steps of a model, prints where the time went and writes JSON.

    python -m text_generation_shard.profiling MODEL_FOLDER --load-format dummy --decode 1,32,256 --mixed 32+512

In this process alone: the shard's own loop and runner, and plans as the router sends them, two in flight.
"""

import argparse
import json
import os
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from text_generation_shard.config import ShardConfig
from text_generation_shard.logs import Timeline, set_up_logging
from text_generation_shard.profiling.measurement import Case, Extent, Measurement
from text_generation_shard.profiling.plan_feed import PlanFeed, TimedRunner
from text_generation_shard.profiling.report import lines_of
from text_generation_shard.profiling.scripted_router import LoadTooLarge, ScriptedRouter
from text_generation_shard.progress import ProgressFile
from text_generation_shard.serve import load_runner
from text_generation_shard.step_loop import StepLoop
from text_generation_shard.warm_up import WarmUpError, WarmUpLimits


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="python -m text_generation_shard.profiling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model_folder", type=Path, help="folder with config.json and, unless random, *.safetensors")
    parser.add_argument("--load-format", choices=("auto", "dummy"), default="auto", help="dummy: random weights")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="default: the checkpoint's")
    parser.add_argument("--cuda-graphs", help="sizes of graphs, as the launcher's flag; 0: none")
    parser.add_argument("--max-step-tokens", type=int, default=2048, help="token budget of a step")
    parser.add_argument("--max-num-sequences", type=int, default=512, help="most sequences in a batch")
    parser.add_argument("--max-kv-tokens", type=int, default=0, help="limit on KV memory; default: what there is")
    parser.add_argument("--decode", default="1,32,256", help="numbers of decoding sequences; empty: none")
    parser.add_argument("--mixed", default="32+512", help="sequences+prompt, with commas between them; empty: none")
    parser.add_argument("--context", type=int, default=1024, help="tokens of each sequence, about")
    parser.add_argument("--steps", type=int, default=200, help="steps of each case without the profiler")
    parser.add_argument("--traced-steps", type=int, default=30, help="steps of each case with it")
    parser.add_argument("--kernels", type=int, default=30, help="kernels to print of each case")
    parser.add_argument("--json", type=Path, help="write all figures to this file, case by case")
    parser.add_argument("--traces", type=Path, help="keep each case's trace in this folder")
    return parser


def cases_of(decode: str, mixed: str) -> list[Case]:
    """The cases that the options name; raises ValueError."""
    cases = [Case(int(count)) for count in decode.split(",") if count]
    for text in filter(None, mixed.split(",")):
        count, _, length = text.partition("+")
        cases.append(Case(int(count), int(length)))
    return cases


class Profiling:
    """The whole run; `run` is called in a thread of its own, beside the loop's."""

    def __init__(self, options: argparse.Namespace, cases: list[Case], loop: StepLoop, runner: TimedRunner) -> None:
        self._options = options
        self._cases = cases
        self._loop = loop
        self._runner = runner
        self.report: dict[str, Any] = {"device": runner.info.device_name, "cases": []}
        self.error: BaseException | None = None

    def run(self) -> None:
        """Warm up, then one case after the other; what goes wrong is kept in `error`."""
        try:
            self._run()
        except BaseException as error:
            self.error = error
        finally:
            self._loop.stop()

    def _run(self) -> None:
        options, layout = self._options, self._runner.layout
        started = time.perf_counter()
        limits = WarmUpLimits(options.max_step_tokens, options.max_num_sequences, 0, options.max_kv_tokens)
        num_blocks = self._loop.call(lambda: self._runner.warm_up(limits), WarmUpError)
        self.report |= {"warm_up_s": time.perf_counter() - started, "num_blocks": num_blocks}
        feed = PlanFeed(self._loop)
        feed.open()
        vocab_size = self._runner.info.vocab_size
        router = ScriptedRouter(num_blocks, layout.block_size, options.max_step_tokens, vocab_size)
        measurement = Measurement(self._runner, feed, router, self._runner.info.device_name != "cpu")
        extent = Extent(options.context, options.steps, options.traced_steps)
        for case in self._cases:
            trace = options.traces and options.traces / f"{case.name.replace(' ', '-')}.json"
            figures = measurement.run(case, extent, trace)
            self.report["cases"].append(figures)
            print("\n".join(lines_of(figures, options.kernels)), flush=True)
            if options.json is not None:
                options.json.write_text(json.dumps(self.report, indent=1))


def main() -> int:
    """Load the model, run the loop here and the cases in a thread; the exit code."""
    parser = build_parser()
    options = parser.parse_args()
    try:
        cases = cases_of(options.decode, options.mixed)
    except ValueError as error:
        parser.error(f"--decode or --mixed: {error}")
    set_up_logging("info", json_output=False)
    if options.traces is not None:
        options.traces.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="profiling-") as run_folder:
        config = ShardConfig(
            dtype=options.dtype,
            cuda_graphs=options.cuda_graphs,
            load_format=options.load_format,
            model_folder=str(options.model_folder),
            weight_files=tuple(sorted(map(str, options.model_folder.glob("*.safetensors")))),
            run_folder=run_folder,
        )
        progress = ProgressFile(run_folder, 0)
        runner = load_runner(config, Timeline(time.monotonic_ns()), progress, TimedRunner)
        assert isinstance(runner, TimedRunner)
        loop = StepLoop(runner, rank=0, world_size=1)
        profiling = Profiling(options, cases, loop, runner)
        thread = threading.Thread(target=profiling.run, name="router")
        thread.start()
        loop.run()
        thread.join()
        progress.close()
    if isinstance(profiling.error, LoadTooLarge | WarmUpError):
        print(f"profiling: {profiling.error}", file=sys.stderr)
    elif profiling.error is not None:
        traceback.print_exception(profiling.error)
    return 0 if profiling.error is None else 1


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Triton's library ends with a page about what it did not free, after which nobody finds the reason for an end.
    os._exit(code)
