"""The detokenizer against one-shot decoding: Python's own of the same bytes, and the tokenizers library's."""

import itertools
import random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from text_generation_router.detokenizer import Detokenizer
from text_generation_router.tokenizer import Tokenizer
from text_generation_router.vocabulary import Vocabulary, build_vocabulary
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as BackendTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

SPELLING = bytes_to_unicode()
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
SPECIAL, SPACED = "<|im_end|>", "<a tool>"


def spell(chunk: bytes) -> str:
    return "".join(SPELLING[byte] for byte in chunk)


def byte_level(chunks: list[bytes]) -> tuple[Vocabulary, list[int]]:
    """A vocabulary with a token for each chunk, one special token and an added one, and the chunks' ids."""
    names = list(dict.fromkeys(spell(chunk) for chunk in chunks))
    tokenizer = BackendTokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(SPECIAL, special=True)])
    tokenizer.add_tokens([AddedToken(SPACED, special=False)])
    return build_vocabulary(tokenizer, BYTE_LEVEL, 0), [names.index(spell(chunk)) for chunk in chunks]


def released(vocabulary: Vocabulary, prompt: list[int], generated: list[int]) -> list[str]:
    detokenizer = Detokenizer(vocabulary, prompt)
    return [*(detokenizer.push(token_id) for token_id in generated), detokenizer.flush()]


def cut(data: bytes, cuts: list[int]) -> list[bytes]:
    ends = sorted({0, len(data), *(position % (len(data) + 1) for position in cuts)})
    return [data[start:end] for start, end in itertools.pairwise(ends)]


def is_unfinished(tail: bytes) -> bool:
    """Whether some bytes after `tail` would make it one character."""
    for first in (0x80, 0x90, 0xA0, 0xBF):
        for more in range(3):
            try:
                if tail and len((tail + bytes([first]) + b"\x80" * more).decode()) == 1:
                    return True
            except UnicodeDecodeError:
                pass
    return False


def settled_text(data: bytes) -> str:
    """Decoded text of `data` but for an unfinished character at its end."""
    unfinished = max((n for n in range(4) if n <= len(data) and is_unfinished(data[len(data) - n :])), default=0)
    return data[: len(data) - unfinished].decode("utf-8", "replace")


CUTS = st.lists(st.integers(0, 60), max_size=60)
TEXT = st.text(st.sampled_from("aé߿€한\ufffd\U0001f600\U0010ffff "), min_size=1, max_size=12)


@given(TEXT, CUTS, st.integers(0, 60))
@settings(max_examples=300, deadline=None)
def test_text_cut_at_any_bytes_comes_out_whole_after_any_prompt(text, cuts, num_prompt):
    chunks = cut(text.encode(), cuts)
    num_prompt %= len(chunks)
    vocabulary, ids = byte_level(chunks)
    prompt_bytes = b"".join(chunks[:num_prompt])
    pieces = released(vocabulary, ids[:num_prompt], ids[num_prompt:])
    assert "".join(pieces) == text[len(prompt_bytes.decode("utf-8", "ignore")) :]


@given(TEXT, st.integers(1, 60))
@settings(max_examples=200, deadline=None)
def test_every_byte_a_token_and_every_prompt_length(text, num_bytes):
    data = text.encode()
    data = data[: 1 + num_bytes % len(data)]
    vocabulary, ids = byte_level([bytes([byte]) for byte in data])
    for num_prompt in range(len(data)):
        prompt_text = data[:num_prompt].decode("utf-8", "ignore")
        expected = data.decode("utf-8", "replace")[len(prompt_text) :]
        assert "".join(released(vocabulary, ids[:num_prompt], ids[num_prompt:])) == expected


@given(st.lists(st.binary(min_size=1, max_size=5), max_size=8))
@example([b"\xed\xa0"])
@example([b"\xed", b"\xbf", b"\x80"])
@example([b"\xf4", b"\x90\x80\x80"])
@settings(max_examples=500, deadline=None)
def test_any_bytes_decode_as_in_one_go_and_as_soon_as_they_are_settled(chunks):
    vocabulary, ids = byte_level(chunks)
    detokenizer = Detokenizer(vocabulary, [])
    text, data = "", b""
    for token_id, chunk in zip(ids, chunks, strict=True):
        text, data = text + detokenizer.push(token_id), data + chunk
        assert text == settled_text(data)
    text += detokenizer.flush()
    assert text == data.decode("utf-8", "replace") == vocabulary.tokenizer.decode(ids)


