"""Finds entries of the launch table: `python -m text_generation_kernels.benchmarks.tune OPERATION …`.

Every candidate of a bench's CANDIDATES is measured on each of its cases; the one with the least sum of times, each
relative to the case's best, is printed as a line for launch_settings.SETTINGS.
"""

import argparse
import importlib
import itertools
import math
import time
from collections import defaultdict
from collections.abc import Iterator

import torch
import triton

from text_generation_kernels import launch_settings
from text_generation_kernels.benchmarks.harness import Bench, Case, time_runs
from text_generation_kernels.gpu import gpu_of
from text_generation_kernels.launch_settings import SETTINGS, Settings, gpu_class

Times = dict[tuple[str, str], dict[str, list[float]]]  # operation and shape -> candidate -> a time for each case


def main() -> None:
    """Tune the operations named on the command line."""
    parser = argparse.ArgumentParser(prog="python -m text_generation_kernels.benchmarks.tune", description=__doc__)
    parser.add_argument("operations", nargs="+", metavar="OPERATION")
    parser.add_argument("--limit-s", type=float, default=110.0, help="stop starting candidates after so long each")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no GPU: there is nothing to tune for")
    bench = Bench(torch.device("cuda:0"), is_tiny=False)
    for operation in arguments.operations:
        module = importlib.import_module(f"text_generation_kernels.benchmarks.bench_{operation}")
        for line in tune(list(combinations(module.CANDIDATES)), module.cases(bench), bench, arguments.limit_s):
            print(line, flush=True)


def combinations(candidates: dict[str, list[int]]) -> Iterator[Settings]:
    """Every choice of one value for each name."""
    for values in itertools.product(*candidates.values()):
        yield dict(zip(candidates, values, strict=True))


def tune(candidates: list[Settings], cases: Iterator[Case], bench: Bench, limit_s: float) -> Iterator[str]:
    """Lines for the table, best first for each entry, with the time relative to the best of each case."""
    deadline = time.monotonic() + limit_s
    times: Times = defaultdict(lambda: defaultdict(list))
    by_text = {repr(candidate): candidate for candidate in candidates}
    for case in cases:
        if not case.settings[0]:
            continue
        for text, candidate in by_text.items():
            is_late = time.monotonic() > deadline
            times[case.settings][text].append(math.inf if is_late else time_candidate(case, candidate, bench))
        case.runs.clear()
    for (operation, shape), by_candidate in times.items():
        name = f"{operation}/{shape}" if shape else operation
        yield f"# {name}: {len(by_candidate)} candidates"
        for score, text in ranked(by_candidate)[:3]:
            entry = current(operation, shape, bench) | by_text[text]
            yield f"({name!r}, {gpu_class(gpu_of(bench.device))!r}): {entry},  # {score:.3f} of the best"


def ranked(by_candidate: dict[str, list[float]]) -> list[tuple[float, str]]:
    """Candidates with their mean time relative to each case's best; cases that nothing finished do not count."""
    best = [min(column) for column in zip(*by_candidate.values(), strict=True)]
    measured = [index for index, value in enumerate(best) if math.isfinite(value)]
    scores = [
        (sum(times[index] / best[index] for index in measured) / max(1, len(measured)), text)
        for text, times in by_candidate.items()
    ]
    return sorted(scores)


def current(operation: str, shape: str, bench: Bench) -> Settings:
    """The table's entry as it stands."""
    return launch_settings.settings_of_class(operation, gpu_class(gpu_of(bench.device)), shape)


def time_candidate(case: Case, candidate: Settings, bench: Bench) -> float:
    """Seconds of one run with the candidate in the table; infinity if the GPU cannot run it."""
    operation, shape = case.settings
    key = (f"{operation}/{shape}" if shape else operation, gpu_class(gpu_of(bench.device)))
    before = SETTINGS.get(key)
    SETTINGS[key] = current(operation, shape, bench) | candidate
    launch_settings.settings_of_gpu.cache_clear()
    try:
        return time_runs(case.runs, bench)
    except (triton.runtime.errors.OutOfResources, triton.compiler.errors.CompilationError):
        return math.inf
    finally:
        if before is None:
            del SETTINGS[key]
        else:
            SETTINGS[key] = before
        launch_settings.settings_of_gpu.cache_clear()


if __name__ == "__main__":
    main()
