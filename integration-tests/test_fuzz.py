"""Bodies made by schemathesis from the server's own document: no 5xx, nothing that the document does not describe."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from conftest import Server

SCHEMATHESIS = Path(sys.prefix, "clients", "bin", "schemathesis")
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
NOT_OFFERED = ("/v1/responses", "/v1/embeddings")  # their 501 is what the document says


@pytest.fixture(scope="module")
def small(serve: Any, tiny_model: Path) -> Iterator[Server]:
    with serve("--model-id", str(tiny_model), "--dtype", "float32", "--max-total-tokens", "64") as server:
        yield server


def fuzz(server: Server, folder: Path, phases: str, num_examples: int, timeout_s: float) -> int:
    """Run it; gives the number of cases."""
    assert SCHEMATHESIS.exists(), f"{SCHEMATHESIS} is missing: run `make install`"
    command = [str(SCHEMATHESIS), "run", f"{server.url}/api-doc/openapi.json", "--checks", CHECKS]
    command += ["--phases", phases, "--max-examples", str(num_examples), "--seed", "1", "--no-color"]
    command += ["--request-timeout", "30", "--suppress-health-check", "all", "--workers", "2"]
    for path in NOT_OFFERED:
        command += ["--exclude-path", path]
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder), "NO_PROXY": "*"}
    done = subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, timeout=timeout_s, check=False
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert server.get("/health").status == 200
    server.wait_idle()
    cases = re.search(r"([\d,]+) generated", done.stdout)
    assert cases is not None, done.stdout[-2000:]
    return int(cases[1].replace(",", ""))


def test_some_bodies(small: Server, tmp_path: Path) -> None:
    assert fuzz(small, tmp_path, "examples,fuzzing", 12, timeout_s=200) >= 100


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_many_bodies(small: Server, tmp_path: Path) -> None:
    assert fuzz(small, tmp_path, "examples,coverage,fuzzing", 400, timeout_s=1100) >= 5000
