"""The image's recipe, as far as it can be checked without building it: names, paths, shell, variables."""

import os
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = (ROOT / "deploy" / "Dockerfile").read_text()
ENTRYPOINT = ROOT / "deploy" / "sagemaker-entrypoint.sh"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def instructions(name: str) -> list[str]:
    """The arguments of every instruction of one kind."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE).replace("\\\n", "")
    return [line.split(maxsplit=1)[1] for line in text.splitlines() if line.startswith(f"{name} ")]


def test_what_is_copied_is_there_and_not_ignored():
    copied = [part for line in instructions("COPY") if "--from" not in line for part in line.split()[:-1]]
    sources = [part for part in copied if not part.startswith("--")]
    kept = {line[1:] for line in (ROOT / "deploy/Dockerfile.dockerignore").read_text().split() if line.startswith("!")}
    assert set(sources) == kept
    assert all((ROOT / source).exists() for source in sources)
    assert set(PROJECT["tool"]["setuptools"]["packages"]["find"]["where"]) <= set(sources)


def test_the_shell_in_it_can_be_read():
    for script in (*instructions("RUN"), ENTRYPOINT.read_text()):
        subprocess.run(["sh", "-n", "-c", script], check=True)


def test_it_starts_as_tgis_image_does():
    variables = dict(pair.split("=", 1) for line in instructions("ENV") for pair in shlex.split(line))
    assert variables["HF_HOME"] == "/data"
    assert re.search(r"^ENTRYPOINT \[\"text-generation-launcher\"\]$", DOCKERFILE, re.MULTILINE)
    assert "text-generation-launcher" in PROJECT["project"]["scripts"]
    server = DOCKERFILE.split(" AS server\n")[1].split("\nFROM ")[0]
    assert re.search(r"\bPORT=80\b", server)
    assert DOCKERFILE.rstrip().endswith("\nFROM server"), "what is built without a target"


def test_any_user_can_run_it_and_compile_kernels():
    server = DOCKERFILE.split(" AS server\n")[1].split("\nFROM ")[0]
    variables = dict(pair.split("=", 1) for line in instructions("ENV") for pair in shlex.split(line))
    assert variables["HOME"] == "/tmp"
    assert variables["TRITON_CACHE_DIR"].startswith("/data/")
    assert "chmod 1777 /data" in server
    assert re.search(r"apt-get install .* gcc libc6-dev ", server)
    # The base image has Python's headers; an image of Debian's own Python has none.
    assert re.search(r"^ARG PYTHON=[\d.]+-slim-\w+\n\nFROM python:\$\{PYTHON\} AS build$", DOCKERFILE, re.MULTILINE)
    assert "USER" not in server


def start_on_sagemaker(folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the entry point as SageMaker does, with a launcher that tells what it was given."""
    launcher = folder / "text-generation-launcher"
    launcher.write_text('#!/bin/sh\necho "$@"; env\n')
    launcher.chmod(0o755)
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", **variables}
    return subprocess.run([str(ENTRYPOINT), "serve"], env=environment, capture_output=True, text=True, check=False)


def test_sagemakers_variables_become_ours(tmp_path):
    done = start_on_sagemaker(
        tmp_path, HF_MODEL_ID="org/model", HF_MODEL_REVISION="v1", SM_NUM_GPUS="2", MAX_INPUT_TOKENS="100"
    )
    arguments, *lines = done.stdout.splitlines()
    assert arguments == "--port 8080", "not SageMaker's own argument"
    given = dict(line.split("=", 1) for line in lines)
    assert given["MODEL_ID"] == "org/model"
    assert given["REVISION"] == "v1"
    assert given["NUM_SHARD"] == "2"
    assert given["MAX_INPUT_TOKENS"] == "100"
    assert not {"QUANTIZE", "TRUST_REMOTE_CODE"} & given.keys(), "unset stays unset"


@pytest.mark.parametrize(
    ("theirs", "ours"), [("HF_MODEL_QUANTIZE", "QUANTIZE"), ("HF_MODEL_TRUST_REMOTE_CODE", "TRUST_REMOTE_CODE")]
)
def test_variables_that_the_launcher_refuses_reach_it(tmp_path, theirs, ours):
    done = start_on_sagemaker(tmp_path, HF_MODEL_ID="m", **{theirs: "true"})
    assert f"{ours}=true" in done.stdout.splitlines()


def test_a_missing_model_is_said(tmp_path):
    done = start_on_sagemaker(tmp_path)
    assert done.returncode == 1
    assert "HF_MODEL_ID" in done.stderr
