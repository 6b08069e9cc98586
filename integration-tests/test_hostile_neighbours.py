"""Requests that want to do harm, sent while honest streams are open: each is refused, and no stream notices."""

from __future__ import annotations

import gzip
import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from conftest import Server

NUM_STREAMS = 16
NUM_TOKENS = 12
GENERATE, STREAM, COMPLETIONS, CHAT = "/generate", "/generate_stream", "/v1/completions", "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hello"}]
WIDTH = 49_152  # of the demo model's logits
WIDE_SCHEMA = {
    "type": "object",
    "properties": {
        f"p{number}": {"anyOf": [{"const": f"{value:x}" * 9} for value in range(50)]} for number in range(300)
    },
}


def _generate(**parameters: Any) -> tuple[str, bytes]:
    return GENERATE, json.dumps({"inputs": "Hello", "parameters": {"max_new_tokens": 4, **parameters}}).encode()


def _grammar(kind: str, value: Any) -> tuple[str, bytes]:
    return _generate(grammar={"type": kind, "value": value})


def _completion(**fields: Any) -> tuple[str, bytes]:
    return COMPLETIONS, json.dumps({"prompt": "Hello", "max_tokens": 4, **fields}).encode()


# Each must be answered by a 4xx. The rules that they try to break are those of the security table.
REFUSED: dict[str, tuple[str, bytes]] = {
    "a huge body": (GENERATE, json.dumps({"inputs": "x" * 3_000_000}).encode()),
    "a prompt longer than the memory": (GENERATE, json.dumps({"inputs": "a b " * 400_000}).encode()),
    "deep JSON": (GENERATE, b'{"inputs":' + b"[" * 20_000 + b"]" * 20_000 + b"}"),
    "deep messages": (CHAT, b'{"messages":' + b'[{"content":' * 500 + b"1" + b"}]" * 500 + b"}"),
    "NaN": (GENERATE, b'{"inputs": "Hello", "parameters": {"temperature": NaN}}'),
    "the first id that is none": _completion(prompt=[5, WIDTH]),
    "an id of 31 bits": _completion(prompt=[2**31 - 1]),
    "an id of 63 bits": _completion(prompt=[2**63 - 1]),
    "an id below zero": _completion(prompt=[-1]),
    "a bias beyond the logits": _completion(logit_bias={str(WIDTH): 5}),
    "a bias before them": _completion(logit_bias={"-1": 5}),
    "many biases": _completion(logit_bias={str(number): 1 for number in range(30_000)}),
    "stop ids beyond the logits": _completion(stop_token_ids=[WIDTH]),
    "many choices": _completion(n=2**31),
    "many runs": _generate(best_of=10**6, do_sample=True),
    "many log-probabilities": _completion(logprobs=10**6),
    "many top tokens": _generate(top_n_tokens=2**31),
    "many stop strings": _generate(stop=["x"] * 10_000),
    "a long stop string": _generate(stop=["x" * 1_000_000]),
    "many prompts": _completion(prompt=["a"] * 10_000),
    "a seed of 65 bits": _generate(seed=2**64),
    "an infinite temperature": _generate(temperature=10**400),
    "a regular expression that explodes": _grammar("regex", "(" * 5_000 + "a" + "){0,99}" * 5_000),
    "a regular expression of repetitions": _grammar("regex", "((((((a{0,99}){0,99}){0,99}){0,99}){0,99}){0,99})b"),
    "a long regular expression": _grammar("regex", "(a|b)" * 100_000),
    "a broken regular expression": _grammar("regex", "(((("),
    "a schema of a million values": _grammar("json", {"enum": [f"{number}" * 5 for number in range(100_000)]}),
    "a wide schema": _grammar("json", WIDE_SCHEMA),
    "a schema that refers to nothing": _grammar("json", {"$ref": "#/$defs/none"}),
    "a schema from elsewhere": _grammar("json", {"$ref": "http://127.0.0.1:1/schema"}),
    "an image from elsewhere": (
        CHAT,
        json.dumps(
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/"}}],
                    }
                ]
            }
        ).encode(),
    ),
    "many tools": (
        CHAT,
        json.dumps(
            {
                "messages": HELLO,
                "tools": [{"type": "function", "function": {"name": f"f{n}"}} for n in range(20_000)],
                "tool_choice": "required",
            }
        ).encode(),
    ),
}
# Large, but nothing that the bounds forbid: these may be served too.
BORNE = {
    "a regular expression of repetitions",
    "a long regular expression",
    "a schema of a million values",
    "a wide schema",
    "many tools",
}
COMPRESSED = gzip.compress(json.dumps({"inputs": "x" * 50_000_000}).encode())


