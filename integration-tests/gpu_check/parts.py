"""The parts: which command each one runs, how long it may take, and how it is run."""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KILL_GRACE_S = 10.0
NUM_LAST_LINES = 30
# Compiled for GPUs that need not be there: nothing that the GPU at hand could add.
NOT_FOR_GPUS = "test_compile.py"
REHEARSED_KERNELS = ("test_gated_activation.py", "test_rms_norm.py")
REHEARSED_BENCHMARKS = ("gated_activation", "rms_norm")


@dataclass(frozen=True)
class Options:
    """What the user asked for."""

    root: Path
    output: Path
    model: Path | None
    demo: Path | None
    bench: Path | None
    num_jobs: int
    trace_flags: tuple[str, ...]
    server_flags: tuple[str, ...]
    is_rehearsal: bool


@dataclass(frozen=True)
class Part:
    """A command that writes its figures to a JSON file, bit by bit, so that a part that fails leaves some."""

    name: str
    limit_s: float
    command: Callable[[Options, Path], list[str]]
    needs_model: bool = False


def source_environment(root: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """The environment in which this tree's packages are found, installed or not."""
    folders = [str(root / name) for name in ("proto", "router", "shard", "kernels", "launcher", "integration-tests")]
    before = environment.get("PYTHONPATH")
    return {**environment, "PYTHONPATH": os.pathsep.join([*folders, *([before] if before else [])])}


def run_part(part: Part, options: Options, environment: Mapping[str, str], left_s: float) -> dict[str, Any]:
    """Run it within its limit and what is left of the whole; answers what became of it, and its figures."""
    figures, log_path = options.output / f"{part.name}.json", options.output / f"{part.name}.log"
    figures.unlink(missing_ok=True)
    limit_s = min(part.limit_s, left_s)
    outcome: dict[str, Any] = {"failure": None, "wall_s": 0.0, "figures": None}
    if limit_s <= 0:
        return outcome | {"failure": "not run: no time was left"}
    command = part.command(options, figures)
    started_s = time.monotonic()
    with log_path.open("w") as log:
        log.write(f"$ {shlex.join(command)}\n")
        log.flush()
        process = subprocess.Popen(
            command, cwd=options.root, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(limit_s)
            outcome["failure"] = None if code == 0 else f"ended with {code}"
        except subprocess.TimeoutExpired:
            outcome["failure"] = f"did not end within {limit_s:.0f} s"
        finally:
            end_group(process)
    outcome["wall_s"] = round(time.monotonic() - started_s, 1)
    if outcome["failure"] is not None:
        outcome["last_lines"] = log_path.read_text(errors="replace").splitlines()[-NUM_LAST_LINES:]
    with contextlib.suppress(OSError, ValueError):
        outcome["figures"] = json.loads(figures.read_text())
    if outcome["figures"] is None and outcome["failure"] is None:
        outcome["failure"] = "wrote no figures"
    return outcome


def end_group(process: "subprocess.Popen[bytes]") -> None:
    """End the process and whatever it started: asked first, then killed."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(KILL_GRACE_S)


def _module(name: str, *arguments: object) -> list[str]:
    return [sys.executable, "-m", name, *map(str, arguments)]


def _kernels(options: Options, figures: Path) -> list[str]:
    folder = options.root / "tests" / "kernels"
    files = [path for path in sorted(folder.glob("test_*.py")) if path.name != NOT_FOR_GPUS]
    if options.is_rehearsal:
        files = [path for path in files if path.name in REHEARSED_KERNELS]
    return _module("gpu_check.pytest_files", "--json", figures, "--jobs", options.num_jobs, *files)


def _parity(options: Options, figures: Path) -> list[str]:
    folder = options.root / "tests" / "shard"
    files = [folder / "test_gpu_parity.py", *([] if options.is_rehearsal else [folder / "test_gpu_execution.py"])]
    flags: list[object] = ["--demo", options.demo] if options.demo else []
    flags += [] if options.is_rehearsal else ["--slow"]
    return _module("gpu_check.pytest_files", "--json", figures, "--jobs", 1, *flags, *files)


def _benchmarks(options: Options, figures: Path) -> list[str]:
    flags = ["--rehearse", *REHEARSED_BENCHMARKS] if options.is_rehearsal else []
    return _module("gpu_check.kernel_benchmarks", "--root", options.root, "--json", figures, *flags)


def _trace(options: Options, figures: Path) -> list[str]:
    flags = ["--decode", "1,32,256", "--mixed", "32+512,32+2000"]
    if options.is_rehearsal:
        flags = [
            "--decode",
            "1,3",
            "--mixed",
            "3+20",
            "--context",
            "20",
            "--steps",
            "10",
            "--traced-steps",
            "4",
            "--dtype",
            "float32",
        ]
        flags += ["--max-step-tokens", "32", "--max-num-sequences", "8", "--max-kv-tokens", "1024"]
    flags += ["--traces", str(options.output / "traces"), "--json", str(figures), *options.trace_flags]
    return _module("text_generation_shard.profiling", options.model, "--load-format", "dummy", *flags)


def _startup(options: Options, figures: Path) -> list[str]:
    kinds = ["--kinds", "cold"] if options.is_rehearsal else []
    return _module("gpu_check.startup", "--json", figures, *kinds, *_server(options))


def _suite(options: Options, figures: Path) -> list[str]:
    bench = ["--bench", options.bench] if options.bench else []
    rehearse = ["--rehearse"] if options.is_rehearsal else []
    return _module("gpu_check.suite", "--json", figures, *rehearse, *bench, *_server(options))


def _memory(options: Options, figures: Path) -> list[str]:
    few = ["--requests", 50] if options.is_rehearsal else []
    return _module("gpu_check.memory", "--json", figures, *few, *_server(options))


def _server(options: Options) -> list[object]:
    """The model, and then the launcher's flags."""
    return ["--model", options.model, "--", *options.server_flags]


PARTS = {
    part.name: part
    for part in (
        Part("kernels", 150, _kernels),
        Part("parity", 120, _parity),
        Part("benchmarks", 120, _benchmarks),
        Part("trace", 120, _trace, needs_model=True),
        Part("startup", 180, _startup, needs_model=True),
        Part("suite", 420, _suite, needs_model=True),
        Part("memory", 300, _memory, needs_model=True),
    )
}
