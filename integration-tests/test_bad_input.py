"""Requests that must be refused: the status and body the contract names, and the next request is served."""

from __future__ import annotations

import gzip
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from conftest import Reply, Server

KEY = "the key"
PAYLOAD_LIMIT = 100_000
PREFIX = "Input validation error: "
GENERATE, STREAM, COMPLETIONS, CHAT = "/generate", "/generate_stream", "/v1/completions", "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hello"}]

# Bodies that are no JSON object at all: name, body, status.
BODIES: list[tuple[str, bytes, int]] = [
    ("empty", b"", 400),
    ("cut off", b'{"inputs": "Hello"', 400),
    ("more than one", b'{"inputs": "Hello"} {}', 400),
    ("NaN", b'{"inputs": "Hello", "prompt": "Hello", "temperature": NaN, "parameters": {"temperature": NaN}}', 400),
    ("infinity", b'{"inputs": "Hello", "prompt": "Hello", "temperature": 1e999, "parameters": {"top_p": 1e999}}', 400),
    ("no UTF-8", b'{"inputs": "\xff\xfe", "prompt": "\xff\xfe"}', 400),
    ("half a surrogate pair", b'{"inputs": "\\ud800", "prompt": "\\ud800"}', 400),
    ("deep list", b"[" * 50_000, 400),
    ("deep list, closed", b'{"inputs": ' + b"[" * 20_000 + b"]" * 20_000 + b"}", 400),
    ("deep objects, closed", b'{"a":' * 5_000 + b"1" + b"}" * 5_000, 400),
    ("list", b"[]", 422),
    ("string", b'"Hello"', 422),
    ("null", b"null", 422),
    ("no fields", b"{}", 422),
]

# Parameters of /generate with a part of the reason: values out of range, and values of a wrong type.
RANGES: list[tuple[dict[str, Any], str]] = [
    ({"max_new_tokens": 0}, "`max_new_tokens` must be strictly positive"),
    ({"max_new_tokens": -1}, "`max_new_tokens` must be strictly positive"),
    ({"max_new_tokens": 100_000}, "`inputs` tokens + `max_new_tokens` must be <= 256"),
    ({"max_new_tokens": 2**63}, "`inputs` tokens + `max_new_tokens` must be <= 256"),
    ({"temperature": 0.0}, "`temperature` must be strictly positive"),
    ({"temperature": -0.5}, "`temperature` must be strictly positive"),
    ({"top_k": 0}, "`top_k` must be strictly positive"),
    ({"top_k": -3}, "`top_k` must be strictly positive"),
    ({"top_p": 0.0}, "`top_p` must be > 0.0 and < 1.0"),
    ({"top_p": 1.0}, "`top_p` must be > 0.0 and < 1.0"),
    ({"typical_p": 1.0}, "`typical_p` must be > 0.0 and < 1.0"),
    ({"repetition_penalty": 0.0}, "`repetition_penalty` must be strictly positive"),
    ({"frequency_penalty": 2.5}, "`frequency_penalty` must be >= -2.0 and <= 2.0"),
    ({"best_of": 0}, "`best_of` must be"),
    ({"top_n_tokens": 6}, "`top_n_tokens` must be"),
    ({"truncate": 0}, "`truncate` must be"),
    ({"truncate": 256}, "`truncate` must be"),
    ({"seed": -1}, "`seed` must be"),
    ({"stop": ["a", "b", "c", "d", "e"]}, "`stop` takes at most 4"),
    ({"stop": [""]}, "`stop` strings must have"),
    ({"adapter_id": "no such adapter"}, "`adapter_id`"),
]
TYPES: list[tuple[dict[str, Any], str]] = [
    ({"grammar": {"type": "no such grammar", "value": "a"}}, "`type` must be text, json_object"),
    ({"max_new_tokens": 1e3}, "`max_new_tokens` must be"),
    ({"max_new_tokens": "ten"}, "`max_new_tokens` must be"),
    ({"max_new_tokens": True}, "`max_new_tokens` must be"),
    ({"max_new_tokens": 2**80}, "`max_new_tokens` must be"),
    ({"temperature": "hot"}, "`temperature` must be a number"),
    ({"best_of": 3, "do_sample": True}, "`best_of` must be"),
    ({"seed": 1.5}, "`seed` must be"),
    ({"stop": [1]}, "`stop` must be"),
    ({"do_sample": "yes"}, "`do_sample` must be"),
    ({"grammar": "a*"}, "`grammar`"),
]

