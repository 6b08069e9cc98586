"""One request: sends a prompt, reads the stream, notes when each token came. No object per token but its time."""

import asyncio
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import orjson

from text_generation_launcher.benchmark.connection import Connection
from text_generation_launcher.benchmark.request_sets import LoadRequest

CONNECT_TIMEOUT_S = 60.0
SILENCE_TIMEOUT_S = 600.0  # a server that sends nothing for so long is taken for stuck
MAX_ERROR_CHARACTERS = 300
HTTP_OK = 200


@dataclass(frozen=True)
class Target:
    """The server under load and how to ask it."""

    url: str
    route: str = "completions"  # a key of ROUTES
    model: str = "tgi"
    api_key: str | None = None
    new_connections: bool = False  # one for each request, for servers that drop idle ones


@dataclass(slots=True)
class Record:
    """What became of one request. Times are nanoseconds of the monotonic clock.

    `times_ns` holds one time for each event that brought tokens; a server may put several tokens into an event.
    """

    num_wanted: int
    start_ns: int = 0
    end_ns: int = 0
    times_ns: "array[int]" = field(default_factory=lambda: array("q"))
    num_tokens: int = 0
    num_prompt_tokens: int = 0
    error: str | None = None

    @property
    def is_short(self) -> bool:
        """Whether it ended well, but not with as many tokens as asked for."""
        return self.error is None and self.num_tokens != self.num_wanted

    @property
    def is_good(self) -> bool:
        """Whether it counts."""
        return self.error is None and self.num_tokens == self.num_wanted


@dataclass(frozen=True)
class Call:
    """A request ready to be sent: rendering it is not part of what is measured."""

    message: bytes
    num_wanted: int


@dataclass(frozen=True)
class Route:
    """One HTTP dialect: how to ask, and how to read an event. `read` says whether an event brought tokens."""

    path: str
    body: Callable[[LoadRequest, str], dict[str, Any]]
    read: Callable[[Record, dict[str, Any]], bool]


def _completions_body(request: LoadRequest, model: str) -> dict[str, Any]:
    return {
        "model": model,
        "prompt": request.prompt,
        "max_tokens": request.max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def _read_completions(record: Record, event: dict[str, Any]) -> bool:
    usage = event.get("usage")
    if usage:
        record.num_tokens = int(usage["completion_tokens"])
        record.num_prompt_tokens = int(usage["prompt_tokens"])
    return bool(event.get("choices"))


def _generate_body(request: LoadRequest, model: str) -> dict[str, Any]:
    if not isinstance(request.prompt, str):
        raise ValueError("/generate_stream takes prompts as text, and this request set has token ids")
    parameters = {"max_new_tokens": request.max_tokens, "ignore_eos": True, "details": True}
    return {"inputs": request.prompt, "parameters": parameters}


def _read_generate(record: Record, event: dict[str, Any]) -> bool:
    details = event.get("details")
    if details:
        record.num_tokens = int(details["generated_tokens"])
        record.num_prompt_tokens = int(details.get("input_length", 0))
    return "token" in event


ROUTES = {
    "completions": Route("/v1/completions", _completions_body, _read_completions),
    "generate_stream": Route("/generate_stream", _generate_body, _read_generate),
}


def prepare(target: Target, requests: Sequence[LoadRequest]) -> list[Call]:
    """Render all requests; raises ValueError for a target or a prompt that the route cannot have."""
    route = ROUTES[target.route]
    try:
        url = urlsplit(target.url)
        is_address = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:  # brackets or a port that cannot be
        is_address = False
    if not is_address:
        raise ValueError(f"no address of a server: {target.url!r}")
    head = f"POST {url.path.rstrip('/')}{route.path} HTTP/1.1\r\nHost: {url.netloc}\r\n"
    if target.api_key is not None:
        head += f"Authorization: Bearer {target.api_key}\r\n"
    if target.new_connections:
        head += "Connection: close\r\n"
    head += "Accept: */*\r\nContent-Type: application/json\r\nContent-Length: "
    bodies = [orjson.dumps(route.body(request, target.model)) for request in requests]
    return [
        Call(b"%b%d\r\n\r\n%b" % (head.encode(), len(body), body), request.max_tokens)
        for body, request in zip(bodies, requests, strict=True)
    ]


class StreamClient:
    """Sends calls to one target. An async context manager; it owns the connections."""

    def __init__(self, target: Target) -> None:
        self._read = ROUTES[target.route].read
        self._new_connections = target.new_connections
        url = urlsplit(target.url)
        self._host, self._is_secure = url.hostname or "", url.scheme == "https"
        self._port = url.port or (443 if self._is_secure else 80)
        self._idle: list[Connection] = []

    async def __aenter__(self) -> "StreamClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        for connection in self._idle:
            connection.close()
        await asyncio.sleep(0)  # they are closed in the next pass of the loop

    async def send(self, call: Call, record: Record) -> None:
        """Send one call and read its stream to the end; an error ends up in the record."""
        answer = _Answer(self._read, record)
        record.start_ns = time.monotonic_ns()
        try:
            connection = await self._connection()
            status = await connection.exchange(call.message, answer.take)
            if status != HTTP_OK:
                record.error = f"HTTP {status}: {answer.refusal or 'no body'}"[:MAX_ERROR_CHARACTERS]
            if connection.is_open and not self._new_connections:
                self._idle.append(connection)
            else:
                connection.close()
        except (OSError, ValueError, TypeError, KeyError) as error:
            record.error = f"{type(error).__name__}: {error}"[:MAX_ERROR_CHARACTERS]
        record.end_ns = time.monotonic_ns()
        answer.end()

    async def _connection(self) -> Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open:
                return connection
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            _, connection = await asyncio.get_running_loop().create_connection(
                partial(Connection, SILENCE_TIMEOUT_S), self._host, self._port, ssl=self._is_secure or None
            )
        return connection


class _Answer:
    """Reads one answer into its record."""

    def __init__(self, read: Callable[[Record, dict[str, Any]], bool], record: Record) -> None:
        self._read = read
        self._record = record
        self._rest = b""
        self._refusal = b""

    @property
    def refusal(self) -> str:
        """The body of an answer that is no stream."""
        return self._refusal.decode(errors="replace")

    def take(self, status: int, part: bytes, now_ns: int) -> None:
        """A part of the body."""
        if status != HTTP_OK:
            self._refusal += part
            return
        lines = (self._rest + part).split(b"\n")
        self._rest = lines.pop()
        for line in lines:
            # Every known dialect has one line of JSON in an event; what else may stand there is of no use here.
            if line.startswith(b"data:"):
                self._read_data(line[5:].strip(), now_ns)

    def _read_data(self, data: bytes, now_ns: int) -> None:
        if data == b"[DONE]":
            return
        record, event = self._record, orjson.loads(data)
        if not isinstance(event, dict):
            raise ValueError(f"an event that is no object: {data.decode()}")
        if event.get("error"):
            record.error = f"in the stream: {event['error']}"[:MAX_ERROR_CHARACTERS]
        elif self._read(record, event):
            record.times_ns.append(now_ns)

    def end(self) -> None:
        """Nothing more will come."""
        record = self._record
        if record.error is None and not record.times_ns:
            record.error = "the stream ended without a token"
        if not record.num_tokens:
            record.num_tokens = len(record.times_ns)  # a server that does not count for us
        # A closing event without text, on top of the tokens, is none.
        del record.times_ns[record.num_tokens :]
