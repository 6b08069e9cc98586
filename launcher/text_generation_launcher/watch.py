"""From the moment the server is ready to its end: replaces shards that are lost, and stops the router when asked."""

import logging
import time

from text_generation_launcher.config import LauncherConfig
from text_generation_launcher.errors import ChildDied, SettingsError
from text_generation_launcher.processes import Child, StopSignal, Supervisor
from text_generation_launcher.router_line import LostGroup, RouterLine
from text_generation_launcher.shard_group import RestartBudget, ShardGroup

_POLL_S = 0.05
# The router is told the same time for running requests; so much later it is killed.
_ROUTER_KILL_GRACE_S = 2.0
# A shard whose socket breaks off has died, or is about to.
_DEATH_S = 1.0
# Shards that lose one of them end by themselves; of the one that was killed the launcher may hear a little later.
_CAUSE_S = 0.5

log = logging.getLogger("text_generation_launcher")


class Watch:
    """The launcher's loop. Shards are replaced while the router drains too: it may still need them."""

    def __init__(
        self, supervisor: Supervisor, group: ShardGroup, router: Child, line: RouterLine, config: LauncherConfig
    ) -> None:
        self._supervisor = supervisor
        self._group = group
        self._router = router
        self._line = line
        self._grace_s = config.graceful_termination_timeout
        self._budget = RestartBudget(config.max_shard_restarts)
        self._is_restarting = False
        self._end_s: float | None = None  # when the router is killed, once it was asked to stop

    def run(self) -> None:
        """Return once the router has ended as asked; raises ChildDied for whatever ends the server unasked."""
        while self._router.is_alive or self._end_s is None:
            event = self._supervisor.next_event(self._timeout_s())
            if isinstance(event, StopSignal):
                self._stop()
            elif isinstance(event, LostGroup):
                self._replace_lost(event)
            elif event is not None and event is self._router and self._end_s is None:
                raise _death(self._router)
            elif event is not None and event in self._group.children:
                self._replace(self._death_of_shards())
            self._look()

    def _timeout_s(self) -> float | None:
        if self._is_restarting:
            return _POLL_S
        return None if self._end_s is None else max(0.0, self._end_s - time.monotonic())

    def _stop(self) -> None:
        """The first signal lets running requests end; the second one ends everything at once."""
        if self._end_s is None:
            log.info("Stopping: the router first, for at most %d s", self._grace_s)
            self._end_s = time.monotonic() + self._grace_s + _ROUTER_KILL_GRACE_S
            self._router.ask_to_end()
        else:
            log.warning("Second signal: ending at once")
            self._supervisor.kill(self._supervisor.children)

    def _look(self) -> None:
        """What is due without an event."""
        if self._end_s is not None and time.monotonic() >= self._end_s:
            self._supervisor.kill([self._router])
        if self._is_restarting and self._group.all_answer():
            self._is_restarting = False
            log.info("The shards answer again")
            self._line.tell_ready(self._group.generation)
        elif self._is_restarting and self._group.is_late():
            self._replace_stuck("The shards did not answer in time.")

    def _replace_lost(self, lost: LostGroup) -> None:
        if lost.generation != self._group.generation:
            return  # replaced already
        if lost.is_stuck:
            self._replace_stuck(f"The shards are stuck: {lost.reason}.")
            return
        deadline_s = time.monotonic() + _DEATH_S
        while time.monotonic() < deadline_s:
            if not all(child.is_alive for child in self._group.children):
                self._replace(self._death_of_shards())
                return
            time.sleep(_POLL_S)
        self._replace(ChildDied(f"The shards cannot be used: {lost.reason}.", []))

    def _death_of_shards(self) -> ChildDied:
        """Why there is no group any more: of those that have ended one that was killed, if there is any."""
        deadline_s = time.monotonic() + _CAUSE_S
        while True:
            ended = [child for child in self._group.children if not child.is_alive]
            killed = [child for child in ended if child.was_killed]
            if killed or len(ended) == len(self._group.children) or time.monotonic() >= deadline_s:
                return _death((killed or ended)[0])
            time.sleep(_POLL_S)

    def _replace_stuck(self, reason: str) -> None:
        log.error("Where the shards are:\n%s", self._group.stacks())
        self._replace(ChildDied(reason, []))

    def _replace(self, death: ChildDied) -> None:
        """Start all shards anew; raises ChildDied when that has been done too often or fails."""
        self._group.end()
        if alive := [child.name for child in self._group.children if child.is_alive]:
            raise ChildDied(f"{death} {', '.join(alive)} cannot be killed.", death.last_lines)
        limit = self._budget.max_restarts
        if not self._budget.take(time.monotonic()):
            if limit:
                times = "once" if limit == 1 else f"{limit} times"
                raise ChildDied(f"{death} The shards were restarted {times} within 10 minutes.", death.last_lines)
            raise death
        log.error("%s", "\n".join([str(death), *death.last_lines]))
        log.warning("Starting the shards again; at most %d times within 10 minutes (--max-shard-restarts)", limit)
        try:
            self._group.start()
        except (SettingsError, OSError) as error:  # their place to meet is taken, or the machine has no more to give
            reason = str(error).removesuffix(".")
            raise ChildDied(f"{death} The shards cannot be started again: {reason}.", death.last_lines) from error
        self._is_restarting = True


def _death(child: Child) -> ChildDied:
    child.read_to_end()
    return ChildDied(f"{child.name} {child.ending()}.", list(child.last_lines))
