"""Tokenizers made from GGUF metadata against the ones that transformers builds from the same fields."""

import inspect
import json
import pydoc_data.topics
import random
import re
from pathlib import Path
from typing import Any

import pytest
from text_generation_shard.gguf_file import open_gguf
from text_generation_shard.gguf_tokenizer import tokenizer_config, tokenizer_json
from text_generation_shard.model_config import UnsupportedModel
from text_generation_shard.model_files import _demo_file
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer
from transformers.integrations.gguf.gguf_tokenizer_mapping import convert_gguf_tokenizer
from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<empty_output>"]


def corpus() -> list[str]:
    """Prose, code, other scripts, emoji, numbers, runs of white space and special tokens in text."""
    topics = [text for topic in pydoc_data.topics.topics.values() for text in re.split(r"\n\n", topic)]
    code = inspect.getsource(inspect).split("\n\n")
    rng = random.Random(0)
    alphabet = "ab Z\t\n\r 019٣½Ⅷ.,'\"-_/\\<|>{}éßàñ\u0301ÅＡǅмирשלום你好日本한국ไทย\u200d😀👩‍👩‍👧🇩🇪\u00a0\u3000\ufffd"
    mixed = ["".join(rng.choices(alphabet, k=rng.randint(1, 40))) for _ in range(300)]
    marked = ["".join(rng.choices([*SPECIAL, "<|im_", "a", " ", "  ", "\n", "1", "12 "], k=8)) for _ in range(100)]
    fixed = [
        "",
        " ",
        "  ",
        "a  b   c",
        "1234567 12 1",
        " 1",
        "  1",
        "   12",
        "I'm we'LL don't 'S",
        "e\u0301 ñ",
        "x" * 300,
    ]
    texts = rng.sample(topics, 250) + rng.sample(code, 100) + mixed + marked + fixed
    assert len(texts) > 700
    return texts


