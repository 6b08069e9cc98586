"""The demo model in float32 equals `transformers` greedy, token for token, however the server computes it.

The reference reads each answer in one pass and says at every position which token it would have chosen there, given
what came before. Greedy decoding is right if and only if each token is that choice. Where the reference's own best
two logits are closer than TIE, either is right; the answer goes on from the one taken, and so does the reference.
"""

from __future__ import annotations

import pydoc_data.topics
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from conftest import Server

NUM_NEW_TOKENS = 32
TIE = 3e-4
MAX_TIE_SHARE = 0.01
# Around the block size of 16 and the step sizes of 64 and 256, and long ones.
LENGTHS = [1, 700, 15, 333, 16, 120, 17, 1500, 90, 257]
MORE_LENGTHS = [2, 3, 5, 8, 31, 32, 33, 47, 48, 63, 64, 65, 79, 100, 127, 128, 129, 150, 200, 230, 255, 256, 300, 400,
                511, 512, 600, 900, 1100, 1300]  # fmt: skip


@dataclass(frozen=True)
class Prompt:
    """A text and the ids that it must become."""

    text: str
    ids: tuple[int, ...]


class Reference:
    """The demo model as `transformers` runs it, in float32."""

    def __init__(self, weights: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import torch
            from transformers import AutoModelForCausalLM, AutoTokenizer

            options: dict[str, Any] = {"gguf_file": weights.name}
            self._tokenizer: Any = AutoTokenizer.from_pretrained(weights.parent, **options)
            self._model: Any = AutoModelForCausalLM.from_pretrained(weights.parent, dtype=torch.float32, **options)
        self._torch = torch
        self._ties: dict[tuple[int, ...], int] = {}

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a text."""
        return tuple(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode(self, ids: tuple[int, ...]) -> str:
        """The text of token ids."""
        text: str = self._tokenizer.decode(list(ids))
        return text

    def num_ties(self, prompt: Prompt, tokens: tuple[int, ...]) -> int:
        """Check an answer; returns at how many positions its token is not the best but ties with it."""
        sequence = prompt.ids + tokens
        if sequence not in self._ties:
            self._ties[sequence] = self._check(sequence, len(tokens))
        return self._ties[sequence]

    def _check(self, sequence: tuple[int, ...], num_tokens: int) -> int:
        torch = self._torch
        ids = torch.tensor([sequence[:-1]])
        with torch.inference_mode():
            logits = self._model(ids, logits_to_keep=num_tokens).logits[0]  # [num_tokens, vocab_size]
        chosen = logits[torch.arange(num_tokens), torch.tensor(sequence[-num_tokens:])]
        behind = logits.max(dim=-1).values - chosen
        assert behind.max() < TIE, (
            f"prompt of {len(sequence) - num_tokens} tokens: token {int(behind.argmax())} is {float(behind.max()):.4f} "
            "behind the best"
        )
        return int((logits.argmax(dim=-1) != torch.tensor(sequence[-num_tokens:])).sum())


@pytest.fixture(scope="session")
def reference(demo_weights: Path) -> Reference:
    return Reference(demo_weights)


@pytest.fixture(scope="session")
def make_prompts(reference: Reference) -> Any:
    """Cuts prompts of given lengths out of Python's documentation, each text of which becomes the very same ids."""
    corpus = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))[:400_000]
    ids = reference.encode(corpus)

    def make(lengths: list[int]) -> list[Prompt]:
        prompts = []
        start = 0
        for length in lengths:
            while True:
                piece = ids[start : start + length]
                assert len(piece) == length, "the corpus is used up"
                text = reference.decode(piece)
                start += length
                if reference.encode(text) == piece:
                    prompts.append(Prompt(text, piece))
                    break
        return prompts

    return make


def ask(server: Server, prompt: Prompt) -> tuple[int, ...]:
    parameters = {"max_new_tokens": NUM_NEW_TOKENS, "ignore_eos": True, "details": True}
    reply = server.post("/generate", {"inputs": prompt.text, "parameters": parameters})
    assert reply.status == 200, reply.body
    assert reply.headers["x-prompt-tokens"] == str(len(prompt.ids))
    tokens = tuple(token["id"] for token in reply.json()["details"]["tokens"])
    assert len(tokens) == NUM_NEW_TOKENS
    return tokens


