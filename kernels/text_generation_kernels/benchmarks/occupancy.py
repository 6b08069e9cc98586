"""What a compiled kernel takes of a multiprocessor, and how many of its programs fit on one at the same time.

The multiprocessors are those of NVIDIA's tables of compute capabilities. Works without a GPU.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

NUM_REGISTERS = 65_536
REGISTER_UNIT = 256  # a warp gets a multiple of it
WARP_UNIT = 4  # one for each of the four schedulers
SHARED_UNIT = 128
RESERVED_SHARED_BYTES = 1024  # of each program, for the system


@dataclass(frozen=True)
class Multiprocessor:
    """The limits of one compute capability."""

    shared_bytes: int  # for all programs together
    shared_bytes_per_program: int
    max_warps: int
    max_programs: int


MULTIPROCESSORS = {
    80: Multiprocessor(164 * 1024, 163 * 1024, 64, 32),
    89: Multiprocessor(100 * 1024, 99 * 1024, 48, 24),
    90: Multiprocessor(228 * 1024, 227 * 1024, 64, 32),
}


@dataclass(frozen=True)
class Usage:
    """What one program takes."""

    num_registers: int  # of a thread
    num_spilled_bytes: int  # of a thread, in local memory
    shared_bytes: int
    num_warps: int


def cuobjdump(option: str, cubin: bytes) -> str:
    """What the tool that comes with Triton prints of a kernel's machine code."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout


def usage_of(compiled: Any) -> Usage:
    """Of a kernel that `triton.compile` has compiled."""
    text = cuobjdump("--dump-resource-usage", compiled.asm["cubin"])
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    spilled = found["STACK"] + found["LOCAL"]
    return Usage(found["REG"], spilled, compiled.metadata.shared, compiled.metadata.num_warps)


def programs_per_multiprocessor(usage: Usage, limits: Multiprocessor) -> int:
    """How many run at once; 0: not even one fits."""
    warp_registers = -(-usage.num_registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
    warps = min(NUM_REGISTERS // warp_registers // WARP_UNIT * WARP_UNIT, limits.max_warps)
    shared = -(-usage.shared_bytes // SHARED_UNIT) * SHARED_UNIT + RESERVED_SHARED_BYTES
    return min(warps // usage.num_warps, limits.shared_bytes // shared, limits.max_programs)
