"""One HTTP request on a generation route: its permits, its streams, and its one place in the counters."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Coroutine, Sequence
from operator import itemgetter
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from aiohttp import web

from text_generation_router.api.context import (
    CLIENT_REQUEST_ID_KEY,
    CONTEXT_KEY,
    IGNORED_KEY,
    REQUEST_ID_KEY,
    TENANT_KEY,
    TRACE_KEY,
    Context,
)
from text_generation_router.api.fields import Fields
from text_generation_router.api.request_log import Identity, log_end, log_prompt, log_success
from text_generation_router.errors import DeadlineExceeded, QueueTimeExceeded, RouterError
from text_generation_router.generation_options import GenerationOptions
from text_generation_router.token_stream import FinishReason, TakeOutputs, Timings, TokenOutput, TokenStream
from text_generation_router.valid_request import ValidRequest

if TYPE_CHECKING:
    from text_generation_router.request_trace import RequestTrace

logger = logging.getLogger(__name__)

# What a handler sees when its client went away: the runner cancels it, or a write fails.
CLIENT_LEFT = (ConnectionError,)
_MAX_IGNORED_HEADER_CHARACTERS = 512
T = TypeVar("T")


class Generation:
    """One prompt being extended; of several runs of it, one."""

    def __init__(
        self,
        context: Context,
        request: ValidRequest,
        options: GenerationOptions,
        stream: TokenStream,
        timings: Timings,
        first: "Generation | None" = None,
    ) -> None:
        """`first`: the run of the same prompt that was queued before, if this is another one."""
        self.request = request
        self.first = first or self
        self.options = options
        self.stream = stream
        self.timings = timings
        self._metrics = context.metrics.requests
        self._has_begun = False  # whether the first token was read

    @property
    def seed(self) -> int | None:
        """The seed to report: none when the request is greedy."""
        return self.request.sampling.seed if self.request.sampling.temperature > 0 else None

    @property
    def finish_reason(self) -> FinishReason:
        """Why it ended; only once it has ended well."""
        assert self.stream.finish_reason is not None, "the stream has not ended well"
        return self.stream.finish_reason

    async def read(self, take: TakeOutputs | None = None) -> list[TokenOutput]:
        """The next tokens, [] after the last; raises the error that ended the stream.

        While this waits, tokens that are not the last are offered to `take`.
        """
        outputs = await self.stream.read(take)
        if outputs:
            self._note_begun()
        return outputs

    async def has_begun(self) -> bool:
        """Whether there is a first token, once that is known; it can still be read."""
        await self.stream.wait()
        if self.stream.num_generated_tokens:
            self._note_begun()
        return self._has_begun

    def _note_begun(self) -> None:
        if not self._has_begun:
            self._has_begun = True
            self._metrics.first_token_read((time.monotonic_ns() - self.timings.received_ns) / 1e9)

    async def read_all(self) -> list[TokenOutput]:
        """All tokens, once the stream has ended."""
        outputs: list[TokenOutput] = []

        def take(piece: list[TokenOutput]) -> bool:
            outputs.extend(piece)
            return True

        outputs += await self.read()
        while piece := await self.read(take):
            outputs += piece
        return outputs


class GenerationRequest:
    """Counts one request from arrival to its end; an async context manager around a handler.

    However the handler is left, running streams are cancelled, permits returned, and all prompts end as exactly one
    of success, failure or client gone.
    """

    def __init__(self, request: web.Request, takes_permit: bool = True) -> None:
        self.context = request.app[CONTEXT_KEY]
        self.http = request
        self.request_id = request[REQUEST_ID_KEY]
        self._tenant = request.get(TENANT_KEY, "")
        self._takes_permit = takes_permit
        self.received_ns = time.monotonic_ns()
        self._admitted_ns = 0
        self.num_prompts = 1
        self._metrics = self.context.metrics.requests
        self._has_succeeded = False
        self._num_permits = 0
        self._generations: list[Generation] = []
        self._error: BaseException | None = None
        self._trace: RequestTrace | None = None
        if self.context.tracing is not None:
            self._trace = self.context.tracing.begin(request.method, request.path, request.headers, self.received_ns)
            request[TRACE_KEY] = self._trace.response_header

    async def __aenter__(self) -> "GenerationRequest":
        self._metrics.arrived()
        self.context.open_requests.add(self)
        try:
            if self._takes_permit:
                self.context.permits.check(tenant=self._tenant)  # a refusal waits for no turn, and reads no body
            await self.context.turns.take()
        except BaseException as error:
            await self.__aexit__(type(error), error, error.__traceback__)
            raise
        return self

    @property
    def _identity(self) -> Identity:
        client_request_id = self.http.get(CLIENT_REQUEST_ID_KEY, "-")
        return Identity(self.request_id, client_request_id, self._tenant or "-", self.http.path)

    @property
    def streams(self) -> list[TokenStream]:
        """Those of all prompts that were queued."""
        return [generation.stream for generation in self._generations]

    @property
    def is_read(self) -> bool:
        """Whether the client's connection is open."""
        return self.http.transport is not None and not self.http.transport.is_closing()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for generation in self._generations:
            self.context.engine.cancel(generation.stream)
        if self._num_permits:
            self.context.permits.give_back(self._num_permits, self._tenant, is_served=bool(self._generations))
        self.context.open_requests.remove(self)
        if self._trace is not None:
            self._end_trace(self._trace, error)
        error = self._error or error
        if self._has_succeeded:
            self._count_success()
        elif isinstance(error, Exception) and not isinstance(error, CLIENT_LEFT):
            self._metrics.failed(error, self.num_prompts)
            log_end(self._identity, self.streams, self.received_ns, time.monotonic_ns(), error)
        else:
            self._metrics.client_left(self.num_prompts)
            log_end(self._identity, self.streams, self.received_ns, time.monotonic_ns(), None)

    def _end_trace(self, trace: "RequestTrace", error: BaseException | None) -> None:
        ending = None if self._has_succeeded else self._error or error or ConnectionResetError()
        prompts = [(generation.request, generation.stream) for generation in self._generations]
        trace.end(self.received_ns, time.monotonic_ns(), prompts, ending, has_status=self._error is not None)

    def note_ignored(self, fields: Fields, *others: str) -> None:
        """Tell the client, and the debug log, which of its parameters have no effect."""
        names = dict.fromkeys([*fields.ignored(), *others])
        if names:
            text = ",".join("".join(c for c in name if " " < c <= "~") for name in names)
            text = text[:_MAX_IGNORED_HEADER_CHARACTERS]
            self.http[IGNORED_KEY] = text
            logger.debug("Ignored parameters of request %s: %s", self.request_id, text)

    def admit(self, num_prompts: int = 1) -> None:
        """Take a permit for each prompt; raises Overloaded, and ShuttingDown while draining."""
        self._metrics.arrived(num_prompts - 1)
        self.num_prompts = num_prompts
        self.context.permits.take(num_prompts, self._tenant)
        self._num_permits = num_prompts
        self._admitted_ns = time.monotonic_ns()

    async def in_time(self, work: Awaitable[T]) -> T:
        """What `work` comes to, before anything is queued; raises DeadlineExceeded and QueueTimeExceeded."""
        assert self._admitted_ns
        config, now_ns = self.context.config, time.monotonic_ns()
        limits: list[tuple[float, RouterError]] = []
        if (limit_s := config.request_timeout) is not None:
            limits.append((limit_s - (now_ns - self.received_ns) / 1e9, DeadlineExceeded(f"{limit_s:g} s")))
        if (limit_s := config.queue_timeout) is not None:
            limits.append((limit_s - (now_ns - self._admitted_ns) / 1e9, QueueTimeExceeded(f"{limit_s:g} s")))
        if not limits:
            return await work
        left_s, error = min(limits, key=itemgetter(0))
        try:
            async with asyncio.timeout(left_s) as deadline:
                return await work
        except TimeoutError:
            if not deadline.expired():
                raise
            raise error from None

    async def validate(
        self, prompt: str | list[int], options: GenerationOptions, add_special_tokens: bool = True
    ) -> ValidRequest:
        """Check and encode one prompt; raises ValidationError, and what `in_time` raises: it may wait for shards."""
        if self.context.config.log_prompts:
            log_prompt(self._identity, prompt)
        validator = self.context.validator
        return await self.in_time(validator.validate(prompt, options, add_special_tokens, self._tenant))

    def submit(self, request: ValidRequest, options: GenerationOptions, first: Generation | None = None) -> Generation:
        """Queue one prompt, made with these options; or a further run of the prompt of `first`."""
        self._metrics.validated(len(request.token_ids), request.max_new_tokens)
        timings = Timings(self.received_ns, self._admitted_ns, queued_ns=time.monotonic_ns())
        stream = self.context.engine.submit(request, timings, is_further=first is not None)
        generation = Generation(self.context, request, options, stream, timings, first)
        self._generations.append(generation)
        if self._trace is not None and self._trace.is_recorded:
            stream.prefills = []
        return generation

    def succeed(self) -> None:
        """The answers of all prompts are complete: the request ends as a success."""
        self._has_succeeded = True

    def _count_success(self) -> None:
        self._metrics.succeeded(self.num_prompts)
        for generation in self._generations:
            self._metrics.generated(generation.timings, generation.stream.num_generated_tokens)
            log_success(
                self._identity,
                generation.stream,
                generation.finish_reason,
                generation.seed,
                generation.options.given(),
            )

    def fail(self, error: BaseException) -> None:
        """Remember an error that was sent inside a stream, so that it counts as the request's end."""
        self._error = error


