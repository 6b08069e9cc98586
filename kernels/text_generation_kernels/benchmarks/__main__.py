"""Runs benchmarks, prints a table and writes JSON. `--tiny --cpu` rehearses them under Triton's interpreter."""

import argparse
import json
import os
import pkgutil
from pathlib import Path

PREFIX = "bench_"


def main() -> None:
    """Parse the command, and only then import what reads TRITON_INTERPRET."""
    folder = str(Path(__file__).parent)
    operations = [module.name for module in pkgutil.iter_modules([folder]) if module.name.startswith(PREFIX)]
    operations = sorted(name.removeprefix(PREFIX) for name in operations)
    parser = argparse.ArgumentParser(prog="python -m text_generation_kernels.benchmarks", description=__doc__)
    parser.add_argument(
        "operations", nargs="*", metavar="OPERATION", help=f"of {', '.join(operations)}; all by default"
    )
    parser.add_argument("--json", type=Path, help="write the measurements to this file")
    parser.add_argument("--tiny", action="store_true", help="the smallest sizes")
    parser.add_argument("--cpu", action="store_true", help="under Triton's interpreter; its times mean nothing")
    arguments = parser.parse_args()
    if unknown := set(arguments.operations) - set(operations):
        parser.error(f"no such operation: {', '.join(sorted(unknown))}")
    if arguments.cpu:
        os.environ["TRITON_INTERPRET"] = "1"
    run(arguments.operations or operations, arguments.cpu, arguments.tiny, arguments.json)


def run(operations: list[str], on_cpu: bool, is_tiny: bool, report: Path | None) -> None:
    """Measure the GPU, then each operation."""
    import dataclasses
    import importlib

    import torch

    from text_generation_kernels.benchmarks import harness

    if not on_cpu and not torch.cuda.is_available():
        raise SystemExit("no GPU; --tiny --cpu rehearses without one")
    bench = harness.Bench(torch.device("cpu" if on_cpu else "cuda:0"), is_tiny)
    roofs = harness.measure_roofs(bench)
    name = "cpu" if on_cpu else torch.cuda.get_device_name()
    print(f"{name}: copy {roofs.copy_bytes_per_s / 1e9:.0f} GB/s, matmul {roofs.matmul_flops_per_s / 1e12:.0f} TFLOP/s")
    measurements = []
    for operation in operations:
        module = importlib.import_module(f"text_generation_kernels.benchmarks.{PREFIX}{operation}")
        measurements += harness.measure_all(operation, module.cases(bench), roofs, bench)
    if report is not None:
        rows = [dataclasses.asdict(row) for row in measurements]
        report.write_text(json.dumps({"device": name, **dataclasses.asdict(roofs), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
