"""Real workers: absurd grammars are refused in bounded time, end with their process, and hold up nobody else."""

import asyncio
import gc
import os
import signal
import subprocess
import sys
import time

import pytest
import uvloop
from text_generation_router import grammar_compiler
from text_generation_router.errors import GrammarsOverloaded, Overloaded
from text_generation_router.grammar import Grammar
from text_generation_router.grammar_compiler import (
    MAX_GRAMMAR_BYTES,
    MAX_WAITING,
    START_LIMIT_S,
    TIME_LIMIT_S,
    GrammarCompiler,
    Outcome,
    OutcomeCache,
)
from text_generation_router.grammar_frames import frame
from text_generation_router.schema_checks import RefusedGrammar

TOKENS = [bytes([byte]) for byte in range(256)] + [b'{"', b"abc", b""]
EOS = len(TOKENS) - 1


class Shard:
    """Notes what it is to be ready for; cannot be for texts with `unready` in them."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    async def prepare(self, text: str) -> str:
        self.texts.append(text)
        return "too large for me" if "unready" in text else ""


def with_compiler(test, starts: bool = True) -> None:
    async def run() -> None:
        shard = Shard()
        compiler = GrammarCompiler(TOKENS, [EOS], shard.prepare)
        if starts:
            compiler.start()
        try:
            await test(compiler, shard)
        finally:
            await compiler.close()
        assert not compiler._workers

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:  # as the router runs it
        runner.run(run())


def test_processes_whose_start_is_cancelled_are_ended_and_waited_for(monkeypatch, capfd):
    processes, spawn = [], subprocess.Popen

    def spawn_and_note(*arguments, **options):
        processes.append(spawn(*arguments, **options))
        return processes[-1]

    async def close_after(num_passes: int) -> None:
        compiler = GrammarCompiler(TOKENS, [EOS], Shard().prepare)
        compiler.start()
        for _ in range(num_passes):
            await asyncio.sleep(0)
        await compiler.close()
        assert all(process.returncode is not None for process in processes)

    monkeypatch.setattr(subprocess, "Popen", spawn_and_note)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        for num_passes in range(8):
            runner.run(close_after(num_passes))
    assert processes  # the later passes come after the start of one
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("received", [b"", frame(b"abc") * 2, frame(b"abc") * 2 + frame(b"abc")[:-1]])
def test_a_process_without_all_its_tokens_ends_quietly(received):
    ended = subprocess.run(grammar_compiler._COMMAND, input=received, capture_output=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, b"", b"")


def multiple_of(number: int) -> Grammar:
    """With a large prime, an automaton of as many states."""
    return Grammar.from_schema({"type": "integer", "multipleOf": number})


def test_good_and_bad_grammars():
    async def test(compiler, shard):
        text = await compiler.compile(Grammar.from_schema({"type": "boolean"}))
        assert '"boolean"' in text
        assert shard.texts == [text]
        assert await compiler.compile(Grammar.from_schema({"type": "boolean"})) == text
        assert shard.texts == [text, text]  # it may have forgotten it
        with pytest.raises(RefusedGrammar, match="`not`"):
            await compiler.compile(Grammar.from_schema({"not": {}}))
        with pytest.raises(RefusedGrammar, match="exclude each other"):
            await compiler.compile(Grammar.from_schema({"oneOf": [{"minimum": 1}, {"maxLength": 1}]}))
        with pytest.raises(RefusedGrammar, match="regex"):
            await compiler.compile(Grammar.from_regex("("))
        with pytest.raises(RefusedGrammar, match="too large for me"):
            await compiler.compile(Grammar.from_regex("unready"))
        with pytest.raises(RefusedGrammar, match="at most"):
            await compiler.compile(Grammar.from_regex("a" * (MAX_GRAMMAR_BYTES + 1)))

    with_compiler(test)


def deep(levels: int) -> dict:
    schema: dict = {"type": "string"}
    for number in range(levels):
        inner = {"type": "object", "properties": {f"a{number}": schema, f"b{number}": schema}}
        schema = {"anyOf": [inner, {"type": "array", "items": schema}]}
    return schema


HOSTILE = {
    "automaton": multiple_of(9_999_991),
    "intersection": Grammar.from_schema(
        {"type": "string", "allOf": [{"pattern": f"[a-z]*{chr(97 + n % 26)}[a-z]{{{n}}}"} for n in range(30)]}
    ),
    "nesting": Grammar.from_schema('{"items":' * 140 + "{}" + "}" * 140),
    "recursion": Grammar.from_schema({"type": "array", "items": {"$ref": "#"}, "minItems": 1}),
    "many optional members": Grammar.from_schema({"properties": {f"k{n}": {"type": "string"} for n in range(5000)}}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_absurd_grammars_are_refused(name):
    """Each is followed by an honest one, which must not wait for it."""

    async def test(compiler, shard):
        await compiler.compile(Grammar.from_regex("first"))
        started = time.monotonic()
        hostile = asyncio.create_task(compiler.compile(HOSTILE[name]))
        await asyncio.sleep(0)
        await compiler.compile(Grammar.from_regex("honest"))
        with pytest.raises(RefusedGrammar):
            await hostile
        first_s = time.monotonic() - started
        with pytest.raises(RefusedGrammar):  # remembered
            await compiler.compile(HOSTILE[name])
        assert len(shard.texts) == 2
        assert first_s < 60  # a hang, not a figure

    with_compiler(test)


def late_grammar() -> Grammar:
    """Branches each of which needs the next one: their check takes a minute of a slow processor and 5 MB."""
    return Grammar.from_schema({"anyOf": [*({"$ref": f"#/anyOf/{number}"} for number in range(1, 10_000)), {}]})


def test_the_process_of_a_late_grammar_ends():
    async def test(compiler, shard):
        await compiler.compile(Grammar.from_regex("first"))
        before = {worker._process.pid for worker in compiler._workers}
        with pytest.raises(RefusedGrammar, match=f"{TIME_LIMIT_S:g} s"):
            await compiler.compile(late_grammar())
        left = {worker._process.pid for worker in compiler._workers}
        assert before - left or not before & left
        for pid in before - left:
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)

    with_compiler(test)


DYING = (sys.executable, "-c", "pass")
SILENT = (sys.executable, "-c", "import sys; sys.stdin.read()")


@pytest.mark.parametrize(
    ("command", "ends_before_it_is_asked", "limit_s", "reason"),
    [
        (DYING, True, START_LIMIT_S, "the process ended"),
        (DYING, False, START_LIMIT_S, "the process ended"),
        (SILENT, False, 0.01, "not ready after 0.01 s"),
        (("/nowhere/python",), False, START_LIMIT_S, "No such file"),
    ],
)
def test_a_process_that_does_not_start(monkeypatch, caplog, command, ends_before_it_is_asked, limit_s, reason):
    """One line of the log for each start, a 429 for the grammar that needed it, and the next grammar starts another."""
    spawn = subprocess.Popen

    def spawn_and_wait(*arguments, **options):
        process = spawn(*arguments, **options)
        if ends_before_it_is_asked:
            process.wait()
        return process

    async def test(compiler, shard):
        with monkeypatch.context() as patch:
            patch.setattr(subprocess, "Popen", spawn_and_wait)
            patch.setattr(grammar_compiler, "_COMMAND", command)
            patch.setattr(grammar_compiler, "START_LIMIT_S", limit_s)
            compiler.start()
            await asyncio.wait([compiler._spare])
            with pytest.raises(GrammarsOverloaded, match="did not start; send the request again"):
                await compiler.compile(Grammar.from_regex("a"))
        assert "a" in await compiler.compile(Grammar.from_regex("a"))

    with_compiler(test, starts=False)
    gc.collect()  # so that an exception that nobody has retrieved would be logged
    records = [record for record in caplog.records if record.levelname != "DEBUG"]
    assert len(records) == 2
    for record in records:
        assert record.getMessage().startswith(f"A process that tries grammars did not start: {reason}")
        assert record.exc_info is None


BESIDE_A_CHANNEL = """
import asyncio, os, sys, uvloop
from text_generation_router import __main__, shard_client
from text_generation_router.grammar import Grammar
from text_generation_router.grammar_compiler import GrammarCompiler
from text_generation_router.shard_client import grpc

