"""The clients that people use, unmodified, against the embedded demo model in float32.

Most of them need other versions of what the server needs, and one has the server's own name, so they live in an
environment of their own: `.venv/clients`, made by `make install` from clients/requirements.txt.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from conftest import Server

PARIS = "The capital of France is Paris."  # as transformers answers in float32
NUM_TOKENS = 8  # of that answer, the end of the turn included
CALLS = Path(__file__).with_name("clients") / "calls.py"
CLIENTS_PYTHON = Path(sys.prefix, "clients", "bin", "python")
OTHERS = ("text_generation", "huggingface_hub", "litellm", "langchain_huggingface", "sse")


def call_all(python: Path, url: str, *libraries: str) -> dict[str, Any]:
    assert python.exists(), f"{python} is missing: run `make install`"
    # No proxy, no hub, no paths of ours: only the client and the server.
    environment = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/")}
    environment |= {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_TELEMETRY": "False", "NO_PROXY": "*"}
    command = [str(python), str(CALLS), url, *libraries]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    results: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return results


@pytest.fixture(scope="module")
def all_results(exact: Server) -> tuple[dict[str, Any], dict[str, Any]]:
    """What every call gave. The libraries call at once, which costs less than one after the other."""
    with ThreadPoolExecutor(len(OTHERS) + 1) as pool:
        newest = pool.submit(call_all, Path(sys.executable), exact.url, "huggingface_hub")
        others = pool.map(lambda library: call_all(CLIENTS_PYTHON, exact.url, library), OTHERS)
        return {name: result for one in others for name, result in one.items()}, newest.result()


@pytest.fixture(scope="module")
def results(all_results: tuple[dict[str, Any], dict[str, Any]]) -> dict[str, Any]:
    """In the clients' environment."""
    return all_results[0]


@pytest.fixture(scope="module")
def newest_hub(all_results: tuple[dict[str, Any], dict[str, Any]]) -> dict[str, Any]:
    """By the newest huggingface_hub, the one that the server itself uses."""
    return all_results[1]


@pytest.fixture(params=["results", "newest_hub"])
def hub(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The results of both huggingface_hubs."""
    found: dict[str, Any] = request.getfixturevalue(request.param)
    return found


def good(results: dict[str, Any], name: str) -> Any:
    result = results[name]
    assert not (isinstance(result, dict) and "failure" in result), result["failure"]
    return result


def test_hub_text_generation(hub: dict[str, Any]) -> None:
    assert good(hub, "hub_generate") == {
        "text": PARIS,
        "streamed": PARIS,
        "last": PARIS,
        "finish": ["eos_token", "eos_token"],
        "num_tokens": [NUM_TOKENS] * 3,
        "full_text": PARIS,
    }


def test_hub_chat(hub: dict[str, Any]) -> None:
    assert good(hub, "hub_chat") == {
        "text": PARIS,
        "streamed": PARIS,
        "finish": ["stop", "stop"],
        "num_tokens": [NUM_TOKENS] * 3,
        "usage": NUM_TOKENS,
    }
    assert good(hub, "hub_async_chat") == PARIS


def test_hub_errors(hub: dict[str, Any]) -> None:
    whole, stream, chat = good(hub, "hub_errors")
    assert whole.startswith("ValidationError: Input validation error: `top_n_tokens` must be >= 0 and <= 5. Given: 50")
    assert stream == whole
    assert "422" in chat
    assert "`temperature` must be strictly positive" in chat


def test_text_generation(results: dict[str, Any]) -> None:
    assert good(results, "tgi_generate") == {
        "text": PARIS,
        "streamed": PARIS,
        "last": PARIS,
        "finish": ["FinishReason.EndOfSequenceToken"] * 2,
        "num_tokens": [NUM_TOKENS] * 3,
    }
    assert good(results, "tgi_async_generate") == [PARIS, PARIS]
    assert good(results, "tgi_chat") == {"text": PARIS, "streamed": PARIS, "finish": ["stop", "stop"]}


def test_text_generation_errors(results: dict[str, Any]) -> None:
    """The empty prompt is refused by the client itself, the others by the server; all are one kind of error."""
    whole, empty, stream = good(results, "tgi_errors")
    assert whole == stream == "Input validation error: `top_n_tokens` must be >= 0 and <= 5. Given: 50"
    assert "empty" in empty


def test_litellm(results: dict[str, Any]) -> None:
    assert good(results, "litellm_chat") == {
        "text": PARIS,
        "streamed": PARIS,
        "finish": ["stop", "stop"],
        "usage": [NUM_TOKENS, NUM_TOKENS],
        "role": "assistant",
    }
    assert good(results, "litellm_completion") == {"text": PARIS, "streamed": PARIS}
    kind, status, message = good(results, "litellm_errors")
    assert status in (400, 422), kind
    assert "`temperature` must be strictly positive" in message


def test_langchain(results: dict[str, Any]) -> None:
    # This client shows the text of special tokens in streams, from any server.
    generated = {"text": PARIS, "streamed": f"{PARIS}<|im_end|>", "stopped": "The capital of France "}
    assert good(results, "langchain_generate") == generated
    assert good(results, "langchain_chat") == {
        "text": PARIS,
        "streamed": PARIS,
        "finish": "stop",
        "usage": NUM_TOKENS,
    }


STRUCTURED = ("hub_structured", "tgi_structured", "litellm_structured", "langchain_structured")


@pytest.mark.parametrize("name", [*STRUCTURED, "newest"])
def test_forms_and_tool_calls(request: pytest.FixtureRequest, name: str) -> None:
    """Whole and streamed; the schema is one of an object, though it does not say so."""
    if name == "newest":
        found = good(request.getfixturevalue("newest_hub"), "hub_structured")
    else:
        found = good(request.getfixturevalue("results"), name)
    texts = [*found.get("chats", []), *([found["raw"]] if "raw" in found else [])]
    assert texts
    for text in texts:
        assert text.keys() == {"city", "big"}
        assert (type(text["city"]), type(text["big"])) == (str, bool)
    assert {text["city"] for text in found.get("chats", [])} <= {"Paris"}
    assert all(calls == [["get_weather", {"city": "Paris"}]] for calls in found["calls"])


def test_two_parsers_of_server_sent_events(results: dict[str, Any]) -> None:
    first, second = good(results, "httpx_sse_stream"), good(results, "sseclient_stream")
    assert first == second
    assert first["streamed"] == PARIS
    assert first["done"] == "[DONE]"
    assert first["pieces"] == first["generated_text"]
    assert not first["generated_text"].isascii()
    assert "\ufffd" not in first["generated_text"].rstrip("\ufffd")  # the limit may cut the last character
    [failed] = first["failed"]
    assert failed["error_type"] == "validation"


def test_a_stream_may_be_cut_anywhere(results: dict[str, Any]) -> None:
    splits = good(results, "sse_splits")
    assert splits["num_events"] > 5
    assert splits["num_cuts"] > 500
    assert splits["wrong"] == []
