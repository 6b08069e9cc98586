"""A seed gives the same tokens whatever else is in the batch (float32)."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from conftest import Server

PROMPT, NUM_TOKENS = "Once upon a time", 12
SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7, "top_k": 40},
    {"temperature": 1.3, "top_p": 0.9},
    {"typical_p": 0.9, "repetition_penalty": 1.2, "frequency_penalty": 0.5, "top_n_tokens": 2},
    {"watermark": True, "stop": ["never to be seen"]},
    {"grammar": {"type": "regex", "value": "([a-z]{3}[!-?]){8}"}, "top_p": 0.9, "ignore_eos": False},
]
# As /v1/completions has them; each goes on for a time of its own.
NEIGHBOURS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0, "repetition_penalty": 1.5},
    {"temperature": 0, "logit_bias": {"30": 3, "28": -100}},
    {"temperature": 0.3, "logprobs": 5},
    {"temperature": 2.0, "top_k": 3},
    {"top_p": 0.5},
    {"min_p": 0.2},
    {"typical_p": 0.4},
    {"presence_penalty": 2.0},
    {"frequency_penalty": -2.0},
    {"min_tokens": 5, "ignore_eos": False},
    {"stop_token_ids": [30, 28, 198], "min_tokens": 2},
    {"stop": ["e"]},
    {"response_format": {"type": "regex", "value": "[a-z ]{40,60}"}, "ignore_eos": False},
    {"echo": True, "logprobs": 1},
    {"n": 2},
]


def sampled_tokens(server: Server, seed: int, **parameters: Any) -> list[int]:
    parameters = {"ignore_eos": True, **parameters, "do_sample": True, "seed": seed, "details": True}
    parameters["max_new_tokens"] = NUM_TOKENS
    details = server.generate(PROMPT, **parameters)["details"]
    assert details["seed"] == seed
    return [token["id"] for token in details["tokens"]]


def be_a_neighbour(server: Server, number: int) -> None:
    prompt = f"{number} {PROMPT * (number % 5)}"
    body = {"prompt": prompt, "max_tokens": 6 + 2 * number, "seed": number, "ignore_eos": True, **NEIGHBOURS[number]}
    reply = server.post("/v1/completions", body)
    assert reply.status == 200, reply.body


def test_neighbours_change_nothing(exact: Server) -> None:
    assert len(NEIGHBOURS) == 16
    alone = [sampled_tokens(exact, 42, **parameters) for parameters in SETTINGS]
    assert alone[0] == sampled_tokens(exact, 42), "the same request twice"
    with ThreadPoolExecutor(len(NEIGHBOURS) + len(SETTINGS)) as pool:
        neighbours = [pool.submit(be_a_neighbour, exact, number) for number in range(len(NEIGHBOURS))]
        crowded = [pool.submit(sampled_tokens, exact, 42, **parameters) for parameters in SETTINGS]
        for one in neighbours:
            one.result()
        assert [one.result() for one in crowded] == alone


def test_other_seeds_give_other_tokens(exact: Server) -> None:
    """Those of a request's other choices follow from its own."""
    assert sampled_tokens(exact, 1) != sampled_tokens(exact, 2)
    body = {"prompt": PROMPT, "max_tokens": NUM_TOKENS, "seed": 1, "n": 2, "ignore_eos": True}
    first, again = ([one["text"] for one in exact.post("/v1/completions", body).json()["choices"]] for _ in range(2))
    assert first == again
    assert first[0] != first[1]
