"""The line to the launcher, which starts the shards: tells it that a group of them is lost, hears of the next one.

Both ends of a socket write JSON objects, one a line. The router {"lost": GENERATION, "reason": TEXT, "is_stuck": BOOL},
the launcher {"generation": N} once all ranks of the group N answer; groups count from 1, and the first one is not told.
When the launcher closes the line, no further group will come.
"""

import asyncio
import json
import logging
import socket

logger = logging.getLogger(__name__)


class NoMoreShards(Exception):
    """The launcher has given up, or there is none."""


class LauncherLink:
    """The router's end; used from its event loop."""

    def __init__(self) -> None:
        self._generation = 1
        self._is_open = False
        self._changed = asyncio.Event()
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None

    async def open(self, descriptor: int | None) -> None:
        """Use the inherited socket; without one, no further group will ever come."""
        if descriptor is None:
            return
        line = socket.socket(fileno=descriptor)
        line.set_inheritable(False)
        reader, self._writer = await asyncio.open_connection(sock=line)
        self._is_open = True
        self._reading = asyncio.create_task(self._read(reader))

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            async for message in reader:
                self._generation = int(json.loads(message)["generation"])
                self._changed.set()
        except OSError as error:
            logger.warning("The line to the launcher broke: %s", error)
        finally:
            self._is_open = False
            self._changed.set()

    def report_lost(self, generation: int, reason: str, is_stuck: bool) -> None:
        """Tell that a group cannot be used any more; `is_stuck`: its processes may still run."""
        if self._writer is not None:
            message = {"lost": generation, "reason": reason, "is_stuck": is_stuck}
            self._writer.write(json.dumps(message).encode() + b"\n")

    async def next_generation(self, after: int) -> int:
        """Wait for a later group than this one; raises NoMoreShards when none will come."""
        while self._generation <= after:
            if not self._is_open:
                raise NoMoreShards
            self._changed.clear()
            await self._changed.wait()
        return self._generation

    async def close(self) -> None:
        """Let go of the line."""
        if self._reading is not None and self._writer is not None:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)
            self._writer.close()
