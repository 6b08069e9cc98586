"""All shards of one model: started together, and replaced together when one of them dies or is stuck."""

import dataclasses
import json
import logging
import time
from collections import deque
from collections.abc import Mapping, Sequence

from text_generation_shard.config import ShardConfig

from text_generation_launcher.places import Places, answers, listen_for_shards
from text_generation_launcher.processes import Child, Supervisor

RESTART_WINDOW_S = 600.0
# A later start may take so much longer than the first: the router, and other processes, use the machine by then.
START_FACTOR = 5.0
START_GRACE_S = 60.0
# How long a rank may take to write down where it is.
STACKS_S = 1.0

log = logging.getLogger("text_generation_launcher")


class RestartBudget:
    """How often the shards may be restarted: so many times within any ten minutes."""

    def __init__(self, max_restarts: int) -> None:
        self.max_restarts = max_restarts
        self._restarts_s: deque[float] = deque()

    def take(self, now_s: float) -> bool:
        """Whether one more is allowed now; then it counts."""
        while self._restarts_s and now_s - self._restarts_s[0] >= RESTART_WINDOW_S:
            self._restarts_s.popleft()
        if len(self._restarts_s) >= self.max_restarts:
            return False
        self._restarts_s.append(now_s)
        return True


class ShardGroup:
    """The processes of all ranks; `generation` counts how often they were started."""

    def __init__(
        self,
        supervisor: Supervisor,
        places: Places,
        command: Sequence[str],
        environment: Mapping[str, str],
        config: ShardConfig,
        master_port: int | None,
    ) -> None:
        """`config` is rank 0's, the others differ by their rank alone; `master_port` None: a free one each time."""
        self.generation = 0
        self.children: list[Child] = []
        self._supervisor = supervisor
        self._places = places
        self._command = command
        self._environment = environment
        self._config = config
        self._master_port = master_port
        self._silent = list(places.sockets)
        self._started_s = 0.0
        self._first_start_s = 0.0  # how long the first start took

    def start(self) -> None:
        """Start every rank; whoever ran before has ended."""
        self.generation += 1
        self._started_s = time.monotonic()
        self._silent = list(self._places.sockets)
        self.children = []
        for path in self._silent:
            path.unlink(missing_ok=True)
        config = self._config
        if config.world_size == 1:
            self._spawn(config)
            return
        with listen_for_shards(config.master_addr, self._master_port) as listener:
            # Rank 0 inherits the socket at which all of them meet.
            config = dataclasses.replace(config, master_port=listener.getsockname()[1])
            log.info("The shards meet at %s:%d", config.master_addr, config.master_port)
            self._spawn(dataclasses.replace(config, master_listen_fd=listener.fileno()))
            for rank in range(1, config.world_size):
                self._spawn(dataclasses.replace(config, rank=rank))

    def _spawn(self, config: ShardConfig) -> None:
        command = [*self._command, "--config-json", json.dumps(dataclasses.asdict(config))]
        inherited = () if config.master_listen_fd is None else (config.master_listen_fd,)
        self.children.append(
            self._supervisor.spawn(f"shard-{config.rank}", command, self._environment, pass_fds=inherited)
        )

    def all_answer(self) -> bool:
        """Whether every rank listens on its socket."""
        self._silent = [path for path in self._silent if not answers(path)]
        if not self._silent and not self._first_start_s:
            self._first_start_s = time.monotonic() - self._started_s
        return not self._silent

    def is_late(self) -> bool:
        """Whether this start takes so long that it will not end well."""
        allowed_s = START_GRACE_S + START_FACTOR * self._first_start_s
        return self._first_start_s > 0 and time.monotonic() - self._started_s > allowed_s

    def end(self) -> None:
        """Kill every rank: of a lost group none can go on, and it holds no request."""
        self._supervisor.kill(self.children)

    def stacks(self) -> str:
        """Where each rank is, as far as it can still tell; takes about a second."""
        for child in self.children:
            child.ask_for_stacks()
        time.sleep(STACKS_S)
        return "\n".join(f"{child.name}:\n{child.take_stacks()}" for child in self.children)
