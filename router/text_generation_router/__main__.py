"""`text-generation-router`: reads its configuration, connects to the shards, serves HTTP until it is told to stop."""

import asyncio
import contextlib
import dataclasses
import logging
import os
import signal
import sys
from typing import TYPE_CHECKING

import uvloop

from text_generation_router.access import ApiKeys, InvalidKeysFile
from text_generation_router.api.context import Context
from text_generation_router.app import Server, bind
from text_generation_router.chat_template import ChatTemplate
from text_generation_router.command_line import InvalidConfig, parse_config
from text_generation_router.config import RouterConfig
from text_generation_router.engine import Engine, start_engine
from text_generation_router.grammar_compiler import GrammarCompiler
from text_generation_router.huge_pages import collapse_memory
from text_generation_router.limits import InvalidLimits
from text_generation_router.logs import set_up_logging
from text_generation_router.metrics import Metrics
from text_generation_router.parent_watch import watch_parent
from text_generation_router.process_report import ProcessReport
from text_generation_router.shard_client import ShardFailure
from text_generation_router.tokenizer import Tokenizer
from text_generation_router.tokenizer_files import BrokenTokenizer

if TYPE_CHECKING:
    from text_generation_router.tracing import Tracing

logger = logging.getLogger("text_generation_router")


class StopSignal:
    """SIGTERM or SIGINT: the first asks for an orderly end, the second ends the process at once."""

    def __init__(self) -> None:
        self._asked = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)

    def _on_signal(self) -> None:
        if self._asked.is_set():
            logger.warning("Second signal: ending at once")
            os._exit(0)  # as asked
        self._asked.set()

    async def wait(self) -> None:
        """Return once the first signal has come."""
        await self._asked.wait()


async def serve(config: RouterConfig) -> None:
    """Build everything, serve, and return after an orderly end."""
    stop = StopSignal()
    ApiKeys.read(config.api_key, config.api_keys_file)  # before the shards warm up in vain
    with contextlib.ExitStack() as resources:
        listener = resources.enter_context(contextlib.closing(bind(config.hostname, config.port)))
        metrics_listener = resources.enter_context(contextlib.closing(bind(config.hostname, config.prometheus_port)))
        tokenizer = Tokenizer(config.tokenizer_folder, config.validation_workers)
        chat_template = ChatTemplate(config.tokenizer_folder)
        resources.callback(tokenizer.close)
        resources.callback(chat_template.close)
        metrics = Metrics()
        engine = await _start_unless_stopped(config, tokenizer, metrics, stop)
        if engine is None:
            return
        grammars = _grammar_compiler(config, engine, tokenizer)
        processes = ProcessReport(metrics, engine.shard_processes)
        resources.callback(processes.stop)
        processes.start()
        tracing = _tracing(config)
        live = None if config.disable_ui else engine.live
        context = Context(config, engine, tokenizer, chat_template, metrics, grammars, tracing, live)
        server = Server(context, listener, metrics_listener)
        await server.start()
        if grammars is not None:
            grammars.start()
        engine.take_over_garbage()
        await asyncio.to_thread(collapse_memory)
        is_failed = await _ends_by_failure(engine, stop)
        await server.stop(grace_s=0.0 if is_failed else None)
        await engine.stop()
        if tracing is not None:
            await asyncio.to_thread(tracing.close)
        if grammars is not None:
            await grammars.close()
        if is_failed:
            raise ShardFailure("the engine cannot go on without its shards")


def _grammar_compiler(config: RouterConfig, engine: Engine, tokenizer: Tokenizer) -> GrammarCompiler | None:
    tokens = tokenizer.grammar_tokens(engine.limits.vocab_size)
    if config.disable_grammar_support or tokens is None:
        return None
    return GrammarCompiler(*tokens, engine.prepare_grammar)


def _tracing(config: RouterConfig) -> "Tracing | None":
    if config.otlp_endpoint is None:
        return None
    # Loading OpenTelemetry takes 0.2 s, which those who do not use it need not wait for.
    from text_generation_router.tracing import start_tracing

    return start_tracing(config.otlp_endpoint, config.otlp_service_name, config.served_model_name or config.model_id)


async def _ends_by_failure(engine: Engine, stop: StopSignal) -> bool:
    """Wait until the end is asked for (False) or the engine has failed (True)."""
    stopping = asyncio.create_task(stop.wait())
    failing = asyncio.create_task(engine.failed.wait())
    await asyncio.wait({stopping, failing}, return_when=asyncio.FIRST_COMPLETED)
    is_failed = not stopping.done()
    stopping.cancel()
    failing.cancel()
    return is_failed


async def _start_unless_stopped(
    config: RouterConfig, tokenizer: Tokenizer, metrics: Metrics, stop: StopSignal
) -> Engine | None:
    """The running engine, or None when the end is asked for while the shards warm up."""
    starting = asyncio.create_task(start_engine(config, tokenizer, metrics))
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if starting.done():
        return starting.result()
    starting.cancel()
    await asyncio.wait({starting})
    return None


SWITCH_INTERVAL_S = 0.0005


def main() -> None:
    """Entry point of the command."""
    try:
        config = parse_config(sys.argv[1:])
    except InvalidConfig as error:
        sys.exit(f"ERROR text_generation_router: {error}")
    set_up_logging(config.log_level, config.json_output)
    watch_parent(config.run_folder)
    config = dataclasses.replace(
        config,
        # The launcher hands the key over here: a command line can be read by every user of the machine.
        api_key=config.api_key or os.environ.get("API_KEY") or None,
        compute_type=os.environ.get("COMPUTE_TYPE") or config.compute_type,
        docker_label=os.environ.get("DOCKER_LABEL") or config.docker_label,
    )
    # A thread that has encoded a prompt waits so long for the event loop's thread to let it go on; 5 ms by default.
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve(config))
    except (OSError, BrokenTokenizer, InvalidKeysFile, ShardFailure, InvalidLimits) as error:
        logger.error("%s", error)
        sys.exit(1)


if __name__ == "__main__":
    main()
