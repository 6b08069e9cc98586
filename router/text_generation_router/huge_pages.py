"""Huge pages for the memory that the router keeps from its start to its end: the tokenizer, the modules, the buffers.

A request after a pause touches some thousand pages of them. Small ones cost misses of the address cache; and on a
virtual machine whose host watches which pages are in use, 10 us each once nobody has touched them for a second.
"""

import ctypes
import errno
import logging
import os
import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

logger = logging.getLogger(__name__)

HUGE_PAGE_BYTES = 2 * 2**20
# A mapping of which less is in use would come to hold more memory.
MIN_SHARE_IN_USE = 0.8
# Where memory is short or in pieces, the kernel makes room for page after page.
MAX_TIME_S = 1.0
_MADV_COLLAPSE = 25  # Linux 6.1 and later
_HEADER = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S+) \S+ \S+ (\d+) *(.*)")
_RESIDENT = re.compile(r"Rss: +(\d+) kB")


def collapse_memory() -> int:
    """Bring the process's memory in use into huge pages, where the system can; the number of bytes that lie in them.

    Takes some 6 ms for each page of 2 MiB (a slow 2-core virtual machine), a second at most; without Python's lock, but
    what maps memory or touches new pages waits for the page under way. Resident memory grows by a quarter at most.
    """
    end_s = time.monotonic() + MAX_TIME_S
    try:
        lines = Path("/proc/self/smaps").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:  # no Linux
        return 0
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    num_bytes, why = 0, "all that is in use"
    for address in (page for start, end in mappings_in_use(lines) for page in range(start, end, HUGE_PAGE_BYTES)):
        if time.monotonic() > end_s:
            why = "no time was left for more"
            break
        if madvise(address, HUGE_PAGE_BYTES, _MADV_COLLAPSE) == 0:
            num_bytes += HUGE_PAGE_BYTES
        elif ctypes.get_errno() != errno.EAGAIN:  # which is of that page alone
            why = f"then: {os.strerror(ctypes.get_errno())}"
            break
    logger.info("%d MiB in huge pages, %s", num_bytes // 2**20, why)
    return num_bytes


def mappings_in_use(smaps: Iterable[str]) -> Iterator[tuple[int, int]]:
    """Start and end, in whole huge pages, of the private writable mappings of no file that are mostly in use."""
    start = end = 0
    for line in smaps:
        if header := _HEADER.fullmatch(line.rstrip()):
            is_memory = header[3] == "rw-p" and header[4] == "0" and header[5] in ("", "[heap]")
            start, end = (int(header[1], 16), int(header[2], 16)) if is_memory else (0, 0)
        elif (resident := _RESIDENT.match(line)) and int(resident[1]) * 1024 >= MIN_SHARE_IN_USE * (end - start):
            first, last = -(-start // HUGE_PAGE_BYTES), end // HUGE_PAGE_BYTES
            if first < last:
                yield first * HUGE_PAGE_BYTES, last * HUGE_PAGE_BYTES
