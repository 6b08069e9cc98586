"""What one request's handler reads: the tokens of its sequence as they come, then how it ended."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

from text_generation_router.errors import RouterError
from text_generation_router.token_scores import PromptScores, TopTokens


class FinishReason(StrEnum):
    """Why a sequence ended; values are TGI's words."""

    LENGTH = "length"
    EOS_TOKEN = "eos_token"
    STOP_SEQUENCE = "stop_sequence"


@dataclass(slots=True)
class TokenOutput:
    """One generated token. Nobody changes one; it is not frozen because that would treble the cost of making it.

    `text` is the visible text it released: "" for a special token and while a character or a possible stop
    string is incomplete; the last token also releases what was held back. The texts of all tokens together are
    the generated text.
    """

    token_id: int
    logprob: float
    text: str
    is_special: bool
    top_tokens: TopTokens = ()  # if they were asked for


# What an output takes of memory, and each of its `top_tokens`: 200 to 250 bytes and 120 to 140, measured.
OUTPUT_BYTES = 256
TOP_TOKEN_BYTES = 128

# Takes tokens at once and says so (True), or leaves them to the reader (False).
TakeOutputs = Callable[[list[TokenOutput]], bool]


@dataclass
class Timings:
    """When things happened, nanoseconds of the monotonic clock; 0: not yet."""

    received_ns: int = 0
    admitted_ns: int = 0  # its body is read, and it has a permit
    queued_ns: int = 0
    first_scheduled_ns: int = 0
    first_token_ns: int = 0
    finished_ns: int = 0


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """What one step computed of a prompt, for traces; nanoseconds of the monotonic clock."""

    step: int
    started_ns: int
    ended_ns: int
    num_tokens: int
    num_step_prefill_tokens: int  # of all sequences in that step
    num_step_decode_tokens: int


@dataclass
class TokenStream:
    """Written by the engine, read by one handler.

    A handler that waits can leave a function behind to which tokens are handed in the engine's own call: waking a
    task for each token of each stream would cost more than everything else that is done with the token.
    """

    num_prompt_tokens: int
    sequence_id: int = 0
    timings: Timings = field(default_factory=Timings)
    finish_reason: FinishReason | None = None
    num_generated_tokens: int = 0
    num_cached_tokens: int = 0  # prompt tokens found in the prefix cache
    prompt_scores: PromptScores | None = None  # complete once there is a token; None: not asked for
    num_preemptions: int = 0  # known once it has ended, like the next one
    num_recomputed_tokens: int = 0
    prefills: list[PrefillChunk] | None = None  # noted only for a request that is traced
    num_unread_bytes: int = 0  # memory that waits for the reader
    _outputs: list[TokenOutput] = field(default_factory=list)
    _error: RouterError | None = None
    _wakeup: asyncio.Future[None] | None = None
    _take: TakeOutputs | None = None  # only while the reader waits

    @property
    def is_ended(self) -> bool:
        """Whether nothing more will be written."""
        return self.finish_reason is not None or self._error is not None

    @property
    def num_unread_tokens(self) -> int:
        """Tokens that wait for the reader."""
        return len(self._outputs)

    def note_scheduled(self, now_ns: int, num_cached_tokens: int) -> None:
        """The sequence is in a plan; only the first time counts."""
        if not self.timings.first_scheduled_ns:
            self.timings.first_scheduled_ns = now_ns
            self.num_cached_tokens = num_cached_tokens

    def write(self, outputs: list[TokenOutput]) -> None:
        """Hand out tokens that are not the last."""
        if not self.num_generated_tokens:
            self.timings.first_token_ns = time.monotonic_ns()
        self.num_generated_tokens += len(outputs)
        if self._take is None or self._outputs or not self._take(outputs):
            self._keep(outputs)
            self._wake()

    def finish(self, reason: FinishReason, outputs: list[TokenOutput]) -> None:
        """End the stream well with its last tokens."""
        self.timings.finished_ns = time.monotonic_ns()
        if not self.num_generated_tokens:
            self.timings.first_token_ns = self.timings.finished_ns
        self.num_generated_tokens += len(outputs)
        self._keep(outputs)
        self.finish_reason = reason
        self._wake()

    def fail(self, error: RouterError) -> None:
        """End the stream with an error; the reader gets the tokens before it first."""
        if not self.is_ended:
            self._error = error
            self._wake()

    def _keep(self, outputs: list[TokenOutput]) -> None:
        self._outputs += outputs
        self.num_unread_bytes += sum(OUTPUT_BYTES + TOP_TOKEN_BYTES * len(output.top_tokens) for output in outputs)

    def _wake(self) -> None:
        if self._wakeup is not None and not self._wakeup.done():
            self._wakeup.set_result(None)

    async def wait(self, take: TakeOutputs | None = None) -> None:
        """Return once there are tokens to read, or no more to come; `take` as for `read`."""
        while not self._outputs and not self.is_ended:
            self._wakeup, self._take = asyncio.get_running_loop().create_future(), take
            try:
                await self._wakeup
            finally:
                self._wakeup = self._take = None

    async def read(self, take: TakeOutputs | None = None) -> list[TokenOutput]:
        """All tokens since the last read, waiting for the first; [] once the stream has ended well.

        While this waits, tokens that are not the last are offered to `take`; those that it takes are read. Raises
        the RouterError that ended the stream, once the tokens before it are read.
        """
        await self.wait(take)
        outputs, self._outputs, self.num_unread_bytes = self._outputs, [], 0
        if not outputs and self._error is not None:
            raise self._error
        return outputs
