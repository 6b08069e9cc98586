"""A scripted server that speaks both dialects, in a thread of its own."""

import asyncio
import json
import threading
from collections.abc import Iterator

import pytest
from aiohttp import web


class ScriptedServer:
    """Answers every request with as many tokens as it asks for; `script` changes what happens.

    `script` maps the number of a request, counted from 0, to "refuse", "break", "error", "short" or "silent".
    """

    def __init__(self) -> None:
        self.script: dict[int, str] = {}
        self.bodies: list[dict] = []
        self.headers: list[dict] = []
        self.num_open = self.most_open = 0
        self.pause_s = 0.0
        self.line_end = "\n"
        self.tokens_per_event = 1
        self.has_usage = True
        self.url = ""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),))
        self._is_ready = threading.Event()
        self._stop = asyncio.Event()

    def start(self) -> None:
        self._thread.start()
        assert self._is_ready.wait(10)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)
        self._loop.close()

    async def _serve(self) -> None:
        app = web.Application()
        app.router.add_post("/v1/completions", self._answer)
        app.router.add_post("/generate_stream", self._answer)
        runner = web.AppRunner(app, shutdown_timeout=1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        self._is_ready.set()
        await self._stop.wait()
        await runner.cleanup()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        act = self.script.get(len(self.bodies), "")
        body = await request.json()
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        if act == "refuse":
            return web.json_response({"error": "Model is overloaded", "error_type": "overloaded"}, status=429)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        self.num_open += 1
        self.most_open = max(self.most_open, self.num_open)
        try:
            await self._stream(request, response, body, act)
        finally:
            self.num_open -= 1
        return response

    async def _stream(self, request: web.Request, response: web.StreamResponse, body: dict, act: str) -> None:
        is_completions = request.path == "/v1/completions"
        count = body["max_tokens"] if is_completions else body["parameters"]["max_new_tokens"]
        count -= act == "short"
        events = self._completions_events(count) if is_completions else self._generate_events(count)
        for index, event in enumerate([] if act == "silent" else events):
            if index == 1 and act == "break":
                request.transport.abort()
                return
            if index == 1 and act == "error":
                event = json.dumps({"error": "Request failed during generation", "error_type": "generation"})
            await response.write(f"data: {event}{self.line_end}{self.line_end}".encode())
            if self.pause_s:
                await asyncio.sleep(self.pause_s)
        await response.write_eof()

    def _completions_events(self, count: int) -> list[str]:
        num_events = -(-count // self.tokens_per_event)
        events = [{"choices": [{"index": 0, "text": "a", "finish_reason": None}]} for _ in range(num_events)]
        if self.has_usage:
            events.append({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": count}})
        return [*map(json.dumps, events), "[DONE]"]

    @staticmethod
    def _generate_events(count: int) -> list[str]:
        events = [{"token": {"id": 1, "text": "a"}, "details": None} for _ in range(count)]
        events[-1]["details"] = {"generated_tokens": count, "input_length": 7}
        return list(map(json.dumps, events))


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    server = ScriptedServer()
    server.start()
    yield server
    server.stop()
