"""Each feature of a request with each other one: an answer that keeps what both promise, or an error that is typed."""

from __future__ import annotations

import itertools
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conftest import Server

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
PATTERN = "[a-f]{4,9}"
# Longer than a step of 64 tokens; its text is bytes, as the tiny model's tokens are.
LONG, SHORT = "lorem ipsum dolor sit amet " * 6, "hello"

FEATURES: dict[str, dict[str, Any]] = {
    "grammar": {"response_format": {"type": "regex", "value": PATTERN}},
    "tools": {"tools": [TOOL], "tool_choice": "required"},
    "stop": {"stop": ["a", "7"]},
    "logprobs": {"logprobs": True, "top_logprobs": 2},
    "n": {"n": 2},
    "best_of": {"best_of": 3},
    "penalties": {"repetition_penalty": 1.3, "frequency_penalty": 0.5, "presence_penalty": -0.5},
    "seed": {"seed": 11},
    "streaming": {"stream": True, "stream_options": {"include_usage": True}},
    "chunked prefill": {"messages": [{"role": "user", "content": LONG}]},
    "preemption": {},
    "prefix hit": {},
}


@pytest.fixture(scope="module")
def small(serve: Any, tiny_model: Path) -> Iterator[Server]:
    """Little memory and short steps."""
    flags = [
        "--model-id", str(tiny_model), "--dtype", "float32",
        "--max-batch-prefill-tokens", "64", "--max-batch-total-tokens", "1024", "--max-total-tokens", "700",
        "--max-best-of", "4",
    ]  # fmt: skip
    with serve(*flags) as server:
        yield server


def ask(server: Server, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """The answer, or the error; a stream is folded."""
    if not body.get("stream"):
        reply = server.post("/v1/chat/completions", body)
        return reply.status, reply.json()
    first = server.post("/v1/chat/completions", body)
    if first.status != 200:
        return first.status, first.json()
    events = [json.loads(block.removeprefix("data: ")) for block in first.body.decode().split("\n\n")[:-2]]
    choices: dict[int, dict[str, Any]] = {}
    for event in events:
        for part in event["choices"]:
            choice = choices.setdefault(
                part["index"],
                {"index": part["index"], "message": {"content": "", "role": "", "arguments": ""}, "logprobs": None},
            )
            delta = part["delta"]
            choice["message"]["role"] += delta["role"]
            choice["message"]["content"] += delta.get("content") or ""
            for call in delta.get("tool_calls") or []:
                choice["message"]["arguments"] += call["function"]["arguments"]
            if part["logprobs"] is not None:
                choice["logprobs"] = {"content": (choice["logprobs"] or {"content": []})["content"]}
                choice["logprobs"]["content"] += part["logprobs"]["content"]
            choice["finish_reason"] = part["finish_reason"]
    return 200, {"choices": [choices[index] for index in sorted(choices)], "usage": events[-1]["usage"]}


def check_choice(choice: dict[str, Any], features: set[str]) -> int:
    """What each feature promises of one choice; answers its number of tokens, if that is known."""
    message, reason = choice["message"], choice["finish_reason"]
    content = message["content"] or ""
    assert message["role"] == "assistant"
    assert reason in ("stop", "length", "tool_calls")
    if "grammar" in features and reason == "stop" and "stop" not in features:
        assert re.fullmatch(PATTERN, content)
    if "tools" in features and reason == "tool_calls":
        arguments = message.get("arguments") or message["tool_calls"][0]["function"]["arguments"]
        assert isinstance(json.loads(arguments), dict)
    if "stop" in features and "tools" not in features:
        assert "a" not in content
        assert "7" not in content
    if "logprobs" not in features:
        assert choice["logprobs"] is None
        return -1
    scores = choice["logprobs"]["content"]
    for one in scores:
        assert one["logprob"] <= 0
        assert len(one["top_logprobs"]) <= 2
        values = [best["logprob"] for best in one["top_logprobs"]]
        assert values == sorted(values, reverse=True)
    return len(scores)


def load(server: Server, number: int) -> int:
    body = {"prompt": f"{number} {SHORT}" * 8, "max_tokens": 180, "ignore_eos": True, "seed": number}
    return server.post("/v1/completions", body).status


@pytest.mark.parametrize("pair", list(itertools.combinations(FEATURES, 2)), ids=" and ".join)
def test_each_pair(small: Server, pair: tuple[str, str]) -> None:
    features = set(pair)
    body: dict[str, Any] = {"messages": [{"role": "user", "content": SHORT * 5}], "max_tokens": 24, "seed": 3}
    for name in pair:
        body |= FEATURES[name]
    status, answer = ask(small, body)
    if status != 200:
        assert 400 <= status < 500
        assert answer["error_type"] in ("validation", "tool_error"), answer
        assert answer["error"]["message"]
        assert features in ({"grammar", "tools"}, {"best_of", "streaming"}), answer
        return
    assert [choice["index"] for choice in answer["choices"]] == list(range(body.get("n", 1)))
    num_tokens = sum(check_choice(choice, features) for choice in answer["choices"])
    if "logprobs" in features and "best_of" not in features:
        assert num_tokens == answer["usage"]["completion_tokens"]
    if "n" in features and not features & {"grammar", "tools"}:
        first, second = answer["choices"]
        assert first["message"] != second["message"]
    if "preemption" in features:
        with ThreadPoolExecutor(8) as pool:
            neighbours = [pool.submit(load, small, number) for number in range(7)]
            again = ask(small, body)[1]
            assert {one.result() for one in neighbours} == {200}
    else:
        again = ask(small, body)[1]
        if "prefix hit" in features:
            assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    if "best_of" in features:
        # Mean log-probabilities may be equal but for the last digit.
        return
    texts = [[(one["message"]["content"], one["finish_reason"]) for one in each["choices"]] for each in (answer, again)]
    assert texts[0] == texts[1], "a seed gives the same answer again"


def test_the_load_preempts(small: Server) -> None:
    """Else the pairs above say nothing of it."""
    with ThreadPoolExecutor(8) as pool:
        assert {one.result() for one in [pool.submit(load, small, number) for number in range(8)]} == {200}
    assert small.metric("tgi_preemptions") > 0
    small.check_books()