async def prepare(text):
    return ""

async def main():
    server = grpc.aio.server()
    server.add_insecure_port(sys.argv[1])
    await server.start()
    async with grpc.aio.insecure_channel(sys.argv[1]) as channel:
        await channel.channel_ready()
        compiler = GrammarCompiler([bytes([byte]) for byte in range(256)] + [b""], [256], prepare)
        await compiler.compile(Grammar.from_regex("a"))
        await compiler.close()
        os._exit(0)  # where a server is stopped, the channel may have a word to say about that

uvloop.run(main())
"""


def test_processes_start_without_a_word_beside_a_connection_to_a_shard(tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GRPC_")}
    command = [sys.executable, "-c", BESIDE_A_CHANNEL, f"unix://{tmp_path}/shard"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_idle_processes_that_are_killed():
    async def test(compiler, shard):
        await compiler.compile(Grammar.from_regex("first"))
        await asyncio.wait([compiler._spare])
        idle = [worker._process for worker in compiler._idle]
        assert idle
        for process in idle:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        assert "next" in await compiler.compile(Grammar.from_regex("next"))
        assert not {process.pid for process in idle} & {worker._process.pid for worker in compiler._workers}

    with_compiler(test)


def test_a_client_that_leaves_takes_nothing_from_others():
    async def test(compiler, shard):
        grammar = Grammar.from_regex("shared")
        first, second = (asyncio.create_task(compiler.compile(grammar)) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        assert "shared" in await second
        with pytest.raises(asyncio.CancelledError):
            await first

    with_compiler(test)


def test_a_queue_that_is_too_long_is_refused():
    async def test(compiler, shard):
        tasks = [asyncio.create_task(compiler.compile(Grammar.from_regex(f"a{n}"))) for n in range(MAX_WAITING + 1)]
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(outcomes[-1], Overloaded)
        assert all(isinstance(outcome, str) for outcome in outcomes[:-1])

    with_compiler(test)


def test_the_least_recently_used_outcomes_are_forgotten():
    cache = OutcomeCache(max_bytes=3000)
    grammars = [Grammar.from_regex(f"{n}" * 500) for n in range(4)]
    for grammar in grammars[:3]:
        cache.put(grammar, Outcome("x" * 100))
    assert cache.get(grammars[0]) == Outcome("x" * 100)
    cache.put(grammars[3], Outcome(refusal="no"))
    assert cache.get(grammars[1]) is None
    assert all(cache.get(grammars[n]) is not None for n in (0, 2, 3))
