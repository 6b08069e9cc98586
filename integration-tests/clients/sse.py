"""Streams read by two parsers of server-sent events that know nothing of each other."""

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]


def httpx_sse_stream(url: str) -> Any:
    import httpx
    from httpx_sse import connect_sse

    def events(path: str, body: dict[str, Any]) -> Iterator[Any]:
        with httpx.Client(timeout=60) as client, connect_sse(client, "POST", url + path, json=body) as source:
            for event in source.iter_sse():
                assert (event.event, event.id, event.retry) == ("message", "", None)
                yield event.data

    return _streams(events)


def sseclient_stream(url: str) -> Any:
    import requests
    import sseclient

    def events(path: str, body: dict[str, Any]) -> Iterator[Any]:
        with requests.post(url + path, json=body, stream=True, timeout=60) as response:
            for event in sseclient.SSEClient(response.iter_content(chunk_size=7)).events():
                assert (event.event, event.id, event.retry) == ("message", None, None)
                yield event.data

    return _streams(events)


def _streams(events: Callable[[str, dict[str, Any]], Iterator[str]]) -> Any:
    """Text of many bytes in each of its characters, and an error inside a stream."""
    emoji = "Repeat exactly: 👩‍👩‍👧 日本語 é 🏳️‍🌈 👩‍👩‍👧 日本語 é 🏳️‍🌈 👩‍👩‍👧 日本語 é"
    parameters = {"max_new_tokens": 24, "details": True}
    tokens = [json.loads(data) for data in events("/generate_stream", {"inputs": emoji, "parameters": parameters})]
    chat = {"messages": MESSAGES, "max_tokens": 32, "temperature": 0, "stream": True}
    *chunks, done = events("/v1/chat/completions", chat)
    failed = list(events("/generate_stream", {"inputs": emoji, "parameters": {"temperature": -1}}))
    return {
        "pieces": "".join(token["token"]["text"] for token in tokens if not token["token"]["special"]),
        "generated_text": tokens[-1]["generated_text"],
        "streamed": "".join(json.loads(chunk)["choices"][0]["delta"]["content"] for chunk in chunks),
        "done": done,
        "failed": [json.loads(data) for data in failed],
    }


def sse_splits(url: str) -> Any:
    """Where a stream may not be cut in two: at those of its bytes the parsers read something else than of the whole."""
    import httpx
    import sseclient
    from httpx_sse import connect_sse

    def first(pieces: Iterable[bytes]) -> list[str]:
        headers = {"content-type": "text/event-stream"}
        transport = httpx.MockTransport(lambda _: httpx.Response(200, headers=headers, content=iter(pieces)))
        with httpx.Client(transport=transport) as client, connect_sse(client, "POST", "http://a/") as source:
            return [event.data for event in source.iter_sse()]

    def second(pieces: Iterable[bytes]) -> list[str]:
        return [event.data for event in sseclient.SSEClient(pieces).events()]

    body = {
        "messages": [{"role": "user", "content": "Repeat exactly: 日本語 😀"}],
        "max_tokens": 5,
        "stream": True,
        "temperature": 0,
    }
    whole = httpx.post(url + "/v1/chat/completions", json=body, timeout=60).content
    events = first([whole])
    cuts = [[whole[:place], whole[place:]] for place in range(1, len(whole))]
    wrong = [len(pieces[0]) for pieces in cuts if not first(pieces) == second(pieces) == events]
    return {"num_events": len(events), "num_cuts": len(cuts), "wrong": wrong}
