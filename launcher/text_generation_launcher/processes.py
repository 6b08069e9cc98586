"""Spawns, watches and stops the children. Knows no model and no flag.

What a child can rely on, and what it must do:

- Standard input is a pipe that the launcher never writes to. End of file means that the launcher is gone: the
  child sends itself SIGTERM and, if it still runs 1.5 s later, removes the run folder and exits
  (`parent_watch.watch_parent(run_folder)` of router and shard, to be called first thing).
- The environment holds TEXT_GENERATION_LAUNCHER_PID, by which a child knows that a launcher started it.
- All children are in one process group, led by the guardian (guardian.py), so a terminal's Ctrl-C reaches the
  launcher alone. When the launcher is gone the guardian kills what is left of the group and removes the run folder
  and the sockets.
- Standard output and standard error are the log: one JSON record a line. A child whose output is an answer (`answers`)
  has only standard error for that.
- SIGTERM means: finish and exit with 0. Whoever exits unasked, with whatever code, has died.
- SIGUSR1 means: write where every thread is to the log, if that can be known (shards).
"""

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, NoReturn, Self

from text_generation_launcher.errors import ChildDied
from text_generation_launcher.logs import LogWriter
from text_generation_launcher.router_line import LostGroup

LAUNCHER_PID_VARIABLE = "TEXT_GENERATION_LAUNCHER_PID"
KILL_GRACE_S = 5.0
_KILL_WAIT_S = 20.0
_POLL_S = 0.05
_NUM_LAST_LINES = 20
_MAX_LINE_BYTES = 1 << 20


class StopRequested(Exception):
    """The user asked the server to stop (SIGTERM or SIGINT)."""


class Child:
    """One child process, with the threads that read its output and wait for its end."""

    def __init__(self, name: str, process: "subprocess.Popen[bytes]", writer: LogWriter, answers: bool) -> None:
        self.name = name
        self.process = process
        self.answer = b""
        self.last_lines: deque[str] = deque(maxlen=_NUM_LAST_LINES)
        self._is_asked_to_end = False
        self._stacks: list[str] | None = None  # lines of them, while they are asked for
        self._writer = writer
        assert process.stdout is not None
        pipes: list[tuple[Callable[[IO[bytes]], None], IO[bytes]]] = [(self._read_log, process.stdout)]
        if answers:
            assert process.stderr is not None
            pipes = [(self._read_log, process.stderr), (self._read_answer, process.stdout)]
        self._readers = [
            threading.Thread(target=read, args=(pipe,), name=f"{name}-output", daemon=True) for read, pipe in pipes
        ]
        for reader in self._readers:
            reader.start()

    def _read_log(self, pipe: IO[bytes]) -> None:
        with pipe:
            while line := pipe.readline(_MAX_LINE_BYTES):
                text = line.decode("utf-8", "replace").rstrip()
                if (stacks := self._stacks) is not None and not text.startswith("{"):
                    stacks.append(text)
                elif text:
                    self.last_lines += self._writer.write_child_line(self.name, text)

    def _read_answer(self, pipe: IO[bytes]) -> None:
        with pipe:
            self.answer = pipe.read()

    @property
    def is_alive(self) -> bool:
        """Whether the process has not ended yet."""
        return self.process.returncode is None

    @property
    def was_killed(self) -> bool:
        """Whether a signal has ended the process."""
        return self.process.returncode is not None and self.process.returncode < 0

    def read_to_end(self, timeout_s: float = 1.0) -> None:
        """Wait for the rest of the output; bounded, since a descendant may hold the pipe open."""
        for reader in self._readers:
            reader.join(timeout_s)

    def close(self) -> None:
        """Let go of the ended process's input, after the last of its output."""
        self.read_to_end()
        assert self.process.stdin is not None
        self.process.stdin.close()

    def send(self, number: signal.Signals) -> None:
        """Send a signal; without effect once the process has ended."""
        self.process.send_signal(number)

    def ask_to_end(self) -> None:
        """Send SIGTERM, once: to a second one a router answers by ending at once, in the middle of its streams."""
        if not self._is_asked_to_end:
            self._is_asked_to_end = True
            self.send(signal.SIGTERM)

    def ask_for_stacks(self) -> None:
        """Have the process write where its threads are; `take_stacks` a moment later has the text."""
        self._stacks = []
        self.send(signal.SIGUSR1)

    def take_stacks(self) -> str:
        """What the process wrote since it was asked, or why it did not."""
        stacks, self._stacks = self._stacks, None
        if stacks:
            return "\n".join(stacks)
        return f"no answer: {self.ending() if not self.is_alive else f'the process is {self._state()}'}"

    def _state(self) -> str:
        """What the kernel says of a process that has not ended."""
        try:
            lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        except OSError:
            return "gone"
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("State:"))

    def ending(self) -> str:
        """How the process ended, in words."""
        code = self.process.returncode
        if code is None or code >= 0:
            return f"ended with exit code {code}"
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"number {-code}"
        hint = "; the system kills so when memory runs out" if -code == signal.SIGKILL else ""
        return f"was ended by signal {name}{hint}"


