"""Log-probabilities that the server tells, against `transformers` on the same weights (float32)."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conftest import Server

# Bytes, as the tiny model's tokens are; longer than a step, so that it is computed in chunks.
PROMPT = "the quick brown fox jumps over the lazy dog " * 4


@pytest.fixture(scope="module")
def scoring(serve: Any, tiny_model: Path) -> Iterator[Server]:
    flags = ("--enable-prefill-logprobs", "--max-batch-prefill-tokens", "64", "--max-batch-size", "8")
    with serve("--model-id", str(tiny_model), "--dtype", "float32", *flags) as server:
        yield server


@pytest.fixture(scope="module")
def logprobs_of(tiny_model: Path) -> Any:
    """Log-probabilities of every token at the place after each of these, in float64 terms."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch
        from transformers import LlamaForCausalLM

        model = LlamaForCausalLM.from_pretrained(tiny_model).eval()

    def compute(ids: list[int]) -> Any:
        with torch.inference_mode():
            return model(torch.tensor([ids])).logits[0].double().log_softmax(-1)

    return compute


def token_ids(server: Server, text: str) -> list[int]:
    return [token["id"] for token in server.post("/tokenize", {"inputs": text}).json()]


def test_prompt_scores(scoring: Server, logprobs_of: Any) -> None:
    """The same after a prefix hit would have been possible, and in any chunks."""
    ids = token_ids(scoring, PROMPT)
    expected = logprobs_of(ids)
    for _ in range(2):
        parameters = {"decoder_input_details": True, "max_new_tokens": 2}
        prefill = scoring.generate(PROMPT, **parameters)["details"]["prefill"]
        assert [token["id"] for token in prefill] == ids
        assert prefill[0]["logprob"] is None
        told = [token["logprob"] for token in prefill[1:]]
        assert told == pytest.approx([float(expected[i, ids[i + 1]]) for i in range(len(ids) - 1)], abs=1e-4)


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_what_an_evaluation_of_continuations_asks(scoring: Server, logprobs_of: Any, max_tokens: int) -> None:
    """As lm-evaluation-harness does: token ids in; sums and "is it greedy" of what follows the context out."""
    texts = [token_ids(scoring, text) for text in (PROMPT, "the quick", "a b c d e f g")]
    body = {"prompt": texts, "echo": True, "logprobs": 1, "max_tokens": max_tokens, "temperature": 0, "seed": 1234}
    reply = scoring.post("/v1/completions", body)
    assert reply.status == 200, reply.body
    for choice in sorted(reply.json()["choices"], key=lambda one: one["index"]):
        ids, columns = texts[choice["index"]], choice["logprobs"]
        expected = logprobs_of(ids)
        end = len(ids) if max_tokens == 0 else -1
        assert len(columns["tokens"]) == len(ids) + max_tokens
        told, best = columns["token_logprobs"][1:end], columns["top_logprobs"][1:end]
        rows = list(enumerate(ids[1:]))
        assert told == pytest.approx([float(expected[i, token]) for i, token in rows], abs=1e-4)
        is_greedy = [token == max(top.values()) for token, top in zip(told, best, strict=True)]
        assert is_greedy == [int(expected[i].argmax()) == token for i, token in rows]


def test_top_tokens_are_of_what_was_sampled_from(scoring: Server, logprobs_of: Any) -> None:
    """Temperature and bans included."""
    ids = token_ids(scoring, "abc")
    body = {
        "prompt": ids, "max_tokens": 6, "logprobs": 3, "temperature": 1.7, "seed": 9, "logit_bias": {"100": 5.0},
        "presence_penalty": 1.5, "ignore_eos": True,
    }  # fmt: skip
    columns = scoring.post("/v1/completions", body).json()["choices"][0]["logprobs"]
    body = {
        "inputs": "abc",
        "parameters": {"top_n_tokens": 3, "details": True, "max_new_tokens": 6, "temperature": 1.7},
    }
    details = scoring.post("/generate", body).json()["details"]
    assert len(columns["tokens"]) == 6
    generated = [token["id"] for token in details["tokens"]]
    for index, top in enumerate(details["top_tokens"]):
        expected = (logprobs_of(ids + generated[:index])[-1] / 1.7).log_softmax(-1)
        best = expected.sort(descending=True)
        assert [token["id"] for token in top] == best.indices[:3].tolist()
        assert [token["logprob"] for token in top] == pytest.approx(best.values[:3].tolist(), abs=1e-4)
        chosen = details["tokens"][index]
        assert chosen["logprob"] == pytest.approx(float(expected[chosen["id"]]), abs=1e-4)
