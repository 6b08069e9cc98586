"""The HTTP server: routes, listening sockets, and the way from the first signal to the end."""

import asyncio
import json
import logging
import os
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from aiohttp import web

from text_generation_router.access import ApiKeys
from text_generation_router.api import service
from text_generation_router.api.connection import connection_factory
from text_generation_router.api.context import CONTEXT_KEY, DOCUMENT_KEY, Context
from text_generation_router.api.document import build_document
from text_generation_router.api.middleware import (
    answer_errors,
    answer_headers,
    answer_preflight,
    identify,
    require_api_key,
)
from text_generation_router.api.routes import ROUTES, Route
from text_generation_router.live import LiveHistory
from text_generation_router.ranges import request_ranges

logger = logging.getLogger(__name__)

_BACKLOG = 4096
# How long answers that are complete may take to leave once the engine is drained.
_LAST_WRITES_S = 2.0


def build_app(context: Context) -> web.Application:
    """The application of the main port."""
    config = context.config
    app = web.Application(client_max_size=config.payload_limit)
    app[CONTEXT_KEY] = context
    keys = ApiKeys.read(config.api_key, config.api_keys_file)
    ranges = request_ranges(config, context.engine.limits)
    routes = [route for route in ROUTES if not (route.is_live_page and context.live is None)]
    app[DOCUMENT_KEY] = build_document(routes, ranges, context.version, has_keys=keys is not None)
    _add(app, [route for route in routes if route.is_open])
    open_routes: set[web.AbstractRoute] = set(app.router.routes())  # HEAD comes with GET
    _add(app, [route for route in routes if not route.is_open])
    if context.live is not None:
        app.cleanup_ctx.append(_sampling(context.live))
    app.middlewares.append(identify)
    app.middlewares.append(answer_preflight)
    if keys is not None:
        app.middlewares.append(require_api_key(keys, open_routes))
    app.middlewares.append(answer_errors)
    app.on_response_prepare.append(answer_headers(config.cors_allow_origin))
    return app


def _sampling(live: LiveHistory) -> Callable[[web.Application], AsyncIterator[None]]:
    async def run(app: web.Application) -> AsyncIterator[None]:
        async with live.sampling():
            yield

    return run


def _add(app: web.Application, routes: list[Route]) -> None:
    for route in routes:
        add = app.router.add_get if route.method == "GET" else app.router.add_post
        add(route.path, route.handler)


def build_metrics_app(context: Context) -> web.Application:
    """The application of the Prometheus port: the metrics alone."""
    app = web.Application()
    app[CONTEXT_KEY] = context
    app.router.add_get("/metrics", service.metrics)
    app.middlewares.append(answer_errors)
    app.on_response_prepare.append(answer_headers(context.config.cors_allow_origin))
    return app


def bind(hostname: str, port: int) -> socket.socket:
    """Reserve a port, not listening yet, so that a busy one shows before the model is loaded; 0 picks one."""
    family, kind, protocol, _, address = socket.getaddrinfo(
        hostname, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError:
        listener.close()
        raise
    return listener


def write_ports(run_folder: str, port: int, prometheus_port: int) -> None:
    """Tell the launcher which ports were taken: `router.json` appears whole or not at all."""
    path = Path(run_folder, "router.json")
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"port": port, "prometheus_port": prometheus_port}))
    os.replace(partial, path)


class Server:
    """Serves one context on two sockets until it is stopped."""

    def __init__(self, context: Context, listener: socket.socket, metrics_listener: socket.socket) -> None:
        self._context = context
        self._listeners = (listener, metrics_listener)
        self._runners = [
            web.AppRunner(build(context), handler_cancellation=True, shutdown_timeout=_LAST_WRITES_S)
            for build in (build_app, build_metrics_app)
        ]
        self._sockets: list[asyncio.Server] = []

    async def start(self) -> None:
        """Listen, and say where."""
        for runner, listener in zip(self._runners, self._listeners, strict=True):
            await runner.setup()
            assert runner.server is not None, "set up"
            factory = connection_factory(runner.server, self._context.metrics.requests)
            self._sockets.append(
                await asyncio.get_running_loop().create_server(factory, sock=listener, backlog=_BACKLOG)
            )
        port, metrics_port = (listener.getsockname()[1] for listener in self._listeners)
        if self._context.config.run_folder:
            write_ports(self._context.config.run_folder, port, metrics_port)
        logger.info("Serving on %s:%d, metrics also on port %d", self._context.config.hostname, port, metrics_port)
        logger.info("Connected")

    async def stop(self, grace_s: float | None = None) -> None:
        """Refuse new requests, let admitted ones end within the grace, end the others with an error, and close."""
        engine, permits = self._context.engine, self._context.permits
        if grace_s is None:
            grace_s = self._context.config.graceful_termination_timeout_s
        logger.info("Draining: %d requests have up to %g s to end", permits.num_taken, grace_s)
        permits.close()
        self._context.tokenize_permits.close()
        engine.start_drain()
        if not all(await asyncio.gather(permits.all_back(grace_s), self._context.tokenize_permits.all_back(grace_s))):
            logger.warning("%d requests are ended before they are done, after %g s", permits.num_taken, grace_s)
        engine.end_all()
        await permits.all_back(_LAST_WRITES_S)
        self._context.tokenize_thread.shutdown(wait=False, cancel_futures=True)
        for listening in self._sockets:
            listening.close()
        for runner in self._runners:
            await runner.cleanup()
