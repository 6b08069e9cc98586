"""Request sets: read from a file, or made from a fixed seed with a model's own tokenizer.

Prompts are pieces of one English text, the language reference that comes with Python, so that they have words as real
prompts do; a prompt is cut by tokens and sent as text. Sets made on another Python version may differ in words, not
in sizes.
"""

import json
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import orjson
from tokenizers import Tokenizer


class BadRequestSet(ValueError):
    """A request set that cannot be read or made; the text says where and why."""


@dataclass(frozen=True)
class LoadRequest:
    """One prompt, as text or token ids, and how many tokens it must bring."""

    prompt: str | list[int]
    max_tokens: int


def read_requests(path: Path) -> list[LoadRequest]:
    """Read lines of {"prompt": text or ids, "max_tokens": n}; `text`, `prompt_ids` and `output_tokens` do as well."""
    requests = []
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise BadRequestSet(f"{path} cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                requests.append(_read_request(orjson.loads(line)))
            except (ValueError, TypeError, KeyError) as error:
                raise BadRequestSet(f"{path}, line {number}: {error}") from error
    if not requests:
        raise BadRequestSet(f"{path} holds no request")
    return requests


def _read_request(fields: dict[str, Any]) -> LoadRequest:
    prompts = [fields[name] for name in ("prompt", "prompt_ids", "text") if name in fields]
    counts = [fields[name] for name in ("max_tokens", "output_tokens") if name in fields]
    if len(prompts) != 1 or len(counts) != 1:
        raise ValueError("needs one of prompt, prompt_ids, text, and one of max_tokens, output_tokens")
    is_ids = isinstance(prompts[0], list) and all(type(token_id) is int for token_id in prompts[0])
    if not prompts[0] or not (isinstance(prompts[0], str) or is_ids):
        raise ValueError("the prompt must be a text or a list of token ids, and not empty")
    if type(counts[0]) is not int or counts[0] < 1:
        raise ValueError("the number of tokens must be a whole number above 0")
    return LoadRequest(prompts[0], counts[0])


def write_requests(path: Path, requests: Iterable[LoadRequest]) -> None:
    """Write a set so that `read_requests` reads it."""
    lines = [json.dumps({"prompt": request.prompt, "max_tokens": request.max_tokens}) for request in requests]
    path.write_text("".join(line + "\n" for line in lines))


class Texts:
    """Random pieces of the text, and random sizes."""

    def __init__(self, tokenizer: Tokenizer, random_numbers: random.Random) -> None:
        self._tokenizer = tokenizer
        self._random = random_numbers
        text = "\n".join(topics[name] for name in sorted(topics))
        self._token_ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids

    def piece(self, num_tokens: int) -> str:
        """A text of about `num_tokens` tokens: cut within words, it may be one or two off when encoded again."""
        start = self._random.randrange(len(self._token_ids) - num_tokens)
        return str(self._tokenizer.decode(self._token_ids[start : start + num_tokens]))

    def uniform(self, lowest: int, highest: int) -> int:
        """A size, all from `lowest` to `highest` equally likely."""
        return self._random.randint(lowest, highest)

    def log_normal(self, mean: float, deviation: float, lowest: int, highest: int) -> int:
        """A size whose logarithm is normal, as lengths of chats are; cut to the range."""
        return int(min(highest, max(lowest, self._random.lognormvariate(mean, deviation))))

    def choice(self, items: list[str]) -> str:
        """One of several texts."""
        return self._random.choice(items)


def _chat(texts: Texts) -> list[LoadRequest]:
    """Many short prompts, few long ones."""
    return [
        LoadRequest(texts.piece(texts.log_normal(4.8, 1.1, 8, 1536)), texts.log_normal(5.0, 0.8, 8, 768))
        for _ in range(1000)
    ]


def _summarize(texts: Texts) -> list[LoadRequest]:
    """Long prompts, short answers."""
    return [LoadRequest(texts.piece(texts.uniform(2000, 7000)), texts.uniform(64, 256)) for _ in range(160)]


def _uniform(texts: Texts) -> list[LoadRequest]:
    """Prompts and answers of 100 to 1024 tokens."""
    return [LoadRequest(texts.piece(texts.uniform(100, 1024)), texts.uniform(100, 1024)) for _ in range(256)]


def _shared_prefix(texts: Texts) -> list[LoadRequest]:
    """Ten system prompts of 2000 tokens, each asked many short questions."""
    systems = [texts.piece(2000) for _ in range(10)]
    return [
        LoadRequest(f"{texts.choice(systems)}\n{texts.piece(texts.uniform(40, 160))}", texts.uniform(64, 192))
        for _ in range(500)
    ]


def _small_chat(texts: Texts) -> list[LoadRequest]:
    """Chats for a small model on a CPU."""
    return [
        LoadRequest(texts.piece(texts.log_normal(4.2, 0.9, 8, 512)), texts.log_normal(3.7, 0.6, 8, 128))
        for _ in range(160)
    ]


def _small_long_prompt(texts: Texts) -> list[LoadRequest]:
    """Prompts of 1000 to 1600 tokens for a small model on a CPU."""
    return [LoadRequest(texts.piece(texts.uniform(1000, 1600)), 16) for _ in range(16)]


def _small_shared_prefix(texts: Texts) -> list[LoadRequest]:
    """Four system prompts of 600 tokens for a small model on a CPU."""
    systems = [texts.piece(600) for _ in range(4)]
    return [
        LoadRequest(f"{texts.choice(systems)}\n{texts.piece(texts.uniform(16, 48))}", texts.uniform(16, 48))
        for _ in range(80)
    ]


SETS: dict[str, Callable[[Texts], list[LoadRequest]]] = {
    "chat": _chat,
    "summarize": _summarize,
    "uniform": _uniform,
    "sharedprefix": _shared_prefix,
    "small-chat": _small_chat,
    "small-longprompt": _small_long_prompt,
    "small-sharedprefix": _small_shared_prefix,
}


def make_requests(name: str, tokenizer_folder: Path, seed: int) -> list[LoadRequest]:
    """Make a set; equal arguments give equal sets, and each set has random numbers of its own."""
    path = tokenizer_folder / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise BadRequestSet(f"{path} cannot be read: {error}") from error
    return SETS[name](Texts(tokenizer, random.Random(f"{name} {seed}")))
