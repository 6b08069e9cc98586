"""The launcher's end of the line to the router, which hears of lost shards first and must be told of new ones.

Both ends of a socket write JSON objects, one a line. The router {"lost": GENERATION, "reason": TEXT, "is_stuck": BOOL},
the launcher {"generation": N} once all shards of the group N answer; groups count from 1, and the first one is not
told. Closed by the launcher, it means that no further group will come.
"""

import contextlib
import json
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class LostGroup:
    """The router cannot use a group of shards any more; if it `is_stuck`, the processes may still run."""

    generation: int
    reason: str
    is_stuck: bool


class RouterLine:
    """A pair of sockets: one for the router to inherit, one for the launcher, read by a thread."""

    def __init__(self, on_lost: Callable[[LostGroup], None]) -> None:
        self._on_lost = on_lost
        self._own, self._routers = socket.socketpair()

    @property
    def router_descriptor(self) -> int:
        """What the router inherits."""
        return self._routers.fileno()

    def start(self) -> None:
        """Listen, once the router has been started."""
        self._routers.close()
        threading.Thread(target=self._read, name="router-line", daemon=True).start()

    def _read(self) -> None:
        with contextlib.suppress(OSError), self._own.makefile("rb") as messages:
            for message in messages:
                fields = json.loads(message)
                self._on_lost(LostGroup(fields["lost"], fields["reason"], fields["is_stuck"]))

    def tell_ready(self, generation: int) -> None:
        """Say that this group answers."""
        with contextlib.suppress(OSError):  # the router is gone, as the supervisor will see
            self._own.sendall(json.dumps({"generation": generation}).encode() + b"\n")

    def close(self) -> None:
        """Say that no group will come any more."""
        self._routers.close()
        with contextlib.suppress(OSError):
            self._own.shutdown(socket.SHUT_RDWR)
        self._own.close()
