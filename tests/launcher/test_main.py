"""The command itself, as far as it gets without a model."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(*arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    path = ":".join(str(ROOT / part) for part in ("launcher", "router", "shard"))
    return subprocess.run(
        [sys.executable, "-m", "text_generation_launcher", *arguments],
        env={**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", **variables},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_env_prints_versions_then_goes_on() -> None:
    done = run("--env", QUANTIZE="awq")
    assert done.returncode == 1
    assert f"tokenizers: {importlib.metadata.version('tokenizers')}\n" in done.stderr
    assert "--quantize awq is not available" in done.stderr.splitlines()[-1]
    assert done.stdout == ""


def test_an_unknown_flag_ends_with_code_2() -> None:
    done = run("--no-such-flag")
    assert done.returncode == 2
    assert "--no-such-flag" in done.stderr


def test_no_torch_is_imported_on_the_way() -> None:
    program = (
        "import sys, text_generation_launcher.__main__ as m; print([n for n in ('torch', 'grpc') if n in sys.modules])"
    )
    path = ":".join(str(ROOT / part) for part in ("launcher", "router", "shard"))
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout == "[]\n"
