"""Python's search for reference cycles, at times when it keeps nobody waiting.

Left alone it runs in the middle of steps: 3 % of the CPU time under load and pauses of up to 110 ms, measured with a
thousand requests on the 2-core machine.
"""

import ctypes
import gc
import time

# So many new objects take 1 to 2 ms.
NUM_YOUNG_OBJECTS = 20_000
# A loop that never rests is interrupted after so many.
NUM_URGENT_OBJECTS = 200_000
# Of collections of young objects, every n-th looks at those that the last few left over as well.
SECOND_GENERATION_EVERY = 10
# A server that is never idle looks at everything so often.
FULL_INTERVAL_S = 600.0
# glibc's; other C libraries have none. It gives the system the free pages between blocks in use, which free() keeps.
_malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)


class GarbageCollection:
    """Decides when; one for each process."""

    def __init__(self) -> None:
        self._num_collections = 0
        self._num_since_full = 0
        self._full_s = time.monotonic()
        self._holds_free_memory = False  # which an idle server does not need

    def take_over(self) -> None:
        """Collect, keep what stands now out of all later collections, and switch Python's own timing off."""
        gc.collect()
        gc.freeze()
        gc.disable()

    def collect_young(self, is_resting: bool) -> None:
        """Collect if there are many new objects; `is_resting`: nothing else is to be done now."""
        if gc.get_count()[0] < (NUM_YOUNG_OBJECTS if is_resting else NUM_URGENT_OBJECTS):
            return
        self._num_collections += 1
        self._num_since_full += 1
        gc.collect(0 if self._num_collections % SECOND_GENERATION_EVERY else 1)

    def collect_all(self, is_idle: bool) -> None:
        """Collect everything if the server has just become idle, or has not been for long.

        At a later call that finds it idle, the free memory goes back to the system.
        """
        now_s = time.monotonic()
        if self._num_since_full and (is_idle or now_s - self._full_s > FULL_INTERVAL_S):
            gc.collect()
            self._num_since_full = 0
            self._full_s = now_s
            self._holds_free_memory = True
        elif is_idle and self._holds_free_memory:
            if _malloc_trim is not None:
                _malloc_trim(0)
            self._holds_free_memory = False