UNFINISHED_PROMPTS = [
    (b"\xf0\x9f", [b"A"], ["A", ""]),  # the prompt's U+FFFD is not repeated
    (b"\xf0\x9f", [b"\x98", b"A"], ["", "\ufffdA", ""]),  # the sequence went on with it, so this one is its own
    (b"\xf0\x9f", [b"\x98", b"\x80!"], ["", "\U0001f600!", ""]),
    (b"\xef\xbf", [b"\xbd"], ["\ufffd", ""]),  # a real U+FFFD
    (b"\xe4", [b"\xe4", b"\xbd\xa0"], ["", "\u4f60", ""]),
    (b"\x80\x80\x80", [b"\x80"], ["\ufffd", ""]),
    (b"\xed", [b"\xa0"], ["\ufffd", ""]),
    (b"\xed\xa0", [b"\x80"], ["\ufffd", ""]),
    (b"\xe4\xbd", [], [""]),
]


@pytest.mark.parametrize(("prompt", "chunks", "expected"), UNFINISHED_PROMPTS)
def test_a_character_that_the_prompt_leaves_unfinished(prompt, chunks, expected):
    vocabulary, ids = byte_level([prompt, *chunks])
    assert released(vocabulary, ids[:1], ids[1:]) == expected


def test_special_tokens_are_silent_and_a_character_goes_on_behind_them():
    vocabulary, (first, second) = byte_level([b"\xe4\xbd", b"\xa0"])
    special = vocabulary.tokenizer.token_to_id(SPECIAL)
    spaced = vocabulary.tokenizer.token_to_id(SPACED)
    ids = [special, first, special, second, spaced, special]
    assert released(vocabulary, [special], ids) == ["", "", "", "\u4f60", SPACED, "", ""]
    assert vocabulary.tokenizer.decode(ids) == "\u4f60" + SPACED
    assert vocabulary.is_special(special)
    assert not vocabulary.is_special(spaced)
    assert vocabulary.token_text(special) == SPECIAL
    assert vocabulary.token_text(first) == "\ufffd"


def test_ids_between_the_last_token_and_the_width_of_the_logits_are_silent():
    tokenizer = BackendTokenizer(models.BPE({"a": 0}, []))
    tokenizer.decoder = decoders.ByteLevel()
    vocabulary = build_vocabulary(tokenizer, BYTE_LEVEL, 10)
    assert len(vocabulary) == 10
    assert released(vocabulary, [9], [0, 9, 0]) == ["a", "", "a", ""]
    assert vocabulary.token_text(9) == ""


def test_the_demo_tokenizer_on_random_ids(demo_folder):
    tokenizer = Tokenizer(demo_folder, 1)
    backend = BackendTokenizer.from_file(str(demo_folder / "tokenizer.json"))
    rng = random.Random(0)
    not_ascii = [i for i in range(len(tokenizer.vocabulary)) if not backend.id_to_token(i).isascii()]
    for _ in range(300):
        ids = rng.choices(range(49152), k=20) + rng.choices(not_ascii, k=20) + rng.choices(range(17, 273), k=10)
        rng.shuffle(ids)
        assert "".join(released(tokenizer.vocabulary, [], ids)) == backend.decode(ids)


def test_the_demo_tokenizer_on_text_behind_a_prompt(demo_folder):
    tokenizer = Tokenizer(demo_folder, 1)
    ids = tokenizer.encode_now("naïve café 😀 🇩🇪 你好, мир — \u200d👩‍👩‍👧 end")
    whole = bytes.join(b"", (tokenizer.token_bytes(token_id) for token_id in ids))
    for num_prompt in range(1, len(ids)):
        prompt = b"".join(tokenizer.token_bytes(token_id) for token_id in ids[:num_prompt]).decode("utf-8", "ignore")
        pieces = released(tokenizer.vocabulary, ids[:num_prompt], ids[num_prompt:])
        assert "".join(pieces) == whole.decode()[len(prompt) :]


