"""Where the time from process start to ready went: consecutive phases, so that they add up to the total."""

import os
import time
from pathlib import Path


class Timeline:
    """Phases in the order they ended; each begins where the one before ended."""

    def __init__(self, started_s: float | None = None) -> None:
        self._started_s = process_start_s() if started_s is None else started_s
        self._last_s = self._started_s
        self.phases: list[tuple[str, float]] = []

    def end_phase(self, name: str) -> None:
        """Book the time since the last phase under `name`."""
        now_s = time.monotonic()
        self.phases.append((name, now_s - self._last_s))
        self._last_s = now_s

    @property
    def total_s(self) -> float:
        """From the start of the process to the end of the last phase."""
        return self._last_s - self._started_s

    def __str__(self) -> str:
        return ", ".join(f"{name} {seconds:.2f} s" for name, seconds in self.phases)


def process_start_s() -> float:
    """When this process started, on the monotonic clock; now, where the system does not tell."""
    now_s = time.monotonic()
    try:
        # The 22nd field, in clock ticks since boot; the command name before it may hold spaces.
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return now_s
    return now_s - age_s if 0 <= age_s < 3600 else now_s
