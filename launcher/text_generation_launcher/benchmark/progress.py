"""The live line on standard error while a load runs."""

import asyncio
import time
from collections.abc import Sequence
from typing import TextIO

from text_generation_launcher.benchmark.client import Record

TERMINAL_INTERVAL_S = 0.5
FILE_INTERVAL_S = 10.0


class Progress:
    """Shows how far a load is: on one line of a terminal, or now and then a line in a file."""

    def __init__(self, name: str, stream: TextIO | None) -> None:
        self._name = name
        self._stream = stream
        self._is_terminal = stream is not None and stream.isatty()

    async def watch(self, records: Sequence[Record]) -> None:
        """Show the state of `records` until cancelled."""
        started_s = time.monotonic()
        try:
            while True:
                await asyncio.sleep(TERMINAL_INTERVAL_S if self._is_terminal else FILE_INTERVAL_S)
                self._show(describe(self._name, records, time.monotonic() - started_s))
        finally:
            self._clear()

    def _show(self, line: str) -> None:
        if self._stream is not None:
            self._stream.write(f"\r\x1b[K{line}" if self._is_terminal else f"{line}\n")
            self._stream.flush()

    def _clear(self) -> None:
        if self._stream is not None and self._is_terminal:
            self._stream.write("\r\x1b[K")
            self._stream.flush()


def describe(name: str, records: Sequence[Record], elapsed_s: float) -> str:
    """One line: requests done, open and failed, events read a second."""
    done = sum(record.end_ns > 0 for record in records)
    started = sum(record.start_ns > 0 for record in records)
    failed = sum(record.error is not None for record in records)
    events = sum(len(record.times_ns) for record in records)
    return (
        f"{name}: {done}/{len(records)} done, {started - done} open, {failed} failed, "
        f"{events / max(elapsed_s, 1e-9):.0f} events/s, {elapsed_s:.0f} s"
    )
