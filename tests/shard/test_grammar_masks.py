"""Following grammars: the masks that the sampler gets, against what may follow by the grammar's own words."""

import json
import re
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from llguidance import LLExecutor, LLMatcher
from text_generation_kernels.token_masks import NO_MASK, num_words
from text_generation_proto.matcher import TokenTable
from text_generation_shard.compiled_grammars import CompiledGrammars, UnusableGrammar
from text_generation_shard.grammar_masks import GrammarMasks

# Ids: the 128 ASCII characters, some longer tokens, two ends of a text, one that is never text.
LONGER = [b"ab", b"abc", b"12", b'{"', b"ab"]
EOS_TOKENS = (133, 135)
TOKENS = [bytes([byte]) for byte in range(128)] + LONGER + [b"", b"", b""]
VOCAB_SIZE = 140  # wider than there are tokens


def regex(pattern: str) -> str:
    return json.dumps({"grammars": [{"lark_grammar": f'%llguidance {{"no_forcing": true}}\nstart: /{pattern}/'}]})


@pytest.fixture(scope="module")
def grammars() -> CompiledGrammars:
    compiled = CompiledGrammars(VOCAB_SIZE)
    compiled.load(TOKENS, [*EOS_TOKENS, VOCAB_SIZE + 3])
    return compiled


@pytest.fixture
def masks(grammars: CompiledGrammars) -> GrammarMasks:
    return GrammarMasks(grammars, max_num_sequences=4)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def accept(masks: GrammarMasks, tokens: dict[int, int]) -> None:
    masks.accept(ints(*tokens), np.array([*tokens.values()], np.int64), np.ones(len(tokens), np.bool_))


def allowed(masks: GrammarMasks, *sequence_ids: int) -> list[set[int] | None]:
    """The allowed tokens of each row; None for a row without a mask."""
    step = masks.of_step(ints(*sequence_ids))
    assert step is not None
    words = np.zeros((len(step), num_words(VOCAB_SIZE)), np.int32)
    step.wait(words)
    bits = np.unpackbits(words.view(np.uint8), axis=1, count=VOCAB_SIZE, bitorder="little")
    rows = [None if row == NO_MASK else set(np.flatnonzero(bits[row]).tolist()) for row in step.mask_rows.tolist()]
    assert not any(row == set() for row in rows if row is not None) or step.failures()
    return rows


def continuations(pattern: str, text: str, longest: int = 12) -> set[int]:
    """Tokens after which some text of up to `longest` more characters matches; EOS where the text matches."""
    alphabet = "abc12"

    def can_match(start: str, room: int) -> bool:
        if re.fullmatch(pattern, start):
            return True
        return room > 0 and any(can_match(start + character, room - 1) for character in alphabet)

    tokens = {token for token, value in enumerate(TOKENS) if value and can_match(text + value.decode(), 3)}
    return tokens | (set(EOS_TOKENS) if re.fullmatch(pattern, text) else set())


@pytest.mark.parametrize("pattern", ["abc?(12)+", "(ab|a1)2*", "a?b?"])
def test_masks_allow_what_can_still_match(masks: GrammarMasks, pattern: str) -> None:
    random = np.random.default_rng(0)
    for number in range(1, 6):
        masks.add(number, regex(pattern), ints())
        text = ""
        for _ in range(6):
            (tokens,) = allowed(masks, number)
            assert tokens == continuations(pattern, text)
            token = int(random.choice(sorted(tokens)))
            if token in EOS_TOKENS:
                break
            text += TOKENS[token].decode()
            accept(masks, {number: token})
        masks.remove([number])


def test_rows_without_a_grammar_have_no_mask(masks: GrammarMasks) -> None:
    assert masks.of_step(ints(1, 2)) is None
    masks.add(2, regex("a"), ints())
    assert allowed(masks, 1, 2, 3) == [None, {ord("a")}, None]
    assert masks.of_step(ints(1, 3)) is None
    masks.remove([1, 2, 3])
    assert masks.of_step(ints(1, 2)) is None


def test_a_sequence_returns_with_its_generated_tokens(masks: GrammarMasks) -> None:
    masks.add(1, regex("a12b"), ints())
    accept(masks, {1: ord("a")})
    accept(masks, {1: TOKENS.index(b"12")})
    before = allowed(masks, 1)
    masks.remove([1])
    masks.add(1, regex("a12b"), ints(ord("a"), TOKENS.index(b"12")))
    assert allowed(masks, 1) == before == [{ord("b")}]


def test_sequences_do_not_disturb_each_other(masks: GrammarMasks) -> None:
    """Places that become free are taken at once, whatever is still to be done for those who left."""
    for number in range(1, 30):
        masks.add(number, regex("(ab)*1" if number % 2 else "2+"), ints())
        accept(masks, {number: ord("a") if number % 2 else ord("2")})
        if number > 3:
            masks.remove([number - 3])
        live = range(max(1, number - 2), number + 1)
        expected = [{ord("b")} if other % 2 else {ord("2"), *EOS_TOKENS} for other in live]
        assert allowed(masks, *live) == expected