WORDS = ["▁", "▁Hello", "▁world", "wor", "ld", "▁▁", "é", "▁你", "好", "\n", "<0xG0>"]


def sentencepiece(strips: bool) -> tuple[Vocabulary, BackendTokenizer]:
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]
    model = models.BPE({name: i for i, name in enumerate(names)}, [], byte_fallback=True, unk_token="<unk>")
    tokenizer = BackendTokenizer(model)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    description = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if strips:
        steps.append(decoders.Strip(content=" ", left=1))
        description.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    vocabulary = build_vocabulary(tokenizer, {"type": "Sequence", "decoders": description}, 0)
    assert vocabulary.is_bytewise
    return vocabulary, tokenizer


@given(st.lists(st.sampled_from([*WORDS, "<s>", "😀", "한", "A"]), max_size=10), st.integers(0, 10), st.booleans())
@settings(max_examples=200, deadline=None)
def test_sentencepiece_words_and_byte_tokens(parts, num_prompt, strips):
    vocabulary, tokenizer = sentencepiece(strips)
    ids = []
    for part in parts:
        token_id = tokenizer.token_to_id(part)
        ids += [3 + byte for byte in part.encode()] if token_id is None else [token_id]
    num_prompt = min(num_prompt, len(ids))
    prompt_text = tokenizer.decode(ids[:num_prompt])
    if "\ufffd" not in prompt_text:
        expected = tokenizer.decode(ids)[len(prompt_text) :]
        assert "".join(released(vocabulary, ids[:num_prompt], ids[num_prompt:])) == expected


@given(st.lists(st.sampled_from(["▁the", "▁a", "b", "▁"]), max_size=8), st.sampled_from(["always", "never", "first"]))
def test_metaspace_decoders(parts, scheme):
    names = ["▁the", "▁a", "b", "▁"]
    tokenizer = BackendTokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    tokenizer.decoder = decoders.Metaspace("▁", scheme)
    description = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": True}
    vocabulary = build_vocabulary(tokenizer, description, 0)
    assert vocabulary.is_bytewise
    ids = [names.index(part) for part in parts]
    assert "".join(released(vocabulary, [], ids)) == tokenizer.decode(ids)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=40), st.integers(0, 40))
@settings(deadline=None)
def test_other_decoders_go_through_the_library(ids, num_prompt):
    names = ["play", "##ing", "dog", "##s", "[SEP]", "un"]
    tokenizer = BackendTokenizer(models.WordPiece({name: i for i, name in enumerate(names)}, unk_token="[SEP]"))
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    tokenizer.add_special_tokens(["[SEP]"])
    vocabulary = build_vocabulary(tokenizer, {"type": "WordPiece", "prefix": "##", "cleanup": False}, 0)
    assert not vocabulary.is_bytewise
    num_prompt = min(num_prompt, len(ids))
    expected = tokenizer.decode(ids)[len(tokenizer.decode(ids[:num_prompt])) :]
    pieces = released(vocabulary, ids[:num_prompt], ids[num_prompt:])
    assert "".join(pieces) == expected
    assert pieces[-1] == ""


def test_other_decoders_hold_an_unfinished_character_back():
    """A decoder that is bytes but with a step of its own before it."""
    chunks = [b"ab", b"\xf0\x9f", b"\x98", b"\x80", b"c", b"\xe4"]
    names = [spell(chunk) for chunk in chunks]
    tokenizer = BackendTokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    tokenizer.decoder = decoders.Sequence([decoders.Strip(content="#", left=0, right=0), decoders.ByteLevel()])
    description = {"type": "Sequence", "decoders": [{"type": "Strip"}, BYTE_LEVEL]}
    vocabulary = build_vocabulary(tokenizer, description, 0)
    assert not vocabulary.is_bytewise
    assert released(vocabulary, [0], [1, 2, 3, 4, 5]) == ["", "", "\U0001f600", "c", "", "\ufffd"]
    assert released(vocabulary, [0, 1], [2, 3, 4]) == ["", "\U0001f600", "c", ""]
