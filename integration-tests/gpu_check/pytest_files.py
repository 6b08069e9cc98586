"""Runs files of tests, several at once, each in a pytest of its own: compiling kernels keeps a core busy."""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

MAX_TEXT = 2000


def run_file(path: Path, flags: list[str]) -> dict[str, Any]:
    """What became of one file's tests."""
    started_s = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        report = Path(name, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        ended = subprocess.run(
            [*command, f"--junitxml={report}", *flags, str(path)], capture_output=True, text=True, check=False
        )
        row = {"name": path.stem, "code": ended.returncode, "wall_s": round(time.monotonic() - started_s, 1)}
        if not report.exists():
            return {**row, "tests": 0, "skipped": 0, "failures": [{"name": "pytest", "text": last(ended.stdout)}]}
        return {**row, **outcomes(report)}


def outcomes(report: Path) -> dict[str, Any]:
    """Counts and failures, and why tests were skipped, from a JUnit report."""
    cases = list(ElementTree.parse(report).iter("testcase"))
    failures, reasons = [], set()
    for case in cases:
        for kind in ("failure", "error"):
            if (found := case.find(kind)) is not None:
                failures.append({"name": str(case.get("name")), "text": last(found.text or "")})
        if (found := case.find("skipped")) is not None:
            reasons.add(str(found.get("message")))
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {"tests": len(cases), "skipped": skipped, "skip_reasons": sorted(reasons), "failures": failures}


def last(text: str) -> str:
    """Its end, where what went wrong stands."""
    return text[-MAX_TEXT:]


def main() -> int:
    """0 when every file's tests passed and there were any."""
    parser = argparse.ArgumentParser(prog="gpu_check.pytest_files", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--demo", type=Path, help="the demo model's weights")
    parser.add_argument("--slow", action="store_true", help="longer forms too")
    arguments = parser.parse_args()
    flags = [] if arguments.slow else ["-m", "not slow"]
    flags += ["--demo-weights", str(arguments.demo)] if arguments.demo else []
    rows: list[dict[str, Any]] = []
    lock = threading.Lock()

    def run(path: Path) -> None:
        row = run_file(path, flags)
        with lock:
            rows.append(row)
            print(f"{row['name']}: {row['tests']} tests, {len(row['failures'])} failed, {row['wall_s']} s", flush=True)
            arguments.json.write_text(json.dumps({"files": rows}, indent=1))

    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(run, arguments.files))
    for failure in [failure for row in rows for failure in row["failures"]]:
        print(f"--- {failure['name']}\n{failure['text']}")
    return 0 if all(row["code"] == 0 for row in rows) and sum(row["tests"] - row["skipped"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
