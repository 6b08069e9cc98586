"""Runs each operation's benchmark in a process of its own: a kernel that breaks the GPU's context takes one along."""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

FOLDER = Path("kernels", "text_generation_kernels", "benchmarks")
PREFIX = "bench_"


def operations_of(root: Path) -> list[str]:
    """All that have a benchmark."""
    return sorted(path.stem.removeprefix(PREFIX) for path in (root / FOLDER).glob(f"{PREFIX}*.py"))


def run_operation(operation: str, flags: list[str]) -> dict[str, Any] | None:
    """Its report; None when it failed, with its output printed."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name, "report.json")
        command = [sys.executable, "-m", "text_generation_kernels.benchmarks", operation, "--json", str(path), *flags]
        ended = subprocess.run(command, check=False)
        if ended.returncode or not path.exists():
            return None
        report: dict[str, Any] = json.loads(path.read_text())
        return report


def main() -> int:
    """0 when every operation was measured."""
    parser = argparse.ArgumentParser(prog="gpu_check.kernel_benchmarks", description=__doc__)
    parser.add_argument("operations", nargs="*")
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--rehearse", action="store_true", help="under Triton's interpreter")
    arguments = parser.parse_args()
    flags = ["--tiny", "--cpu"] if arguments.rehearse else []
    figures: dict[str, Any] = {"roofs": [], "rows": [], "failed": []}
    for operation in arguments.operations or operations_of(arguments.root):
        report = run_operation(operation, flags)
        if report is None:
            figures["failed"].append(operation)
        else:
            figures["rows"] += report.pop("rows")
            figures["roofs"].append({"operation": operation, **report})
        arguments.json.write_text(json.dumps(figures, indent=1))
    return 1 if figures["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
