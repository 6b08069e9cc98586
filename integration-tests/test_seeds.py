"""A seed gives the same tokens whatever else is in the batch (float32)."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from conftest import Server

PROMPT = "Once upon a time"
NUM_NEIGHBOURS = 16


def sampled_tokens(server: Server, prompt: str, seed: int, num_tokens: int = 24, **parameters: Any) -> list[int]:
    parameters |= {"do_sample": True, "seed": seed, "max_new_tokens": num_tokens, "ignore_eos": True, "details": True}
    details = server.generate(prompt, **parameters)["details"]
    assert details["seed"] == seed
    return [token["id"] for token in details["tokens"]]


def test_neighbours_change_nothing(exact: Server) -> None:
    settings: list[dict[str, Any]] = [{}, {"temperature": 0.7, "top_k": 40}, {"temperature": 1.3, "top_p": 0.9}]
    alone = [sampled_tokens(exact, PROMPT, 42, **parameters) for parameters in settings]
    assert alone[0] == sampled_tokens(exact, PROMPT, 42), "the same request twice"
    with ThreadPoolExecutor(NUM_NEIGHBOURS + len(settings)) as pool:
        neighbours = [
            pool.submit(sampled_tokens, exact, f"{index} {PROMPT * (index % 5)}", index, 8 + 4 * index)
            for index in range(NUM_NEIGHBOURS)
        ]
        crowded = [pool.submit(sampled_tokens, exact, PROMPT, 42, **parameters) for parameters in settings]
        for one in neighbours:
            one.result()
        assert [one.result() for one in crowded] == alone


def test_another_seed_gives_other_tokens(exact: Server) -> None:
    assert sampled_tokens(exact, PROMPT, 1) != sampled_tokens(exact, PROMPT, 2)