# Bodies of OpenAI's routes: path, body, error type, a part of the reason.
OPENAI: list[tuple[str, dict[str, Any], str, str]] = [
    (COMPLETIONS, {"prompt": ""}, "validation", "cannot be empty"),
    (COMPLETIONS, {"prompt": 5}, "validation", "`prompt` must be"),
    (COMPLETIONS, {"prompt": []}, "validation", "`prompt`"),
    (COMPLETIONS, {"prompt": ["a", 5]}, "validation", "`prompt` must be"),
    (COMPLETIONS, {"prompt": [[], "a"]}, "validation", "cannot be empty"),
    (COMPLETIONS, {"prompt": [-1]}, "validation", "token ids >= 0 and < 258"),
    (COMPLETIONS, {"prompt": [5, 258]}, "validation", "token ids >= 0 and < 258"),
    (COMPLETIONS, {"prompt": [2**40]}, "validation", "token ids >= 0 and < 258"),
    (COMPLETIONS, {"prompt": [5] * 300}, "validation", "must be <= 256"),
    (COMPLETIONS, {"prompt": ["a"] * 5}, "batch size exceeded", "at most 4 prompts"),
    (COMPLETIONS, {"prompt": "a", "suffix": "b"}, "validation", "`suffix`"),
    (COMPLETIONS, {"prompt": "a", "max_tokens": 0}, "validation", "`max_new_tokens` must be strictly positive"),
    (COMPLETIONS, {"prompt": "a", "temperature": -1}, "validation", "`temperature`"),
    (COMPLETIONS, {"prompt": "a", "logit_bias": {"5": 101}}, "validation", "`logit_bias`"),
    (CHAT, {}, "validation", "`messages`"),
    (CHAT, {"messages": []}, "validation", "`messages`"),
    (CHAT, {"messages": "Hello"}, "validation", "`messages`"),
    (CHAT, {"messages": ["Hello"]}, "validation", "`messages`"),
    (CHAT, {"messages": [{"content": "Hello"}]}, "validation", "`role`"),
    (CHAT, {"messages": [{"role": "user", "content": None}]}, "validation", "`content`"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "validation", "`content`"),
    (CHAT, {"messages": HELLO, "n": 3}, "validation", "`n` must be"),
    (CHAT, {"messages": HELLO, "max_tokens": -5}, "validation", "`max_new_tokens`"),
    (CHAT, {"messages": HELLO, "top_logprobs": 100}, "validation", "`top_logprobs`"),
    (CHAT, {"messages": HELLO, "presence_penalty": -3}, "validation", "`presence_penalty`"),
    (CHAT, {"messages": HELLO, "response_format": {"type": "poem"}}, "validation", "`type` must be text, json_object"),
    (CHAT, {"messages": HELLO, "stream": "yes"}, "validation", "`stream`"),
]


@pytest.fixture(scope="module")
def strict(serve: Any, tiny_model: Path) -> Iterator[Server]:
    flags = ["--model-id", str(tiny_model), "--max-total-tokens", "256", "--payload-limit", str(PAYLOAD_LIMIT)]
    with serve(*flags, environment={"API_KEY": KEY}, api_key=KEY) as server:
        yield server


@pytest.fixture(autouse=True)
def served_afterwards(strict: Server) -> Iterator[None]:
    yield
    assert strict.generate("Hello", max_new_tokens=1)["generated_text"] is not None
    strict.wait_idle()


def check_error(reply: Reply, path: str, status: int, error_type: str = "validation", reason: str = "") -> None:
    """Check an error's status and its body in the dialect of the path."""
    body = reply.json()
    assert (reply.status, body["error_type"]) == (status, error_type), body
    if path.startswith("/v1/"):
        assert set(body) == {"error", "error_type"}
        assert set(body["error"]) == {"message", "type", "param", "code"}
        assert body["error"]["type"] == error_type
        message = body["error"]["message"]
    else:
        assert set(body) == {"error", "error_type"}
        message = body["error"]
    if error_type == "validation":
        assert message.startswith(PREFIX)
    assert reason in message


@pytest.mark.parametrize("path", ["/", GENERATE, COMPLETIONS, CHAT])
@pytest.mark.parametrize(("name", "body", "status"), BODIES, ids=[name for name, _, _ in BODIES])
def test_bodies(strict: Server, path: str, name: str, body: bytes, status: int) -> None:
    check_error(strict.request("POST", path, body), path, status)


@pytest.mark.parametrize(("parameters", "reason"), RANGES + TYPES, ids=str)
def test_parameters(strict: Server, parameters: dict[str, Any], reason: str) -> None:
    check_error(strict.post(GENERATE, {"inputs": "Hello", "parameters": parameters}), GENERATE, 422, reason=reason)


@pytest.mark.parametrize(("parameters", "reason"), RANGES, ids=str)
def test_parameters_of_a_stream(strict: Server, parameters: dict[str, Any], reason: str) -> None:
    """The status is 200 whatever the validation says; the error is the only event."""
    (event,) = strict.events(STREAM, {"inputs": "Hello", "parameters": parameters})
    assert set(event) == {"error", "error_type"}
    assert event["error_type"] == "validation"
    assert event["error"].startswith(PREFIX)
    assert reason in event["error"]


