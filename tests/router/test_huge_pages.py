"""Memory in huge pages: which mappings are taken, and that the kernel says so too."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest
from text_generation_router.huge_pages import mappings_in_use

MIB = 2**20


def mapping(start: int, end: int, resident: int, permissions: str = "rw-p", inode: int = 0, path: str = "") -> str:
    """As /proc/PID/smaps writes it."""
    return (
        f"{start:x}-{end:x} {permissions} 00000000 00:00 {inode}                  {path}\n"
        f"Size:             {(end - start) // 1024} kB\nKernelPageSize:        4 kB\n"
        f"Rss:              {resident // 1024} kB\nPss:                 0 kB\nVmFlags: rd wr mr mw me ac sd\n"
    )


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (mapping(2 * MIB, 10 * MIB, 8 * MIB, path="[heap]"), [(2 * MIB, 10 * MIB)]),
        (mapping(3 * MIB, 9 * MIB, 6 * MIB), [(4 * MIB, 8 * MIB)]),  # whole huge pages
        (mapping(3 * MIB, 5 * MIB, 2 * MIB), []),  # none is whole
        (mapping(2 * MIB, 12 * MIB, 8 * MIB), [(2 * MIB, 12 * MIB)]),
        (mapping(2 * MIB, 12 * MIB, 8 * MIB - 4096), []),  # less than 80 % of it is in use
        (mapping(2 * MIB, 10 * MIB, 8 * MIB, path="[stack]"), []),
        (mapping(2 * MIB, 10 * MIB, 8 * MIB, permissions="rw-s"), []),
        (mapping(2 * MIB, 10 * MIB, 8 * MIB, inode=7), []),
        (mapping(2 * MIB, 10 * MIB, 8 * MIB, permissions="r--p", inode=7, path="/lib/libc.so"), []),
        (
            mapping(2 * MIB, 4 * MIB, 0) + mapping(8 * MIB, 12 * MIB, 4 * MIB) + mapping(20 * MIB, 22 * MIB, 2 * MIB),
            [(8 * MIB, 12 * MIB), (20 * MIB, 22 * MIB)],
        ),
    ],
)
def test_mappings_in_use(text: str, found: list[tuple[int, int]]) -> None:
    assert list(mappings_in_use(text.splitlines())) == found


PROGRAM = """
import re
from text_generation_router.huge_pages import collapse_memory
def num_huge_kib():
    return int(re.search(r"AnonHugePages: +([0-9]+) kB", open("/proc/self/smaps_rollup").read())[1])
pieces = [bytes([number]) * 4096 for number in range(200)]
kept = [bytearray(pieces[number % 200]) for number in range(10_000)]
before = num_huge_kib()
told = collapse_memory()
assert all(kept[number] == pieces[number % 200] for number in range(10_000))
print(told // 1024, num_huge_kib() - before)
"""


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists()
    or tuple(map(int, platform.release().split(".")[:2])) < (6, 1),
    reason="needs Linux 6.1 with transparent huge pages",
)
def test_the_kernel_holds_as_much_in_huge_pages_as_told() -> None:
    ended = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    told, held = map(int, ended.stdout.split())
    assert told > 0
    assert held >= 0.9 * told
