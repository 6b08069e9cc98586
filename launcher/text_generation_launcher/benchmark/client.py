"""One request: sends a prompt, reads the stream, notes when each token came. No object per token but its time."""

import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import orjson

from text_generation_launcher.benchmark.request_sets import LoadRequest

CONNECT_TIMEOUT_S = 60.0
SILENCE_TIMEOUT_S = 600.0  # a server that sends nothing for so long is taken for stuck
MAX_ERROR_CHARACTERS = 300


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

    path: str
    body: bytes
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
        record.num_tokens = usage["completion_tokens"]
        record.num_prompt_tokens = usage["prompt_tokens"]
    return bool(event.get("choices"))


def _generate_body(request: LoadRequest, model: str) -> dict[str, Any]:
    if not isinstance(request.prompt, str):
        raise ValueError("/generate_stream takes prompts as text, and this request set has token ids")
    parameters = {"max_new_tokens": request.max_tokens, "ignore_eos": True, "details": True}
    return {"inputs": request.prompt, "parameters": parameters}


def _read_generate(record: Record, event: dict[str, Any]) -> bool:
    details = event.get("details")
    if details:
        record.num_tokens = details["generated_tokens"]
        record.num_prompt_tokens = details.get("input_length", 0)
    return "token" in event


ROUTES = {
    "completions": Route("/v1/completions", _completions_body, _read_completions),
    "generate_stream": Route("/generate_stream", _generate_body, _read_generate),
}


def prepare(target: Target, requests: Sequence[LoadRequest]) -> list[Call]:
    """Render the bodies of all requests."""
    route = ROUTES[target.route]
    return [
        Call(route.path, orjson.dumps(route.body(request, target.model)), request.max_tokens) for request in requests
    ]


class StreamClient:
    """Sends calls to one target. An async context manager; it owns the connections."""

    def __init__(self, target: Target) -> None:
        self._read = ROUTES[target.route].read
        self._url = target.url.rstrip("/")
        headers = {"Content-Type": "application/json"}
        if target.api_key is not None:
            headers["Authorization"] = f"Bearer {target.api_key}"
        self._session = aiohttp.ClientSession(
            headers=headers,
            connector=aiohttp.TCPConnector(limit=0, force_close=target.new_connections),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=SILENCE_TIMEOUT_S),
        )

    async def __aenter__(self) -> "StreamClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def send(self, call: Call, record: Record) -> None:
        """Send one call and read its stream to the end; an error ends up in the record."""
        record.start_ns = time.monotonic_ns()
        try:
            async with self._session.post(self._url + call.path, data=call.body) as response:
                if response.status != 200:
                    text = await response.text(errors="replace")
                    record.error = f"HTTP {response.status}: {text[:MAX_ERROR_CHARACTERS]}"
                else:
                    await self._read_stream(response.content, record)
        except (aiohttp.ClientError, OSError, ValueError, TypeError, KeyError) as error:
            record.error = f"{type(error).__name__}: {error}"[:MAX_ERROR_CHARACTERS]
        record.end_ns = time.monotonic_ns()
        if record.error is None and not record.times_ns:
            record.error = "the stream ended without a token"
        if not record.num_tokens:
            record.num_tokens = len(record.times_ns)  # a server that does not count for us
        # A closing event without text, on top of the tokens, is none.
        del record.times_ns[record.num_tokens :]

    async def _read_stream(self, content: aiohttp.StreamReader, record: Record) -> None:
        rest = b""
        async for chunk in content.iter_any():
            now_ns = time.monotonic_ns()
            lines = (rest + chunk).split(b"\n")
            rest = lines.pop()
            for line in lines:
                # Every known dialect has one line of JSON in an event; what else may stand there is of no use here.
                if line.startswith(b"data:"):
                    self._read_data(line[5:].strip(), now_ns, record)

    def _read_data(self, data: bytes, now_ns: int, record: Record) -> None:
        if data == b"[DONE]":
            return
        event = orjson.loads(data)
        if event.get("error"):
            record.error = f"in the stream: {event['error']}"[:MAX_ERROR_CHARACTERS]
        elif self._read(record, event):
            record.times_ns.append(now_ns)