@pytest.mark.parametrize("inputs", [5, None, ["Hello"], {"text": "Hello"}, ""])
def test_inputs(strict: Server, inputs: Any) -> None:
    check_error(strict.post(GENERATE, {"inputs": inputs}), GENERATE, 422, reason="`inputs`")


def test_parameters_of_the_wrong_type(strict: Server) -> None:
    wrong: list[object] = [[], "many", 5]
    for parameters in wrong:
        check_error(strict.post(GENERATE, {"inputs": "Hello", "parameters": parameters}), GENERATE, 422)


def test_input_that_is_too_long(strict: Server) -> None:
    reply = strict.post(GENERATE, {"inputs": "x" * 300, "parameters": {"max_new_tokens": 1}})
    reason = "`inputs` tokens + `max_new_tokens` must be <= 256. Given: 300 `inputs` tokens and 1 `max_new_tokens`"
    check_error(reply, GENERATE, 422, reason=reason)
    fitting = {"inputs": "x" * 255, "parameters": {"max_new_tokens": 1}}
    assert strict.post(GENERATE, fitting).status == 200
    check_error(strict.post(GENERATE, {"inputs": "x" * 256}), GENERATE, 422)


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize(("path", "body", "kind", "reason"), OPENAI, ids=[json.dumps(row[1])[:60] for row in OPENAI])
def test_openai(strict: Server, path: str, body: dict[str, Any], kind: str, reason: str, is_stream: bool) -> None:
    """Errors before the first event have their real status, in streams too."""
    reply = strict.post(path, {"stream": is_stream, **body})
    check_error(reply, path, 422, kind, reason)


@pytest.mark.parametrize("path", [GENERATE, STREAM, COMPLETIONS, CHAT])
def test_a_body_over_the_limit(strict: Server, path: str) -> None:
    body = json.dumps({"inputs": "x" * PAYLOAD_LIMIT}).encode()
    check_error(strict.request("POST", path, body), path, 413)


def test_a_chunked_body_over_the_limit(strict: Server) -> None:
    with socket.create_connection(("127.0.0.1", strict.port), timeout=10) as connection:
        head = (
            f"POST {GENERATE} HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEY}\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        connection.sendall(head.encode())
        piece = b"x" * 10_000
        for _ in range(2 * PAYLOAD_LIMIT // len(piece)):
            connection.sendall(b"%x\r\n%s\r\n" % (len(piece), piece))
        assert connection.recv(4096).startswith(b"HTTP/1.1 413 ")


def test_a_body_that_never_ends(strict: Server) -> None:
    with socket.create_connection(("127.0.0.1", strict.port), timeout=10) as connection:
        head = f"POST {GENERATE} HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEY}\r\nContent-Length: 1000\r\n\r\n"
        connection.sendall(head.encode() + b'{"inputs": "Hel')


def test_compressed_bodies(strict: Server) -> None:
    body = gzip.compress(json.dumps({"inputs": "Hello"}).encode())
    for encoding in ("gzip", "deflate", "br", "zstd", "gzip, gzip", "no such"):
        reply = strict.request("POST", GENERATE, body, {"Content-Encoding": encoding})
        check_error(reply, GENERATE, 415)


def test_any_content_type_is_read_as_json(strict: Server) -> None:
    body = json.dumps({"inputs": "Hello", "parameters": {"max_new_tokens": 1}}).encode()
    for content_type in ("text/plain", "application/octet-stream", ""):
        assert strict.request("POST", GENERATE, body, {"Content-Type": content_type}).status == 200


def test_without_the_key(strict: Server) -> None:
    body = json.dumps({"inputs": "Hello"}).encode()
    routes = [("POST", path) for path in ("/", GENERATE, STREAM, COMPLETIONS, CHAT)]
    routes += [("POST", "/no/such/path"), ("GET", "/no/such/path"), ("PUT", GENERATE), ("GET", GENERATE)]
    wrong = ["", "Bearer", f"Bearer {KEY.upper()}", f"Basic {KEY}", KEY, f"Bearer {KEY}x", f"Bearer {KEY[:-1]}"]
    for method, path in routes:
        for value in wrong:
            reply = strict.request(method, path, body, {"Authorization": value})
            assert (reply.status, reply.body) == (401, b""), (method, path, value)
    for path in ("/", "/health", "/ping", "/info", "/metrics", "/v1/models"):
        assert strict.get(path, headers={"Authorization": ""}).status == 200, path
    assert strict.request("POST", GENERATE, body, {"Authorization": f"bearer {KEY}"}).status == 200
    assert KEY not in strict.log()


def test_paths_and_methods(strict: Server) -> None:
    assert strict.get("/no/such/path").status == 404
    for method in ("GET", "PUT", "DELETE"):
        reply = strict.request(method, GENERATE)
        assert (reply.status, reply.headers["allow"]) == (405, "POST")