class Honest:
    """Streams that read until they end; what they got is compared."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self.begun = threading.Semaphore(0)

    def read(self, number: int) -> bytes:
        """The tokens and texts of one stream, as bytes. Log-probabilities may differ in their last digits."""
        parameters: dict[str, Any] = {"max_new_tokens": NUM_TOKENS, "ignore_eos": True}
        if number % 2:
            parameters |= {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "seed": number}
        pieces = []
        with self._server.stream(STREAM, {"inputs": f"Tale {number}: once", "parameters": parameters}) as lines:
            for line in lines:
                if line.startswith("data: "):
                    event = json.loads(line.removeprefix("data: "))
                    event["token"].pop("logprob")
                    pieces.append(json.dumps(event).encode())
                    if len(pieces) == 1:
                        self.begun.release()
        assert len(pieces) == NUM_TOKENS
        return b"\n".join(pieces)


def _attack_by_bytes(server: Server) -> None:
    """What is no request: a body that lies about itself, headers without end, clients that leave at once."""
    head = b"POST /generate HTTP/1.1\r\nHost: a\r\n"
    for sent in (
        head + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        head + b"Content-Length: 10\r\nContent-Length: 20\r\n\r\n{}",
        head + b"X: " + b"y" * 100_000 + b"\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        head + b"Content-Length: 1000\r\n\r\n{",
        head,
    ):
        with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
            connection.sendall(sent)
    for _ in range(4):
        with server.stream(STREAM, {"inputs": "Leaving", "parameters": {"max_new_tokens": 200}}) as lines:
            next(lines)
    short = {"inputs": "Hello", "parameters": {"max_new_tokens": 1}}
    assert server.post(GENERATE, short, headers={"x-request-id": "id\x1b[0m"}).status == 400
    headers = {"x-request-id": "x" * 2000, "traceparent": "00-" + "f" * 5000}
    assert server.post(GENERATE, short, headers=headers).status == 200


def test_honest_streams_do_not_notice(exact: Server) -> None:
    with ThreadPoolExecutor(NUM_STREAMS) as pool:
        undisturbed = [*pool.map(Honest(exact).read, range(NUM_STREAMS))]
        honest = Honest(exact)
        streams = [pool.submit(honest.read, number) for number in range(NUM_STREAMS)]
        for _ in streams:
            assert honest.begun.acquire(timeout=60)
        assert not any(stream.done() for stream in streams)
        with ThreadPoolExecutor(4) as hostile:
            replies = hostile.map(lambda body: exact.request("POST", *body), REFUSED.values())
        for name, reply in zip(REFUSED, replies, strict=True):
            is_borne = name in BORNE and reply.status == 200
            assert is_borne or 400 <= reply.status < 500, (name, reply.status, reply.body[:300])
        reply = exact.request("POST", GENERATE, COMPRESSED, {"Content-Encoding": "gzip"})
        assert reply.status == 415
        _attack_by_bytes(exact)
        assert [stream.result() for stream in streams] == undisturbed
    samples = exact.check_books()
    assert samples["tgi_request_failure", "generation"] == samples["tgi_request_failure", "incomplete"] == 0
    assert "Traceback" not in exact.log()
