"""TGI's own dialect, spoken to the embedded demo model: /generate, /generate_stream and /.

Tests that compare two answers ask the float32 server, where a prefix hit or a neighbour cannot change a token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import Server

FRANCE = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
COUNTING = "1, 2, 3, 4, 5, 6,"
SPECIAL = {0: "<s>", 1: "</s>"}  # of the tiny model


def test_the_demo_knows_paris(demo: Server) -> None:
    answer = demo.generate(FRANCE, max_new_tokens=16)
    assert set(answer) == {"generated_text"}
    assert "Paris" in answer["generated_text"]


def test_details_tell_of_each_token(exact: Server) -> None:
    reply = exact.post("/generate", {"inputs": FRANCE, "parameters": {"max_new_tokens": 5, "details": True}})
    answer = reply.json()
    details = answer["details"]
    assert (details["finish_reason"], details["generated_tokens"]) == ("length", 5)
    assert details["seed"] is None
    assert details["prefill"] == []
    assert [set(token) for token in details["tokens"]] == [{"id", "text", "logprob", "special"}] * 5
    assert "".join(token["text"] for token in details["tokens"]) == answer["generated_text"]
    assert all(token["logprob"] <= 0 and not token["special"] for token in details["tokens"])
    assert reply.headers["x-generated-tokens"] == "5"
    assert reply.headers["x-compute-characters"] == str(len(FRANCE))
    for name in ("total-time", "validation-time", "queue-time", "inference-time", "time-per-token", "prompt-tokens"):
        assert reply.headers[f"x-{name}"].isdigit(), name
    assert float(reply.headers["x-compute-time"]) > 0


def test_an_answer_ends_with_its_end_of_turn(exact: Server) -> None:
    answer = exact.generate(FRANCE, max_new_tokens=64, details=True)
    details = answer["details"]
    assert details["finish_reason"] == "eos_token"
    assert details["generated_tokens"] == len(details["tokens"]) < 64
    assert details["tokens"][-1]["special"]
    assert details["tokens"][-1]["text"] == "<|im_end|>"
    assert "<|im_end|>" not in answer["generated_text"]


def test_ignore_eos_goes_on(exact: Server) -> None:
    details = exact.generate(FRANCE, max_new_tokens=64, ignore_eos=True, details=True)["details"]
    assert (details["finish_reason"], len(details["tokens"])) == ("length", 64)


def test_a_stop_string_stays_in_the_text(exact: Server) -> None:
    whole = exact.generate(COUNTING, max_new_tokens=16, ignore_eos=True)["generated_text"]
    assert "9" in whole
    answer = exact.generate(COUNTING, max_new_tokens=16, ignore_eos=True, stop=["9", "never"], details=True)
    assert answer["generated_text"] == whole[: whole.index("9") + 1]
    assert answer["details"]["finish_reason"] == "stop_sequence"
    assert answer["details"]["generated_tokens"] < 16


def test_a_stop_string_may_spread_over_tokens(exact: Server) -> None:
    whole = exact.generate(COUNTING, max_new_tokens=16, ignore_eos=True)["generated_text"]
    answer = exact.generate(COUNTING, max_new_tokens=16, ignore_eos=True, stop=["8, 9"])
    assert answer["generated_text"] == whole[: whole.index("8, 9") + 4]


def test_a_stream_is_the_answer_in_pieces(exact: Server) -> None:
    parameters = {"max_new_tokens": 64, "details": True}
    whole = exact.generate(FRANCE, **parameters)
    events = exact.events("/generate_stream", {"inputs": FRANCE, "parameters": parameters})
    assert [event["index"] for event in events] == list(range(1, len(events) + 1))
    assert [event["token"]["id"] for event in events] == [token["id"] for token in whole["details"]["tokens"]]
    assert [event["token"]["text"] for event in events] == [token["text"] for token in whole["details"]["tokens"]]
    for event in events[:-1]:
        assert set(event) >= {"index", "token", "generated_text", "details"}
        assert event["generated_text"] is None
        assert event["details"] is None
    last = events[-1]
    assert last["generated_text"] == whole["generated_text"]
    assert last["details"] == {
        "finish_reason": "eos_token",
        "generated_tokens": len(events),
        "seed": None,
        "input_length": last["details"]["input_length"],
    }
    reply = exact.post("/generate", {"inputs": FRANCE, "parameters": {"max_new_tokens": 1}})
    assert last["details"]["input_length"] == int(reply.headers["x-prompt-tokens"])


def test_a_stream_without_details_has_none(exact: Server) -> None:
    events = exact.events("/generate_stream", {"inputs": COUNTING, "parameters": {"max_new_tokens": 3}})
    assert events[-1]["details"] is None
    assert events[-1]["generated_text"]


def test_root_answers_a_list_with_the_full_text(exact: Server) -> None:
    body = {"inputs": COUNTING, "parameters": {"max_new_tokens": 4}}
    generated = exact.post("/generate", body).json()["generated_text"]
    assert exact.post("/", body).json() == [{"generated_text": COUNTING + generated}]
    body["parameters"] = {"max_new_tokens": 4, "return_full_text": False}
    assert exact.post("/", body).json() == [{"generated_text": generated}]


def test_root_streams_when_asked(exact: Server) -> None:
    events = exact.events("/", {"inputs": COUNTING, "stream": True, "parameters": {"max_new_tokens": 4}})
    assert len(events) == 4
    assert events[-1]["generated_text"].startswith(COUNTING)


def test_truncate_keeps_the_last_tokens(exact: Server) -> None:
    parameters = {"max_new_tokens": 4, "ignore_eos": True}
    short = exact.post("/generate", {"inputs": " 3, 4, 5, 6,", "parameters": parameters})
    num_tokens = int(short.headers["x-prompt-tokens"])
    body = {"inputs": "0, 1, 2, 3, 4, 5, 6,", "parameters": {**parameters, "truncate": num_tokens}}
    reply = exact.post("/generate", body)
    assert reply.headers["x-prompt-tokens"] == str(num_tokens)
    assert reply.json() == short.json()


def test_a_sampled_answer_reports_its_seed(exact: Server) -> None:
    parameters = {"max_new_tokens": 12, "do_sample": True, "ignore_eos": True, "details": True}
    first = exact.generate(COUNTING, **parameters)
    seed = first["details"]["seed"]
    assert isinstance(seed, int)
    assert exact.generate(COUNTING, **parameters, seed=seed)["generated_text"] == first["generated_text"]


def test_without_a_limit_the_answer_ends_by_itself(exact: Server) -> None:
    answer = exact.post("/generate", {"inputs": FRANCE, "parameters": {"details": True}}).json()
    assert answer["details"]["finish_reason"] == "eos_token"


def test_unknown_parameters_are_ignored_and_named(exact: Server) -> None:
    body = {"inputs": COUNTING, "parameters": {"max_new_tokens": 2, "no_such": 1, "top_k": None}}
    reply = exact.post("/generate", body)
    assert reply.status == 200
    assert "no_such" in reply.headers["x-ignored-parameters"]
    assert "top_k" not in reply.headers["x-ignored-parameters"]


def test_every_byte_comes_out_as_utf_8_says(tiny: Server) -> None:
    """The tiny model writes random bytes; an independent decoder says what text they are."""
    parameters = {"max_new_tokens": 300, "ignore_eos": True, "details": True}
    letters = _byte_letters()
    by_id = [b"", b"", *(letters[letter] for letter in sorted(letters))]  # as the fixture numbers the tokens
    for inputs in ("a", "ü", "日本", "🙂"):
        details = tiny.generate(inputs, **parameters)["details"]
        generated = b"".join(by_id[token["id"]] for token in details["tokens"])
        assert len(generated) > 100
        events = tiny.events("/generate_stream", {"inputs": inputs, "parameters": parameters})
        assert events[-1]["generated_text"] == generated.decode("utf-8", "replace")
        # A special token's own text is not part of the answer; what was held back before it is.
        pieces = [event["token"]["text"].removesuffix(SPECIAL.get(event["token"]["id"], "")) for event in events]
        assert "".join(pieces) == events[-1]["generated_text"]
        assert [token["text"] for token in details["tokens"]] == [event["token"]["text"] for event in events]


def _byte_letters() -> dict[str, bytes]:
    """The letter that stands for each byte in byte-level tokenizers: itself if it is visible, else one from U+0100."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    letters = {chr(byte): bytes([byte]) for byte in visible}
    return letters | {chr(0x100 + index): bytes([byte]) for index, byte in enumerate(hidden)}


@pytest.mark.parametrize("text", ["Grüße aus Köln 🙂 日本語 ", "def f(x):\n\treturn x ** 2\n", "\x00\x07 control"])
def test_any_text_is_served(exact: Server, text: str) -> None:
    answer = exact.generate(text, max_new_tokens=4, return_full_text=True)
    assert answer["generated_text"].startswith(text)