def test_after_the_end_anything_goes(masks: GrammarMasks) -> None:
    """A step under way still runs a sequence that has ended; what it samples is dropped, and is no failure."""
    masks.add(1, regex("a"), ints())
    accept(masks, {1: ord("a")})
    assert allowed(masks, 1) == [set(EOS_TOKENS)]
    accept(masks, {1: EOS_TOKENS[1]})
    assert allowed(masks, 1) == [set(range(VOCAB_SIZE))]
    accept(masks, {1: ord("x")})
    assert allowed(masks, 1) == [set(range(VOCAB_SIZE))]


@pytest.mark.parametrize(
    ("text", "generated", "reason"),
    [
        (regex("a"), [ord("b")], "cannot go on as its grammar says"),
        (regex("("), [], "cannot be followed"),
        ("no grammar", [], "cannot be followed"),
    ],
)
def test_a_grammar_that_cannot_be_followed_fails_its_sequence_alone(
    masks: GrammarMasks, text: str, generated: list[int], reason: str
) -> None:
    masks.add(1, regex("a"), ints())
    masks.add(2, text, ints(*generated))
    step = masks.of_step(ints(1, 2))
    assert step is not None
    assert allowed(masks, 1, 2) == [{ord("a")}, set()]
    assert list(step.failures()) == [2]
    assert reason in step.failures()[2]


def test_a_token_against_the_grammar_fails_the_sequence(masks: GrammarMasks) -> None:
    masks.add(1, regex("ab"), ints())
    accept(masks, {1: ord("b")})
    assert allowed(masks, 1) == [set()]


def test_a_step_that_failed_on_the_device_changes_nothing(masks: GrammarMasks) -> None:
    masks.add(1, regex("ab"), ints())
    masks.accept(ints(1), np.array([-1]), np.zeros(1, np.bool_))
    assert allowed(masks, 1) == [continuations("ab", "")]


def test_work_is_counted_once(masks: GrammarMasks) -> None:
    masks.add(1, regex("ab"), ints())
    allowed(masks, 1)
    assert masks.take_work_ns() > 0
    assert masks.take_work_ns() == 0


def test_nothing_can_be_followed_before_the_tokens_are_known() -> None:
    with pytest.raises(UnusableGrammar, match="no tokens"):
        CompiledGrammars(VOCAB_SIZE).prepare(regex("a"))


def test_a_model_whose_ends_cannot_be_sampled_has_no_grammars() -> None:
    with pytest.raises(UnusableGrammar, match="EOS"):
        CompiledGrammars(100).load(TOKENS, EOS_TOKENS)


def test_new_tokens_replace_what_was_compiled_for_the_old_ones() -> None:
    compiled = CompiledGrammars(VOCAB_SIZE)
    compiled.load(TOKENS, EOS_TOKENS)
    compiled.prepare(regex("[0-9]"))
    compiled.load([b"7", *TOKENS[1:]], EOS_TOKENS)
    masks = GrammarMasks(compiled, 1)
    masks.add(1, regex("[0-9]"), ints())
    assert 0 in allowed(masks, 1)[0]


class Compilations:
    """Counts what is compiled; further ones wait while `may_go_on` is not set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.may_go_on = threading.Event()
        self._ended = threading.Semaphore(0)
        self.num_begun = 0
        compile_now = TokenTable.compile

        def counted(tokens: TokenTable, text: str) -> LLMatcher:
            self.num_begun += 1
            if self.num_begun > 1:
                assert self.may_go_on.wait(60)
            matcher = compile_now(tokens, text)
            self._ended.release()
            return matcher

        monkeypatch.setattr(TokenTable, "compile", counted)

    def wait_for(self, count: int) -> None:
        """Return once so many more have ended."""
        for _ in range(count):
            assert self._ended.acquire(timeout=60)


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> Iterator[Compilations]:
    compilations = Compilations(monkeypatch)
    yield compilations
    compilations.may_go_on.set()


@pytest.mark.parametrize(("num_followers", "num_cores", "num_compiled"), [(8, 2, 1), (9, 2, 2), (40, 2, 2), (30, 4, 4)])
def test_a_grammar_of_many_is_compiled_for_each_thread(
    monkeypatch: pytest.MonkeyPatch,
    compilations: Compilations,
    num_followers: int,
    num_cores: int,
    num_compiled: int,
) -> None:
    """Beside the masks, which go on meanwhile and are the same."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(num_cores)))
    compiled = CompiledGrammars(VOCAB_SIZE)
    compiled.load(TOKENS, EOS_TOKENS)
    masks = GrammarMasks(compiled, num_followers)
    numbers, pattern = range(num_followers), "(ab|a1)2*"
    first, second = continuations(pattern, ""), continuations(pattern, "a")
    for number in numbers:
        masks.add(number, regex(pattern), ints())
    assert allowed(masks, *numbers) == [first] * num_followers
    compilations.may_go_on.set()
    compilations.wait_for(num_compiled)
    accept(masks, {number: ord("a") for number in numbers})
    for number in numbers:
        masks.remove([number])
        masks.add(number, regex(pattern), ints(ord("a")))
    assert allowed(masks, *numbers) == [second] * num_followers
    assert compilations.num_begun == num_compiled


