"""Each feature of a request with each other one: an answer that keeps what both promise, or an error that is typed."""

from __future__ import annotations

import itertools
import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conftest import Server

ARGUMENT = {"type": "string", "minLength": 40, "maxLength": 50}
PARAMETERS = {"type": "object", "properties": {"a": ARGUMENT}, "required": ["a"]}
TOOL = {"type": "function", "function": {"name": "f", "parameters": PARAMETERS}}
PATTERN, BEGUN_PATTERN = "[a-f]{45,60}", "[a-f]{0,60}"
# Longer than a step of 64 tokens; its text is bytes, as the tiny model's tokens are.
LONG, SHORT = "lorem ipsum dolor sit amet " * 6, "hello"
MAX_TOKENS = 70
BODY: dict[str, Any] = {
    "messages": [{"role": "user", "content": SHORT * 5}],
    "max_tokens": MAX_TOKENS,
    "seed": 3,
}
# Blocks of memory, of 16 tokens, and what a neighbour takes before it has generated anything.
NUM_BLOCKS, NEIGHBOUR_BLOCKS = 64, 9

FEATURES: dict[str, dict[str, Any]] = {
    "grammar": {"response_format": {"type": "regex", "value": PATTERN}},
    "tools": {"tools": [TOOL], "tool_choice": "required", "max_tokens": 300},
    "stop": {"stop": ["ab"]},
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
        "--max-batch-prefill-tokens", "64", "--max-batch-total-tokens", "1024", "--max-total-tokens", "1000",
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


@pytest.fixture(scope="module")
def plain_text(small: Server) -> str:
    """What is answered to the body of every pair without a feature."""
    body = {**BODY, "ignore_eos": True}
    return str(ask(small, body)[1]["choices"][0]["message"]["content"])


@pytest.fixture(scope="module")
def late_stop(plain_text: str) -> str:
    """Two characters that end that answer somewhere behind its middle."""
    pairs = [plain_text[start : start + 2] for start in range(len(plain_text) // 2, len(plain_text) - 1)]
    return next(pair for pair in pairs if pair.isascii() and pair not in plain_text[: len(plain_text) // 2])


def check_choice(choice: dict[str, Any], features: set[str], stops: list[str]) -> int:
    """What each feature promises of one choice; answers its number of tokens, if that is known."""
    message, reason = choice["message"], choice["finish_reason"]
    content = message["content"] or ""
    assert message["role"] == "assistant"
    assert reason in ("stop", "length", "tool_calls")
    if "grammar" in features:
        is_whole = reason == "stop" and "stop" not in features
        assert re.fullmatch(PATTERN if is_whole else BEGUN_PATTERN, content)
    if "tools" in features:
        assert content == ""
        assert "stop" in features or reason != "stop"
        if reason == "tool_calls":
            arguments = message.get("arguments") or message["tool_calls"][0]["function"]["arguments"]
            assert 40 <= len(json.loads(arguments)["a"]) <= 50
    if "stop" in features and "tools" not in features:
        assert not any(stop in content for stop in stops)
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


class Neighbours:
    """Streams that grow until there is no memory for them and a request that comes after them."""

    def __init__(self, server: Server, num_blocks_left: int) -> None:
        self._server = server
        self._count = (NUM_BLOCKS - num_blocks_left) // NEIGHBOUR_BLOCKS
        self._begun = threading.Semaphore(0)
        self._pool = ThreadPoolExecutor(self._count)

    def __enter__(self) -> None:
        self._work = [self._pool.submit(self._read, number) for number in range(self._count)]
        for _ in self._work:
            assert self._begun.acquire(timeout=60)

    def __exit__(self, *_: object) -> None:
        for one in self._work:
            one.result()
        self._pool.shutdown()

    def _read(self, number: int) -> None:
        body = {"prompt": f"{number} " + "y" * 126, "max_tokens": 200, "ignore_eos": True, "stream": True}
        with self._server.stream("/v1/completions", body) as lines:
            next(lines)
            self._begun.release()
            assert [*lines][-2:] == ["data: [DONE]\n", "\n"]


def num_blocks_of(answer: dict[str, Any]) -> int:
    """What a request takes to be let in beside eight others: its prompt, and the least that is kept free."""
    return -(-answer["usage"]["prompt_tokens"] // 16) + 6


def preempted(server: Server, body: dict[str, Any], num_blocks: int) -> dict[str, Any]:
    """The answer to a request that lost its memory on the way; on a busy machine one may come too late for that."""
    for _ in range(8):
        with Neighbours(server, num_blocks):
            answer = ask(server, body)[1]
        if answer["usage"]["recomputed_tokens"]:
            return answer
    pytest.fail("it was never preempted")


@pytest.mark.parametrize("pair", list(itertools.combinations(FEATURES, 2)), ids=" and ".join)
def test_each_pair(small: Server, late_stop: str, pair: tuple[str, str]) -> None:
    features, body = set(pair), dict(BODY)
    for name in pair:
        body |= FEATURES[name]
    if "stop" in features:
        body["stop"] = [*body["stop"], late_stop]
    if not features & {"grammar", "tools"}:
        body["ignore_eos"] = True
    status, answer = ask(small, body)
    if status != 200:
        assert 400 <= status < 500
        assert answer["error_type"] in ("validation", "tool_error"), answer
        assert answer["error"]["message"]
        assert features in ({"grammar", "tools"}, {"best_of", "streaming"}), answer
        return
    assert [choice["index"] for choice in answer["choices"]] == list(range(body.get("n", 1)))
    num_tokens = sum(check_choice(choice, features, body.get("stop", [])) for choice in answer["choices"])
    if "logprobs" in features and "best_of" not in features:
        assert num_tokens == answer["usage"]["completion_tokens"]
    if "n" in features and not features & {"grammar", "tools"}:
        first, second = answer["choices"]
        assert first["message"] != second["message"]
    if "preemption" in features:
        again = preempted(small, body, num_blocks_of(answer))
    else:
        again = ask(small, body | {"stream": False, "stream_options": None})[1]
        if "prefix hit" in features:
            assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    if "best_of" in features:
        # Mean log-probabilities may be equal but for the last digit.
        return
    texts = [
        [(one["message"]["content"] or "", one["finish_reason"]) for one in each["choices"]] for each in (answer, again)
    ]
    assert texts[0] == texts[1], "a seed gives the same answer again, streamed or not"


def test_a_stop_string_ends_the_plain_answer(small: Server, plain_text: str, late_stop: str) -> None:
    """Else the pairs above say nothing of it."""
    (choice,) = ask(small, {**BODY, "ignore_eos": True, "stop": late_stop})[1]["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == (plain_text.partition(late_stop)[0], "stop")


def test_nothing_is_left(small: Server) -> None:
    small.check_books()