def ours(metadata: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_str(json.dumps(tokenizer_json(metadata)))


def assert_equal_ids(tokenizer: Tokenizer, reference: Tokenizer) -> None:
    for text in corpus():
        assert tokenizer.encode(text).ids == reference.encode(text).ids, repr(text)
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == reference.decode(ids), repr(text)


@pytest.fixture(scope="module")
def demo_file() -> Path:
    try:
        return _demo_file()
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def metadata(demo_file: Path) -> dict[str, Any]:
    return open_gguf(demo_file).metadata


def by_transformers(metadata: dict[str, Any], architecture: str = "llama") -> Tokenizer:
    """What transformers builds from the fields of a GGUF file."""
    names = ("tokens", "merges", "scores", "token_type")
    fields = {name: metadata[f"tokenizer.ggml.{name}"] for name in names if f"tokenizer.ggml.{name}" in metadata}
    fields |= {"tokenizer_type": metadata["tokenizer.ggml.model"], "pre_tokenizer_type": metadata["tokenizer.ggml.pre"]}
    backend: Tokenizer = convert_gguf_tokenizer(architecture, fields)[0]
    backend.post_processor = None
    return backend


def test_the_demo_equals_transformers_with_the_models_own_digits(demo_file, metadata):
    """Transformers has no split for "smollm"; the model's own tokenizer takes digits one by one before the words."""
    reference = AutoTokenizer.from_pretrained(demo_file.parent, gguf_file=demo_file.name).backend_tokenizer
    tokenizer = ours(metadata)
    without_digits_behind_spaces = [text for text in corpus() if not re.search(r"\s[\d½Ⅷ٣]", text)]
    assert len(without_digits_behind_spaces) > 400
    for text in without_digits_behind_spaces:
        assert tokenizer.encode(text).ids == reference.encode(text).ids, repr(text)
    reference.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    assert_equal_ids(tokenizer, reference)


def test_the_written_files_load_in_transformers(demo_folder, metadata):
    reference = AutoTokenizer.from_pretrained(demo_folder)
    tokenizer = ours(metadata)
    for text in corpus()[::5]:
        assert reference(text)["input_ids"] == tokenizer.encode(text).ids
    assert (reference.bos_token, reference.eos_token, reference.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    messages = [{"role": "user", "content": "Hi"}]
    prompt = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("pre", ["llama-bpe", "tekken", "gpt-2", "default"])
def test_other_splits_equal_transformers(metadata, pre):
    metadata = metadata | {"tokenizer.ggml.pre": pre}
    reference = by_transformers(metadata)
    if pre in ("llama-bpe", "tekken"):
        reference.model.ignore_merges = True  # as in those models' own tokenizer.json
    assert_equal_ids(ours(metadata), reference)


def with_tokens(metadata: dict[str, Any], kinds: dict[str, int]) -> dict[str, Any]:
    """More tokens at the end of the vocabulary."""
    return metadata | {
        "tokenizer.ggml.tokens": [*metadata["tokenizer.ggml.tokens"], *kinds],
        "tokenizer.ggml.token_type": [*metadata["tokenizer.ggml.token_type"], *kinds.values()],
    }


def test_whole_tokens_first(metadata):
    """A word that is a token but that no merges lead to."""
    metadata = with_tokens(metadata, {"qzxqzx": 1})
    assert ours(metadata | {"tokenizer.ggml.pre": "llama-bpe"}).encode("qzxqzx").ids == [49152]
    assert len(ours(metadata | {"tokenizer.ggml.pre": "gpt-2"}).encode("qzxqzx").ids) > 1


def test_qwen2_equals_its_own_class(metadata):
    vocabulary = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    reference = Qwen2Tokenizer(vocab=vocabulary, merges=merges)
    special = [
        token for token, kind in zip(vocabulary, metadata["tokenizer.ggml.token_type"], strict=True) if kind == 3
    ]
    reference.add_special_tokens({"additional_special_tokens": [AddedToken(t, normalized=False) for t in special]})
    assert_equal_ids(ours(metadata | {"tokenizer.ggml.pre": "qwen2"}), reference.backend_tokenizer)


def test_control_tokens_are_special_and_user_defined_ones_visible(metadata):
    tokenizer = ours(with_tokens(metadata, {"<think>": 4, "<｜end▁of text｜>": 3}))
    ids = tokenizer.encode("a<think>b<｜end▁of text｜>").ids
    assert [token_id for token_id in ids if token_id >= 49152] == [49152, 49153]
    assert tokenizer.decode(ids) == "a<think>b"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "a<think>b<｜end▁of text｜>"


@pytest.mark.parametrize(
    ("pre", "flag", "is_added"),
    [("smollm", None, False), ("llama-bpe", None, True), ("llama-bpe", False, False), ("qwen2", True, True)],
)
def test_bos(metadata, pre, flag, is_added):
    metadata = {k: v for k, v in metadata.items() if k != "tokenizer.ggml.add_bos_token"} | {"tokenizer.ggml.pre": pre}
    if flag is not None:
        metadata["tokenizer.ggml.add_bos_token"] = flag
    bos = metadata["tokenizer.ggml.bos_token_id"]
    assert (ours(metadata).encode("Hi").ids[0] == bos) == is_added
    assert tokenizer_config(metadata)["add_bos_token"] == is_added


@pytest.fixture(scope="module")
def sentencepiece_metadata() -> dict[str, Any]:
    """A small sentencepiece-style model: trained words with scores, byte tokens, no merges."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.pre_tokenizer = pre_tokenizers.Split(Regex("▁*[^▁]*"), "isolated")
    texts = list(pydoc_data.topics.topics.values())[:40]
    trained.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=2000, show_progress=False))
    words = sorted(trained.get_vocab().items(), key=lambda item: item[1])
    characters = [word for word, _ in words if len(word) == 1]
    longer = [word for word, _ in words if len(word) > 1]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = ["<unk>", "<s>", "</s>", *bytes_, *longer, *characters, "▁▁▁▁"]
    tokens += [] if "▁" in tokens else ["▁"]
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(i) for i in range(len(tokens) - 259)],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def test_sentencepiece_equals_transformers(sentencepiece_metadata):
    """Transformers has this normaliser, the one of the original models, under the name of phi3."""
    reference = by_transformers(sentencepiece_metadata, "phi3")
    tokenizer = ours(sentencepiece_metadata | {"tokenizer.ggml.add_bos_token": False})
    texts = [*corpus(), "<s>Hello</s> there", "def f(x):\n    return x"]
    num_merged = 0
    for text in texts:
        ids = tokenizer.encode(text).ids
        assert ids == reference.encode(text).ids, repr(text)
        num_merged += sum(token_id >= 259 for token_id in ids)
        assert tokenizer.decode(ids) == reference.decode(ids)
    assert num_merged > 10_000
    bos_first = ours(sentencepiece_metadata).encode("Hello").ids
    assert bos_first == [1, *tokenizer.encode("Hello").ids]
    assert tokenizer.decode(bos_first) == "Hello"


def test_sentencepiece_without_the_first_space(sentencepiece_metadata):
    tokenizer = ours(sentencepiece_metadata | {"tokenizer.ggml.add_space_prefix": False})
    ids = tokenizer.encode(" the class", add_special_tokens=False).ids
    assert tokenizer.decode(ids) == " the class"
    assert tokenizer.encode("the class", add_special_tokens=False).ids != ids


REFUSED = [
    ({"tokenizer.ggml.model": "t5"}, "'t5' is not supported; supported: gpt2, llama"),
    ({"tokenizer.ggml.pre": "deepseek-llm"}, "'deepseek-llm' is not supported; supported: .*smollm"),
    ({"tokenizer.ggml.tokens": []}, "tokens is missing"),
    ({"tokenizer.ggml.merges": []}, "merges"),
    ({"tokenizer.ggml.merges": ["ab"]}, "merges"),
    ({"tokenizer.ggml.token_type": [1]}, "token types"),
    ({"tokenizer.ggml.bos_token_id": 10**6, "tokenizer.ggml.add_bos_token": True}, "bos_token_id"),
    ({"tokenizer.ggml.tokens": ["\udcff"]}, "UTF-8"),
    ({"tokenizer.ggml.model": "llama"}, "score"),
]


@pytest.mark.parametrize(("fields", "reason"), REFUSED)
def test_what_is_refused(metadata, fields, reason):
    with pytest.raises(UnsupportedModel, match=reason):
        tokenizer_json(metadata | fields)