def check_at_once(server: Server, reference: Reference, prompts: list[Prompt]) -> None:
    """Send all prompts at the same time and check every token of every answer."""
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(lambda prompt: ask(server, prompt), prompts))
    num_ties = sum(reference.num_ties(prompt, tokens) for prompt, tokens in zip(prompts, answers, strict=True))
    assert num_ties <= MAX_TIE_SHARE * NUM_NEW_TOKENS * len(prompts)
    server.wait_idle()


@pytest.fixture(scope="module", params=["defaults", "chunked", "three shards"])
def variant(request: pytest.FixtureRequest, serve: Any) -> Iterator[Server]:
    flags = {"chunked": ["--max-batch-prefill-tokens", "64"], "three shards": ["--num-shard", "3"]}
    if request.param == "defaults":
        yield request.getfixturevalue("exact")
        return
    with serve("--dtype", "float32", *flags[request.param]) as server:
        yield server


def test_prompts_sent_at_once(variant: Server, reference: Reference, make_prompts: Any) -> None:
    check_at_once(variant, reference, make_prompts(LENGTHS))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_forty_prompts_sent_at_once(variant: Server, reference: Reference, make_prompts: Any) -> None:
    check_at_once(variant, reference, make_prompts(LENGTHS + MORE_LENGTHS))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_forty_prompts_found_in_the_cache(exact: Server, reference: Reference, make_prompts: Any) -> None:
    prompts = make_prompts(LENGTHS + MORE_LENGTHS)
    check_at_once(exact, reference, prompts)
    hits = exact.metric("tgi_prefix_cache_hit_tokens")
    check_at_once(exact, reference, prompts)
    most = sum((len(prompt.ids) - 1) // 16 * 16 for prompt in prompts)
    assert exact.metric("tgi_prefix_cache_hit_tokens") - hits == most


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_forty_prompts_preempted(serve: Any, reference: Reference, make_prompts: Any) -> None:
    flags = ("--max-batch-total-tokens", "1536", "--max-queued-tokens", "20000")
    with serve("--dtype", "float32", *flags) as server:
        check_at_once(server, reference, make_prompts(LENGTHS + MORE_LENGTHS))
        assert server.metric("tgi_preemptions") > 0


def test_prefix_hits(exact: Server, reference: Reference, make_prompts: Any) -> None:
    """The same prompts again, and new ones that share the beginning of an earlier one."""
    first, second = make_prompts([120, 333])
    check_at_once(exact, reference, [first, second])
    hits = exact.metric("tgi_prefix_cache_hit_tokens")
    check_at_once(exact, reference, [first, second])
    # All full blocks of 16 but the one that holds the last prompt token.
    assert exact.metric("tgi_prefix_cache_hit_tokens") - hits == 112 + 320

    hits = exact.metric("tgi_prefix_cache_hit_tokens")
    tails = [" The first", " Another way to say it", "\n\nFor example:\n"]
    shared = [_prompt(reference, second.text + tail) for tail in tails]
    assert all(prompt.ids[:320] == second.ids[:320] for prompt in shared)
    check_at_once(exact, reference, shared)
    assert exact.metric("tgi_prefix_cache_hit_tokens") - hits >= 3 * 320


def test_prefix_hits_on_generated_tokens(exact: Server, reference: Reference, make_prompts: Any) -> None:
    """The next turn of a conversation finds the answer before it in the cache."""
    (first,) = make_prompts([90])
    answer = ask(exact, first)
    prompt = _prompt(reference, reference.decode(first.ids + answer) + " And then")
    assert prompt.ids[: 90 + NUM_NEW_TOKENS] == first.ids + answer, "the text must become the same ids again"
    hits = exact.metric("tgi_prefix_cache_hit_tokens")
    check_at_once(exact, reference, [prompt])
    assert exact.metric("tgi_prefix_cache_hit_tokens") - hits == 112  # 121 tokens computed: seven blocks of 16


def test_preemptions(serve: Any, reference: Reference, make_prompts: Any) -> None:
    """KV memory for the longest prompt alone: the others do not all fit with what they generate."""
    with serve("--dtype", "float32", "--max-batch-total-tokens", "1536") as server:
        check_at_once(server, reference, make_prompts(LENGTHS))
        check_at_once(server, reference, make_prompts([90] * 16))
        assert server.metric("tgi_preemptions") > 0


def _prompt(reference: Reference, text: str) -> Prompt:
    return Prompt(text, reference.encode(text))