class StopSignal:
    """SIGTERM or SIGINT has come."""


# What happens to a server: a signal, the end of a child, word from the router.
Event = StopSignal | Child | LostGroup


class Supervisor:
    """Owns the children and the guardian from the first spawn to the last wait.

    Use as a context manager, in the main thread: signal handlers are in place inside it, and no child is left after it.
    `leftovers` are the paths the guardian removes if the launcher cannot.
    """

    def __init__(self, writer: LogWriter, leftovers: Sequence[Path]) -> None:
        self._writer = writer
        self._leftovers = leftovers
        self.children: list[Child] = []
        # SimpleQueue.put is reentrant, so signal handlers may call it.
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._guardian: subprocess.Popen[bytes] | None = None
        self._old_handlers: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._old_handlers[number] = signal.signal(number, self._on_signal)
        script = str(Path(__file__).with_name("guardian.py"))
        self._guardian = subprocess.Popen(
            [sys.executable, "-I", "-S", script, *map(str, self._leftovers)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            process_group=0,
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._kill_and_wait(self.children)
        if self._guardian is not None:
            os.killpg(self._guardian.pid, signal.SIGKILL)  # the children's descendants with it
            self._guardian.wait()
            assert self._guardian.stdin is not None
            self._guardian.stdin.close()
        for child in self.children:
            child.close()
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._events.put(StopSignal())

    def post(self, event: Event) -> None:
        """Queue an event; from any thread."""
        self._events.put(event)

    def next_event(self, timeout_s: float | None) -> Event | None:
        """The next event; None when there is none for so long."""
        try:
            return self._events.get(timeout=timeout_s)
        except queue.Empty:
            return None

    def spawn(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        *,
        answers: bool = False,
        pass_fds: Sequence[int] = (),
    ) -> Child:
        """Start a child, which inherits `pass_fds`. With `answers`, its standard output is kept instead of logged."""
        assert self._guardian is not None
        process = subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if answers else subprocess.STDOUT,
            env={**environment, LAUNCHER_PID_VARIABLE: str(os.getpid())},
            process_group=self._guardian.pid,
            pass_fds=pass_fds,
        )
        child = Child(name, process, self._writer, answers)
        self.children.append(child)
        threading.Thread(target=self._await_end, args=(child,), name=f"{name}-end", daemon=True).start()
        return child

    def _await_end(self, child: Child) -> None:
        child.process.wait()
        self._events.put(child)

    def wait_until(
        self, is_ready: Callable[[], bool], on_wait: Callable[[], None] | None = None, on_wait_every_s: float = 10.0
    ) -> None:
        """Return once `is_ready()`; raises ChildDied or StopRequested if that comes first."""
        next_report_s = time.monotonic() + on_wait_every_s
        while not is_ready():
            if (event := self.next_event(_POLL_S)) is not None:
                self._raise_for(event)
            if on_wait is not None and time.monotonic() >= next_report_s:
                on_wait()
                next_report_s += on_wait_every_s

    def wait_for_answer(self, child: Child) -> bytes:
        """The output of a child that answers, once it has ended; its exit code is the caller's to judge."""
        event = self._events.get()
        if event is not child:
            self._raise_for(event)
        child.read_to_end(timeout_s=10.0)
        return child.answer

    def kill(self, children: Sequence[Child]) -> None:
        """End children at once and forget them; their ends are events still."""
        self._kill_and_wait(children)
        for child in children:
            child.close()
        self.children = [child for child in self.children if child not in children]

    def stop(self, children: Sequence[Child], grace_s: float) -> None:
        """Ask children to end, and kill them after `grace_s` or as soon as another signal arrives."""
        alive = [child for child in children if child.is_alive]
        for child in alive:
            child.ask_to_end()
        deadline_s = time.monotonic() + grace_s
        while any(child.is_alive for child in alive):
            remaining_s = deadline_s - time.monotonic()
            if remaining_s <= 0:
                break
            if isinstance(self.next_event(remaining_s), StopSignal):
                self._kill_and_wait(self.children)
        self._kill_and_wait(alive)

    @staticmethod
    def _raise_for(event: Event) -> NoReturn:
        if isinstance(event, StopSignal):
            raise StopRequested
        if isinstance(event, LostGroup):
            raise ChildDied(f"The shards cannot be used: {event.reason}.", [])
        event.read_to_end()
        raise ChildDied(f"{event.name} {event.ending()}.", list(event.last_lines))

    @staticmethod
    def _kill_and_wait(children: Sequence[Child]) -> None:
        """A process that hangs in the kernel cannot be killed; it is not waited for without end."""
        for child in children:
            if child.is_alive:
                child.send(signal.SIGKILL)
        deadline_s = time.monotonic() + _KILL_WAIT_S
        for child in children:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.process.wait(max(0.0, deadline_s - time.monotonic()))