class Locks:
    """Notes which compiled matcher each mask's is a copy of, by the order of compilation."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.of_masks: list[int] = []  # of the masks made last, in the order that the threads divide
        self._numbers: dict[int, int] = {}  # by id
        self._copies: list[LLMatcher] = []  # so that no id is used again
        self._num_compiled = 0
        compile_now, executor = TokenTable.compile, LLExecutor
        locks = self

        class Compiled:
            def __init__(self, tokens: TokenTable, text: str) -> None:
                self._matcher = compile_now(tokens, text)
                self._number = locks._num_compiled
                locks._num_compiled += 1

            def deep_copy(self) -> LLMatcher:
                locks._copies.append(copy := self._matcher.deep_copy())
                locks._numbers[id(copy)] = self._number
                return copy

        class Executor:
            def __init__(self, num_threads: int) -> None:
                self.consume_token_par = (executor_of := executor(num_threads)).consume_token_par
                self._compute = executor_of.unsafe_compute_mask_ptr

            def unsafe_compute_mask_ptr(self, pairs: list[tuple[LLMatcher, int]], *memory: int) -> None:
                locks.of_masks = [locks._numbers[id(matcher)] for matcher, _ in pairs]
                self._compute(pairs, *memory)

        monkeypatch.setattr(TokenTable, "compile", lambda tokens, text: Compiled(tokens, text))
        monkeypatch.setattr("llguidance.LLExecutor", Executor)


def test_followers_who_come_at_once_go_over_to_matchers_compiled_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """No step waits for these; their copies go on where the sequences are, and stand together by their lock."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    locks = Locks(monkeypatch)
    compilations = Compilations(monkeypatch)
    compiled = CompiledGrammars(VOCAB_SIZE)
    compiled.load(TOKENS, EOS_TOKENS)
    masks = GrammarMasks(compiled, 64)
    numbers, pattern, text = range(64), "(ab|a1)2*", ""
    for number in numbers:
        masks.add(number, regex(pattern), ints())
    for token in "ab":
        assert allowed(masks, *numbers) == [continuations(pattern, text)] * 64
        accept(masks, dict.fromkeys(numbers, ord(token)))
        text += token
    assert allowed(masks, *numbers) == [continuations(pattern, text)] * 64
    assert locks.of_masks == [0] * 64
    compilations.may_go_on.set()
    for number in range(1, 8):
        compiled.further(regex(pattern), number).result(60)
    accept(masks, dict.fromkeys(numbers, ord("2")))
    assert allowed(masks, *numbers) == [continuations(pattern, "ab2")] * 64
    assert locks.of_masks == [lock for lock in range(8) for _ in range(8)]


def test_a_grammar_that_is_ready_stays_so_whatever_else_is_compiled_for_many(
    monkeypatch: pytest.MonkeyPatch, compilations: Compilations
) -> None:
    monkeypatch.setattr("text_generation_shard.compiled_grammars.MAX_GRAMMARS", 2)
    monkeypatch.setattr("text_generation_shard.compiled_grammars.MAX_FURTHER_MATCHERS", 3)
    compilations.may_go_on.set()
    compiled = CompiledGrammars(VOCAB_SIZE)
    compiled.load(TOKENS, EOS_TOKENS)
    for pattern in "ab":
        compiled.prepare(regex(pattern))
    for number in (1, 2, 3, 1, 4, 3):
        assert compiled.further(regex("b"), number).result().deep_copy().consume_tokens([ord("b")])
    assert compilations.num_begun == 6
    compiled.matcher(regex("a"))
    compiled.further(regex("b"), 1).result()
    assert compilations.num_begun == 6
    compiled.further(regex("b"), 2).result()
    assert compilations.num_begun == 7


def test_a_long_grammar_is_not_compared_with_that_of_each_other_sequence(grammars: CompiledGrammars) -> None:
    comparisons = []

    class Text(str):
        __slots__ = ()
        __hash__ = str.__hash__

        def __eq__(self, other: object) -> bool:
            comparisons.append(other)
            return super().__eq__(other)

    masks = GrammarMasks(grammars, 50)
    for number in range(50):
        masks.add(number, Text(regex("ab")), ints())
    assert allowed(masks, *range(50)) == [continuations("ab", "")] * 50
    masks.remove([*range(50)])
    assert len(comparisons) <= 50 * 6
