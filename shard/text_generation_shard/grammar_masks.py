"""The grammars of the batch's sequences: which tokens each may sample next. Rank 0 samples, so it alone has them.

A mask is made on a thread of its own as soon as the token before it is known, beside the forward pass of the step that
it is for. Whoever samples waits for it there, and nowhere else.
"""

import heapq
import logging
import os
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from text_generation_kernels.token_masks import NO_MASK, num_words
from text_generation_proto.columns import Int32Array

from text_generation_shard.compiled_grammars import CompiledGrammars, UnusableGrammar
from text_generation_shard.step_inputs import BoolArray, Int64Array

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher

logger = logging.getLogger(__name__)

MAX_THREADS = 8
# A grammar is compiled once for so many that follow it at once, at most once for each thread: only then are masks made
# side by side.
FOLLOWERS_PER_MATCHER = 8
_ALL_TOKENS = -1  # a word in which every bit is set
_NO_TOKENS = 0


@dataclass(slots=True, eq=False)
class _Follower:
    """A sequence on its way through its grammar. `uses` and `ready` belong to the step thread.

    What has no default never changes; the rest belongs to the masks' thread.
    """

    sequence_id: int
    slot: int  # its row of the masks
    text: str
    number: int  # of the compiled matcher that its own is to be a copy of
    uses: Counter[int]  # by number, of all that follow the grammar
    matcher: "LLMatcher | None" = None
    further: "Future[LLMatcher] | None" = None  # while its own is a copy of number 0, not of this one
    tokens: list[int] = field(default_factory=list)  # what its matcher has consumed
    has_ended: bool = False  # EOS was sampled; a step under way may still run the sequence, for nothing
    failure: str | None = None
    ready: "Future[None]" = field(default_factory=Future)

    @property
    def is_open(self) -> bool:
        """Whether its next tokens are its grammar's to say."""
        return self.failure is None and not self.has_ended

    @property
    def lock(self) -> int:
        """The number of the matcher that its own shares a lock with."""
        return self.number if self.further is None else 0


class StepMasks:
    """The masks of one step's sampling rows, once they are waited for."""

    def __init__(self, owner: "GrammarMasks", followers: list[_Follower], mask_rows: Int32Array) -> None:
        self._owner = owner
        self._followers = followers
        self.mask_rows = mask_rows  # [num_samples] which mask a row has, or NO_MASK

    def __len__(self) -> int:
        return len(self._followers)

    def wait(self, masks: Int32Array) -> None:
        """Wait for the masks, and copy them to the first rows of `masks` ([at least len(self), words])."""
        self._owner.copy(self._followers, masks[: len(self._followers)])

    def failures(self) -> dict[int, str]:
        """The sequences that no token can go on with, and why; known once the masks were waited for."""
        return {follower.sequence_id: follower.failure for follower in self._followers if follower.failure is not None}


