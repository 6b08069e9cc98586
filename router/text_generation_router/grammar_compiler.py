"""Checks and tries grammars in processes of their own, bounded in time and memory, and remembers the outcomes."""

import asyncio
import contextlib
import logging
import os
import socket
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from text_generation_proto.columns import pack_int32, pack_strings

from text_generation_router.errors import GrammarsOverloaded
from text_generation_router.grammar import Grammar
from text_generation_router.grammar_frames import GOOD, LENGTH_BYTES, frame, pack
from text_generation_router.schema_checks import RefusedGrammar

logger = logging.getLogger(__name__)

TIME_LIMIT_S = 1.5  # with what comes before and after it, the answer is there within 2 s
START_LIMIT_S = 30.0
MAX_GRAMMAR_BYTES = 256 * 1024
MAX_CACHE_BYTES = 16 << 20
# While some are busy with grammars that will be refused, the others serve the rest.
MAX_WORKERS = 4
MAX_WAITING = 128
_COMMAND = (sys.executable, "-m", "text_generation_router.grammar_worker")
_SECRETS = ("API_KEY", "HF_TOKEN", "HF_API_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_QUIET = {"RUST_BACKTRACE": "0"}  # one that needs too much memory ends with one line in the log


@dataclass(frozen=True)
class Outcome:
    """What became of a grammar: its canonical text, or why it is refused."""

    text: str = ""
    refusal: str | None = None


class OutcomeCache:
    """Outcomes by grammar, the least recently used of them forgotten beyond so many bytes of text."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._outcomes: OrderedDict[Grammar, Outcome] = OrderedDict()

    def get(self, grammar: Grammar) -> Outcome | None:
        """The outcome, if it is remembered."""
        outcome = self._outcomes.get(grammar)
        if outcome is not None:
            self._outcomes.move_to_end(grammar)
        return outcome

    def put(self, grammar: Grammar, outcome: Outcome) -> None:
        """Remember an outcome that is not remembered yet."""
        self._outcomes[grammar] = outcome
        self._num_bytes += self._size(grammar, outcome)
        while self._num_bytes > self._max_bytes:
            self._num_bytes -= self._size(*self._outcomes.popitem(last=False))

    @staticmethod
    def _size(grammar: Grammar, outcome: Outcome) -> int:
        return len(grammar.text) + len(outcome.text) + 256


class WorkerDied(Exception):
    """The process ended before it answered, or did not start in time; the text says which."""


class Worker:
    """One process of grammar_worker.py; it answers one request at a time."""

    def __init__(
        self, process: "subprocess.Popen[bytes]", requests: asyncio.StreamWriter, answers: asyncio.StreamReader
    ) -> None:
        self._process = process
        self._requests, self._answers = requests, answers

    @staticmethod
    async def start(tokens: Sequence[bytes]) -> "Worker":
        """A process that has its tokens loaded; raises WorkerDied."""
        try:
            worker = await _connect()
        except OSError as error:
            raise WorkerDied(error.strerror) from error
        try:
            async with asyncio.timeout(START_LIMIT_S):
                await worker.ask(*tokens)
        except TimeoutError as error:
            await worker.kill()
            raise WorkerDied(f"not ready after {START_LIMIT_S:g} s") from error
        except BaseException:
            await worker.kill()
            raise
        return worker

    @property
    def is_alive(self) -> bool:
        """Whether the process has not ended."""
        return self._process.poll() is None

    async def ask(self, *contents: bytes) -> bytes:
        """The answer to a request of one or more frames; raises WorkerDied."""
        try:
            if self._requests.is_closing():  # a write to one that is closed is a RuntimeError of uvloop's
                raise ConnectionResetError
            self._requests.write(b"".join(map(frame, contents)))
            await self._requests.drain()
            header = await self._answers.readexactly(LENGTH_BYTES)
            return await self._answers.readexactly(int.from_bytes(header))
        except (ConnectionError, asyncio.IncompleteReadError) as error:
            raise WorkerDied("the process ended") from error

    async def kill(self) -> None:
        """End it whatever it is doing."""
        self._process.kill()
        self._requests.close()
        await asyncio.to_thread(self._process.wait)


async def _connect() -> Worker:
    """A process, connected, that has no tokens yet; raises OSError."""
    ours, theirs = socket.socketpair()
    with theirs:
        # Before the process is started: who is cancelled here leaves none behind, and the event loop closes `ours`.
        answers, requests = await asyncio.open_unix_connection(sock=ours)
        try:
            return Worker(_spawn(theirs), requests, answers)
        except OSError:
            requests.close()
            raise


def _spawn(connection: socket.socket) -> "subprocess.Popen[bytes]":
    """A process whose standard input and output are this connection; raises OSError.

    Started by vfork, in less than a millisecond. The event loop's own way is fork: this process stands still while its
    page table is copied, and pays a page fault for the first write to each of its pages afterwards.
    """
    environment = {name: value for name, value in os.environ.items() if name not in _SECRETS} | _QUIET
    return subprocess.Popen(_COMMAND, stdin=connection.fileno(), stdout=connection.fileno(), env=environment)


class GrammarCompiler:
    """Canonical texts of grammars, tried by a worker and made ready by the shard."""

    def __init__(
        self,
        token_bytes: Sequence[bytes],
        eos_token_ids: Sequence[int],
        prepare: Callable[[str], Awaitable[str]],
    ) -> None:
        """`prepare` makes the shard ready for a canonical text and answers "", or why that cannot be."""
        self._tokens = (*pack_strings(token_bytes), pack_int32(eos_token_ids))
        self._prepare = prepare
        self._cache = OutcomeCache(MAX_CACHE_BYTES)
        self._running: dict[Grammar, asyncio.Task[Outcome]] = {}
        self._slots = asyncio.Semaphore(MAX_WORKERS)
        self._workers: set[Worker] = set()
        self._idle: list[Worker] = []
        self._spare: asyncio.Task[None] | None = None
        self._is_closed = False

    def start(self) -> None:
        """Start a worker ahead of the first grammar."""
        self._keep_spare()

    async def close(self) -> None:
        """End the workers; grammars that still wait are given up."""
        self._is_closed = True
        tasks: list[asyncio.Task[None] | asyncio.Task[Outcome]] = [*self._running.values()]
        if self._spare is not None:
            tasks.append(self._spare)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        workers, self._workers = self._workers, set()
        self._idle.clear()
        await asyncio.gather(*(worker.kill() for worker in workers))

    async def compile(self, grammar: Grammar) -> str:
        """The canonical text, with the shard ready for it; raises RefusedGrammar, and Overloaded."""
        num_bytes = len(grammar.text.encode())
        if num_bytes > MAX_GRAMMAR_BYTES:
            raise RefusedGrammar(f"must have at most {MAX_GRAMMAR_BYTES} bytes. Given: {num_bytes}")
        outcome = self._cache.get(grammar)
        if outcome is None:
            # A client that leaves must not take the answer from others who wait for the same one.
            outcome = await asyncio.shield(self._running.get(grammar) or self._start(grammar))
        if outcome.refusal is not None:
            raise RefusedGrammar(outcome.refusal)
        if error := await self._prepare(outcome.text):
            raise RefusedGrammar(error)
        return outcome.text

    def _start(self, grammar: Grammar) -> "asyncio.Task[Outcome]":
        if len(self._running) >= MAX_WAITING:
            raise GrammarsOverloaded(f": {MAX_WAITING} grammars wait to be compiled")
        task = asyncio.create_task(self._try(grammar))
        self._running[grammar] = task
        task.add_done_callback(lambda _: self._running.pop(grammar, None))
        return task

    async def _try(self, grammar: Grammar) -> Outcome:
        async with self._slots:
            worker = await self._take_worker()
            self._keep_spare()
            try:
                async with asyncio.timeout(TIME_LIMIT_S):
                    reply = await worker.ask(pack(grammar))
            except (TimeoutError, WorkerDied) as error:
                await self._drop(worker)
                is_late = isinstance(error, TimeoutError)
                logger.info("A grammar %s", "took too long" if is_late else "ended its process")
                # Not kept: on a busy machine a good grammar may be late once.
                return Outcome(refusal=f"takes more than {TIME_LIMIT_S:g} s" if is_late else "needs too much memory")
            except BaseException:
                await self._drop(worker)
                raise
            else:
                self._idle.append(worker)
                text = reply[1:].decode()
                outcome = Outcome(text) if reply[:1] == GOOD else Outcome(refusal=text)
        self._cache.put(grammar, outcome)
        return outcome

    async def _take_worker(self) -> Worker:
        """An idle worker or a new one; raises GrammarsOverloaded."""
        while self._idle:
            worker = self._idle.pop()
            if worker.is_alive:
                return worker
            await self._drop(worker)  # killed by somebody else
        return await self._start_worker()

    async def _start_worker(self) -> Worker:
        """Another worker; raises GrammarsOverloaded."""
        try:
            worker = await Worker.start(self._tokens)
        except WorkerDied as error:
            logger.warning("A process that tries grammars did not start: %s", error)
            raise GrammarsOverloaded(
                ": the process that tries grammars did not start; send the request again"
            ) from None
        self._workers.add(worker)
        return worker

    async def _drop(self, worker: Worker) -> None:
        self._workers.discard(worker)
        self._keep_spare()
        await worker.kill()

    def _keep_spare(self) -> None:
        """See to it that a worker is ready for the next grammar."""
        is_starting = self._spare is not None and not self._spare.done()
        if not self._idle and not is_starting and not self._is_closed and len(self._workers) < MAX_WORKERS:
            self._spare = asyncio.create_task(self._start_spare())

    async def _start_spare(self) -> None:
        with contextlib.suppress(GrammarsOverloaded):  # the next grammar starts another
            self._idle.append(await self._start_worker())
