"""Writes docs/kernels.md: what each compiled kernel takes of a GPU. `python tests/kernels/machine_code_table.py`."""

import sys
from pathlib import Path

import test_compile
import triton
from text_generation_kernels.benchmarks.occupancy import MULTIPROCESSORS, programs_per_multiprocessor, usage_of

ROOT = Path(__file__).resolve().parent.parent.parent
GPU_NAMES = {"a100": "A100, sm_80", "ada": "RTX 4090 / L40, sm_89", "h100": "H100, sm_90", "h200": "H200, sm_90"}
PREFACE = """# The kernels' machine code

Written by `python tests/kernels/machine_code_table.py`, which leaves the tables of other versions of Triton than its
own as they are: every kernel in bfloat16, at the sizes of Llama 3.1 8B, with its entry of the launch table, compiled
without a GPU. Registers and spills (bytes in local memory) are those of a thread, shared memory that of a program. The
last two columns follow from them: how many programs run on a multiprocessor at once, and which share of the warps that
it can hold they are. H200 has rows of its own only where its entry differs from the H100's.
`tests/kernels/test_compile.py` asserts the same of float16 and float32: what is asked for fits, 16-bit kernels spill
nothing, attention of prompts on sm_90 uses wgmma, float32 products are IEEE's, kernels bound by memory load 16 bytes at
a time, and as many programs of attention fit as the launch table counts on.
"""
HEAD = """
| kernel | GPU | warps | registers | spills | shared, KiB | programs | occupancy |
|---|---|---|---|---|---|---|---|
"""
PATH = ROOT / "docs" / "kernels.md"
SECTION = "\n## triton "


def main() -> None:
    lines = []
    for case, gpu_class in test_compile.cases_of("bf16"):
        usage = usage_of(test_compile.compile_case(case, gpu_class))
        limits = MULTIPROCESSORS[test_compile.CAPABILITIES[gpu_class]]
        programs = programs_per_multiprocessor(usage, limits)
        lines.append(
            f"| {case.full_name} | {GPU_NAMES[gpu_class]} | {usage.num_warps} | {usage.num_registers} |"
            f" {usage.num_spilled_bytes} | {usage.shared_bytes / 1024:.1f} | {programs} |"
            f" {programs * usage.num_warps / limits.max_warps:.0%} |\n"
        )
    sections = [text.partition("\n")[::2] for text in PATH.read_text().split(SECTION)[1:]]
    tables = dict(sections) | {triton.__version__: HEAD + "".join(lines)}
    PATH.write_text(PREFACE + "".join(f"{SECTION}{version}\n{table}" for version, table in sorted(tables.items())))


if __name__ == "__main__":
    sys.exit(main())
