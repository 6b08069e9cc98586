"""Token ids to text: special tokens that a parser has to see."""

import asyncio

import pytest
from text_generation_router.output import SequenceOutput
from text_generation_router.sequence import Sequence
from text_generation_router.token_stream import FinishReason, TokenStream
from text_generation_router.tokenizer import Tokenizer
from text_generation_router.valid_request import ValidRequest


@pytest.fixture(scope="module")
def tokenizer(demo_folder):
    return Tokenizer(demo_folder, 1)


def texts(tokenizer, text, **fields):
    """What a sequence that generates `text` releases with each token."""
    request = ValidRequest(token_ids=[5], max_new_tokens=100, **fields)
    stream = TokenStream(1)
    output = SequenceOutput(Sequence(1, request), stream, tokenizer)
    ids = tokenizer.encode_now(text, add_special_tokens=False)
    for position, token_id in enumerate(ids, 1):
        output.push(token_id, -1.0, FinishReason.LENGTH if position == len(ids) else None)
        if output.finish_reason is not None:
            break
    output.publish()
    return [one.text for one in asyncio.run(stream.read())]


def test_special_tokens_that_are_shown_are_text_where_they_stand(tokenizer):
    shown = frozenset(tokenizer.special_ids(["<|im_start|>", "no such token"]))
    assert len(shown) == 1
    text = "a<|im_start|>b<|im_end|>c"
    assert texts(tokenizer, text) == ["a", "", "b", "", "c"]
    assert texts(tokenizer, text, shown_special_ids=shown) == ["a", "<|im_start|>", "b", "", "c"]


def test_shown_tokens_keep_their_place_among_what_stop_strings_hold_back(tokenizer):
    shown = frozenset(tokenizer.special_ids(["<|im_start|>"]))
    options = {"shown_special_ids": shown, "stop_strings": ("a<|im_start|>c",), "keep_stop_string": False}
    assert "".join(texts(tokenizer, "xa<|im_start|>b", **options)) == "xa<|im_start|>b"
    assert "".join(texts(tokenizer, "xa<|im_start|>cd", **options)) == "x"
