"""Options to a ValidRequest: limits, seeds, and what switches sampling on. Reference: the contract's table."""

import asyncio
import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from text_generation_router.config import RouterConfig
from text_generation_router.errors import ValidationError
from text_generation_router.generation_options import GenerationOptions
from text_generation_router.grammar import Grammar
from text_generation_router.schema_checks import RefusedGrammar
from text_generation_router.validation import Validator


@dataclasses.dataclass(frozen=True)
class Limits:
    max_input_tokens: int
    max_total_tokens: int
    vocab_size: int = 1000
    device_name: str = "cpu"


class WordEncoder:
    """A token is a word; 0 is BOS, 7 ends a text."""

    eos_token_ids = frozenset({7})

    async def encode(self, text, add_special_tokens=True):
        return [0] * add_special_tokens + [len(word) for word in text.split()]


def validate(prompt, limits=None, add_special_tokens=True, **options):
    validator = Validator(RouterConfig(), limits or Limits(4000, 5000), WordEncoder())
    return asyncio.run(validator.validate(prompt, GenerationOptions(**options), add_special_tokens))


def test_special_tokens_and_truncation():
    assert validate("one three").token_ids == [0, 3, 5]
    assert validate("one three", add_special_tokens=False).token_ids == [3, 5]
    # The last tokens are kept, so BOS goes first.
    assert validate("one three", truncate=2).token_ids == [3, 5]
    assert validate("one three", truncate=9).token_ids == [0, 3, 5]
    # What counts against the limits is what is left.
    assert validate("a " * 9000, truncate=4000).max_new_tokens == 1000


def test_blank_text_without_tokens_is_refused():
    with pytest.raises(ValidationError, match="`inputs` has no tokens"):
        validate("  ", add_special_tokens=False)


@given(
    num_input=st.integers(1, 70),
    wanted=st.one_of(st.none(), st.integers(1, 3000)),
    max_total=st.integers(2, 60),
    data=st.data(),
)
def test_what_fits(num_input, wanted, max_total, data):
    """The total is checked first, with at most 1024 of the wanted tokens, then the input; the rest is what fits."""
    max_input = data.draw(st.integers(1, max_total - 1))
    limits = Limits(max_input, max_total)
    counted = max(max_total - num_input, 0) if wanted is None else min(wanted, 1024)
    if num_input + counted > max_total:
        with pytest.raises(ValidationError, match=r"`inputs` tokens \+ `max_new_tokens` must be <= "):
            validate([7] * num_input, limits, max_new_tokens=wanted)
    elif num_input > max_input:
        with pytest.raises(ValidationError, match=f"`inputs` must have at most {max_input} tokens"):
            validate([7] * num_input, limits, max_new_tokens=wanted)
    else:
        request = validate([7] * num_input, limits, max_new_tokens=wanted)
        assert request.max_new_tokens == (max_total - num_input if wanted is None else wanted)


def test_more_than_fits_is_taken_if_1024_do():
    assert validate([7] * 3000, max_new_tokens=100_000).max_new_tokens == 2000
    assert validate([7] * 3976, max_new_tokens=2**40).max_new_tokens == 1024
    with pytest.raises(ValidationError, match="Given: 3977 `inputs` tokens and 100000 `max_new_tokens`"):
        validate([7] * 3977, max_new_tokens=100_000)


@pytest.mark.parametrize(
    ("options", "is_sampled"),
    [
        ({}, False),
        ({"seed": 5}, False),
        ({"temperature": 1.0}, False),
        ({"do_sample": True}, True),
        ({"temperature": 0.9}, True),
        ({"temperature": 1.1}, True),
        ({"top_k": 1}, True),
        ({"top_p": 0.99}, True),
        ({"do_sample": True, "top_k": 5, "is_greedy": True}, False),
    ],
)
def test_what_switches_sampling_on(options, is_sampled):
    assert (validate("a", **options).sampling.temperature > 0) == is_sampled


def test_seeds():
    seeds = {validate("a", do_sample=True).sampling.seed for _ in range(20)}
    assert len(seeds) == 20
    assert all(0 <= seed < 2**53 and int(float(seed)) == seed for seed in seeds)
    assert validate("a", do_sample=True, seed=0).sampling.seed == 0


def test_values_fit_the_protocol():
    """float32 and uint32 on the wire, and no overflow of logits."""
    assert validate("a", temperature=1e-300).sampling.temperature == 1e-6
    for name in ("top_p", "typical_p"):
        assert 0 < np.float32(getattr(validate("a", **{name: 1e-50}).sampling, name)) < 1e-5
    assert validate("a", temperature=1e300).sampling.temperature == 1e6
    assert validate("a", top_k=999).sampling.top_k == 999
    # All tokens are kept: the same as off, though it still samples.
    wide = validate("a", top_k=2**63).sampling
    assert (wide.top_k, wide.temperature) == (0, 1.0)


def test_logged_options_hold_no_text():
    options = GenerationOptions(
        temperature=0.5, stop=("secret",), names={"inputs": "prompt"}, grammar=Grammar.from_regex("secret")
    )
    assert options.given() == {"temperature": 0.5, "num_stop_strings": 1, "grammar": "regex"}


class Grammars:
    async def compile(self, grammar):
        if grammar.text == "bad":
            raise RefusedGrammar("is bad")
        return f"canonical {grammar.text}"


@pytest.mark.parametrize(
    ("is_off", "grammars", "ignore_eos", "reason"),
    [
        (True, Grammars(), False, "needs grammars, which are switched off by --disable-grammar-support"),
        (False, None, False, "needs grammars, and what bytes this model's tokens stand for is not known"),
        (False, Grammars(), True, "and `ignore_eos` exclude each other"),
    ],
)
def test_where_no_grammar_can_be_followed(is_off, grammars, ignore_eos, reason):
    config = RouterConfig(disable_grammar_support=is_off)
    validator = Validator(config, Limits(40, 50), WordEncoder(), grammars)
    options = GenerationOptions(
        grammar=Grammar.any_object(), ignore_eos=ignore_eos, names={"grammar": "response_format"}
    )
    with pytest.raises(ValidationError, match=f"`response_format` {reason}") as caught:
        validator.check_options(options)
    assert caught.value.param == "response_format"


def test_grammars_are_compiled_or_refused():
    validator = Validator(RouterConfig(), Limits(40, 50), WordEncoder(), Grammars())

    def validated(text):
        return asyncio.run(validator.validate("a b", GenerationOptions(grammar=Grammar.from_regex(text))))

    assert validated("good").grammar == "canonical good"
    with pytest.raises(ValidationError, match="`grammar` cannot be used: it is bad") as caught:
        validated("bad")
    assert caught.value.param == "grammar"
    assert asyncio.run(validator.validate("a", GenerationOptions())).grammar == ""