async def together(work: list[Coroutine[Any, Any, None]]) -> None:
    """Run everything at once; the first error ends the rest and is raised."""
    if len(work) == 1:
        await work[0]
        return
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def durations_ms(generation: Generation) -> tuple[int, int, int, int, int]:
    """Total, validation, queue, inference and per token, in whole milliseconds."""
    timings = generation.timings
    scheduled_ns = timings.first_scheduled_ns or timings.finished_ns
    inference_ns = timings.finished_ns - scheduled_ns
    return (
        (timings.finished_ns - timings.received_ns) // 1_000_000,
        (timings.queued_ns - timings.received_ns) // 1_000_000,
        (scheduled_ns - timings.queued_ns) // 1_000_000,
        inference_ns // 1_000_000,
        inference_ns // max(generation.stream.num_generated_tokens, 1) // 1_000_000,
    )


def prompts_of(generations: Sequence[Generation]) -> list[TokenStream]:
    """The streams that count for the prompts: of several runs of one prompt, that of the first."""
    return list({id(one.first): one.first.stream for one in generations}.values())


def timing_headers(generations: Sequence[Generation], config_compute_type: str, num_characters: int) -> dict[str, str]:
    """TGI's headers of a complete answer; of several prompts the longest times and the sums of tokens."""
    durations = [max(values) for values in zip(*map(durations_ms, generations), strict=True)]
    total_s = max(g.timings.finished_ns - g.timings.received_ns for g in generations) / 1e9
    names = ("x-total-time", "x-validation-time", "x-queue-time", "x-inference-time", "x-time-per-token")
    return {
        "x-compute-type": config_compute_type,
        "x-compute-time": f"{total_s:.6f}",
        "x-compute-characters": str(num_characters),
        **{name: str(value) for name, value in zip(names, durations, strict=True)},
        "x-prompt-tokens": str(sum(stream.num_prompt_tokens for stream in prompts_of(generations))),
        "x-generated-tokens": str(sum(g.stream.num_generated_tokens for g in generations)),
    }