class GrammarMasks:
    """Follows sequences from `add` to `remove`. Called from the step thread alone."""

    def __init__(self, grammars: CompiledGrammars, max_num_sequences: int) -> None:
        self._grammars = grammars
        self._followers: dict[int, _Follower] = {}  # by sequence id
        self._uses: defaultdict[str, Counter[int]] = defaultdict(Counter)  # of a grammar's matchers, by number
        self._free_slots = list(range(max_num_sequences))  # a heap: low ones first
        self._masks: Int32Array = np.zeros((max_num_sequences, num_words(grammars.vocab_size)), np.int32)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammar-masks")
        self._num_threads = min(MAX_THREADS, len(os.sched_getaffinity(0)))
        self._executor: LLExecutor | None = None
        self._work_ns = 0

    def add(self, sequence_id: int, text: str, generated: Int32Array) -> None:
        """Follow a sequence that has generated these tokens so far."""
        uses = self._uses[text]
        num_matchers = min(self._num_threads, 1 + uses.total() // FOLLOWERS_PER_MATCHER)
        number = min(range(num_matchers), key=uses.__getitem__)
        uses[number] += 1
        follower = _Follower(sequence_id, heapq.heappop(self._free_slots), text, number, uses)
        self._followers[sequence_id] = follower
        follower.ready = self._thread.submit(self._work, [follower], self._begin, follower, generated.tolist())

    def remove(self, sequence_ids: Sequence[int]) -> None:
        """Forget sequences, those without a grammar too."""
        for sequence_id in sequence_ids if self._followers else ():
            if (follower := self._followers.pop(sequence_id, None)) is not None:
                # What the thread still does for it comes before what it will do for the slot's next owner.
                heapq.heappush(self._free_slots, follower.slot)
                follower.uses[follower.number] -= 1
                if not follower.uses.total():
                    del self._uses[follower.text]

    def clear(self) -> None:
        """Forget every sequence."""
        self.remove(list(self._followers))

    def of_step(self, sequence_ids: Int32Array) -> StepMasks | None:
        """The masks that a step will need whose sampling rows are these; None where no row has a grammar."""
        if not self._followers:
            return None
        mask_rows = np.full(len(sequence_ids), NO_MASK, np.int32)
        followers: list[_Follower] = []
        for index, sequence_id in enumerate(sequence_ids.tolist()):
            if (follower := self._followers.get(sequence_id)) is not None:
                mask_rows[index] = len(followers)
                followers.append(follower)
        return StepMasks(self, followers, mask_rows) if followers else None

    def accept(self, sequence_ids: Int32Array, token_ids: Int64Array, is_valid: BoolArray) -> None:
        """Go on by the tokens that a step has sampled."""
        if not self._followers:
            return
        steps = [
            (follower, token_id)
            for sequence_id, token_id in zip(sequence_ids[is_valid].tolist(), token_ids[is_valid].tolist(), strict=True)
            if (follower := self._followers.get(sequence_id)) is not None
        ]
        if steps:
            ready = self._thread.submit(self._work, [follower for follower, _ in steps], self._advance, steps)
            for follower, _ in steps:
                follower.ready = ready

    def copy(self, followers: list[_Follower], masks: Int32Array) -> None:
        """Wait for the masks of these followers, and copy them."""
        for follower in followers:
            follower.ready.result()
        np.take(self._masks, [follower.slot for follower in followers], axis=0, out=masks, mode="clip")

    def take_work_ns(self) -> int:
        """What the thread has worked since the last call."""
        work_ns, self._work_ns = self._work_ns, 0
        return work_ns

    # On the thread.

    def _work(self, followers: list[_Follower], work: Any, *arguments: Any) -> None:
        started = time.perf_counter_ns()
        try:
            work(*arguments)
        except Exception as error:  # a bug, ours or the library's, that ends these sequences alone
            logger.exception("The masks of %d sequences failed", len(followers))
            for follower in followers:
                follower.failure = f"the grammar cannot be followed: {error!r}"
                self._masks[follower.slot] = _NO_TOKENS
        self._work_ns += time.perf_counter_ns() - started

    def _begin(self, follower: _Follower, generated: list[int]) -> None:
        try:
            follower.matcher = self._grammars.matcher(follower.text)
        except UnusableGrammar as error:
            follower.failure = f"the grammar cannot be followed: {error}"
        else:
            if follower.number:
                follower.further = self._grammars.further(follower.text, follower.number)
                self._copy_further(follower)
            follower.tokens = generated
            if generated and not follower.matcher.consume_tokens(generated):
                self._fail(follower, follower.matcher)
        self._fill([follower])

    def _copy_further(self, follower: _Follower) -> None:
        """Go on with a copy of the follower's own number once that is compiled."""
        further = follower.further
        if further is not None and further.done() and further.exception() is None:
            matcher = further.result().deep_copy()
            if matcher.consume_tokens(follower.tokens):
                follower.matcher, follower.further = matcher, None

    def _advance(self, steps: list[tuple[_Follower, int]]) -> None:
        moving = []
        for follower, token_id in steps:
            if token_id in self._grammars.eos_token_ids:
                follower.has_ended = True
            elif follower.is_open and follower.matcher is not None:
                moving.append((follower, follower.matcher, token_id))
        pairs = [(matcher, token_id) for _, matcher, token_id in moving]
        accepted = self._pool.consume_token_par(pairs) if pairs else []
        for (follower, matcher, token_id), is_accepted in zip(moving, accepted, strict=True):
            if is_accepted:
                follower.tokens.append(token_id)
                self._copy_further(follower)
            else:
                self._fail(follower, matcher)
        self._fill([follower for follower, _ in steps])

    def _fill(self, followers: list[_Follower]) -> None:
        """Make the masks of the next tokens."""
        open_ones = []
        # The threads divide the list in pieces: those that share a lock stand together.
        for follower in sorted(followers, key=lambda follower: follower.lock):
            if follower.is_open and follower.matcher is not None:
                open_ones.append((follower, follower.matcher))
            else:
                self._masks[follower.slot] = _NO_TOKENS if follower.failure is not None else _ALL_TOKENS
        if open_ones:
            self._pool.unsafe_compute_mask_ptr(
                [(matcher, follower.slot) for follower, matcher in open_ones],
                self._masks.ctypes.data,
                self._masks.strides[0],
                len(self._masks),
            )
        for follower, matcher in open_ones:
            if matcher.is_error():
                self._fail(follower, matcher)
                self._masks[follower.slot] = _NO_TOKENS

    def _fail(self, follower: _Follower, matcher: "LLMatcher") -> None:
        lines = matcher.get_error().splitlines()
        follower.failure = f"the text cannot go on as its grammar says: {lines[0] if lines else 'unknown error'}"

    @property
    def _pool(self) -> "LLExecutor":
        if self._executor is None:
            from llguidance import LLExecutor

            self._executor = LLExecutor(self._num_threads)
        return self._executor
