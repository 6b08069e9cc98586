"""Request sets: read from files, and made again from their seed."""

import pytest
from text_generation_launcher.benchmark.request_sets import (
    SETS,
    BadRequestSet,
    LoadRequest,
    make_requests,
    read_requests,
    write_requests,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers


@pytest.fixture(scope="module")
def byte_tokenizer(tmp_path_factory):
    """One token for each byte, so that a prompt has as many tokens as bytes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    folder = tmp_path_factory.mktemp("bytes")
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("name", SETS)
def test_a_seed_makes_one_set(byte_tokenizer, name):
    first = make_requests(name, byte_tokenizer, 1)
    assert first == make_requests(name, byte_tokenizer, 1)
    assert first != make_requests(name, byte_tokenizer, 2)


@pytest.mark.parametrize(
    ("name", "count", "prompt_tokens", "max_tokens"),
    [
        ("chat", 1000, (8, 1536), (8, 768)),
        ("summarize", 160, (2000, 7000), (64, 256)),
        ("uniform", 256, (100, 1024), (100, 1024)),
        ("sharedprefix", 500, (2041, 2161), (64, 192)),
        ("small-chat", 160, (8, 512), (8, 128)),
        ("small-longprompt", 16, (1000, 1600), (16, 16)),
        ("small-sharedprefix", 80, (617, 649), (16, 48)),
    ],
)
def test_sizes(byte_tokenizer, name, count, prompt_tokens, max_tokens):
    requests = make_requests(name, byte_tokenizer, 1)
    assert len(requests) == count
    lengths = [len(request.prompt.encode()) for request in requests]
    assert prompt_tokens[0] <= min(lengths)
    assert max(lengths) <= prompt_tokens[1]
    assert all(max_tokens[0] <= request.max_tokens <= max_tokens[1] for request in requests)


def test_shared_prefixes_are_shared(byte_tokenizer):
    assert len({request.prompt.encode()[:2000] for request in make_requests("sharedprefix", byte_tokenizer, 1)}) == 10


def test_sizes_hold_for_the_demo_models_tokenizer(demo_folder):
    tokenizer = Tokenizer.from_file(str(demo_folder / "tokenizer.json"))
    requests = make_requests("small-longprompt", demo_folder, 1)
    lengths = [len(tokenizer.encode(request.prompt).ids) for request in requests]
    assert min(lengths) >= 1000 - 5
    assert max(lengths) <= 1600 + 5


def test_what_is_written_is_read_again(tmp_path):
    requests = [LoadRequest('é\n\u2028 "x"', 3), LoadRequest([1, 2], 1)]
    write_requests(tmp_path / "set.jsonl", requests)
    assert read_requests(tmp_path / "set.jsonl") == requests


def test_other_names_of_the_fields(tmp_path):
    path = tmp_path / "set.jsonl"
    path.write_text('{"prompt_ids": [5], "max_tokens": 2}\n\n{"text": "a", "output_tokens": 3}\n')
    assert read_requests(path) == [LoadRequest([5], 2), LoadRequest("a", 3)]


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        '{"prompt": "a"}',
        '{"max_tokens": 1}',
        '{"prompt": "", "max_tokens": 1}',
        '{"prompt": "a", "max_tokens": 0}',
        '{"prompt": "a", "max_tokens": true}',
        '{"prompt": ["a"], "max_tokens": 1}',
        '{"prompt": "a", "text": "a", "max_tokens": 1}',
    ],
)
def test_a_bad_line_is_named(tmp_path, line):
    path = tmp_path / "set.jsonl"
    path.write_text('{"prompt": "a", "max_tokens": 1}\n' + line)
    with pytest.raises(BadRequestSet, match="line 2"):
        read_requests(path)


def test_an_empty_or_missing_file(tmp_path):
    with pytest.raises(BadRequestSet, match="cannot be read"):
        read_requests(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(BadRequestSet, match="no request"):
        read_requests(tmp_path / "empty.jsonl")
    with pytest.raises(BadRequestSet, match=r"tokenizer\.json"):
        make_requests("chat", tmp_path, 1)
