"""The books at every moment of a real engine's life: each token sampled is streamed, held or dropped, none is lost.

The tally that they are checked against is the shard's own: it counts the tokens that it answers.
"""

import asyncio
import dataclasses
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from text_generation_router.api.open_requests import OpenRequests
from text_generation_router.block_manager import BlockManager
from text_generation_router.engine import Engine
from text_generation_router.errors import GenerationError
from text_generation_router.limits import Limits
from text_generation_router.metrics import Metrics
from text_generation_router.scheduler import Scheduler, SchedulerLimits
from text_generation_router.step import StepPlan, StepResult
from text_generation_router.token_stream import Timings, TokenStream
from text_generation_router.valid_request import ValidRequest

FAILING = ord("!")


class CountingShard:
    """Answers `a` for every row, but an error for the rows of prompts that begin with `!`; counts what it answers."""

    processes: tuple[Any, ...] = ()

    def __init__(self) -> None:
        self.num_sampled = 0
        self._left: dict[int, int] = {}  # tokens to compute before the sequence samples
        self._failing: set[int] = set()

    def start(self, on_result: Any, on_failure: Any) -> None:
        self._on_result = on_result

    async def send(self, plan: StepPlan) -> None:
        for sequence_id in plan.removed_sequence_ids:
            del self._left[sequence_id]
        for new in plan.new_sequences:
            self._left[new.sequence_id] = len(new.token_ids) - new.num_computed_tokens
            if new.token_ids[0] == FAILING:
                self._failing.add(new.sequence_id)
        for sequence_id, count in zip(plan.prefill_sequence_ids, plan.prefill_num_tokens, strict=True):
            self._left[sequence_id] -= count
        ids = [] if plan.is_empty else [sequence_id for sequence_id, left in self._left.items() if not left]
        good = [sequence_id for sequence_id in ids if sequence_id not in self._failing]
        failures = {sequence_id: "broken" for sequence_id in ids if sequence_id in self._failing}
        result = StepResult(plan.step, good, [ord("a")] * len(good), [-0.5] * len(good), failures)
        asyncio.get_running_loop().call_later(0.001, self._answer, result)

    def _answer(self, result: StepResult) -> None:
        self.num_sampled += len(result.token_ids)
        self._on_result(result)

    async def close(self) -> None:
        pass


@dataclasses.dataclass(eq=False)
class Request:
    """As a handler has it."""

    streams: list[TokenStream]
    num_prompts: int = 1
    is_read: bool = True


class Life:
    """An engine, its shard, and the books; the KV memory holds 16 blocks of 4 tokens."""

    def __init__(self, tokenizer: Any, only_group: Any) -> None:
        self.shard = CountingShard()
        self.metrics = Metrics()
        self.metrics.set_limits(100, 100)
        scheduler = Scheduler(SchedulerLimits(16, 8), BlockManager(16, 4), tokenizer.eos_token_ids)
        limits = Limits(60, 64, 257, "cpu")
        self.engine = Engine(scheduler, *only_group(self.shard, 16), tokenizer, self.metrics, limits)
        self.open = OpenRequests(self.metrics, self.engine.unfinished_ids)

    def submit(self, prompt: bytes, num_tokens: int, stop: tuple[str, ...] = ()) -> Request:
        self.metrics.requests.arrived()
        stream = self.engine.submit(ValidRequest(list(prompt), num_tokens, stop_strings=stop), Timings())
        request = Request([stream])
        self.open.add(request)
        return request

    async def read(self, request: Request, num_tokens: int = 1000) -> int:
        """Read so many tokens, or all; then end the request as a handler does."""
        num_read = 0
        try:
            while num_read < num_tokens and (outputs := await request.streams[0].read()):
                num_read += len(outputs)
                self.check()
        except GenerationError as error:
            self.end(request, error)
            return num_read
        self.end(request, None if num_read < num_tokens else ConnectionResetError())
        return num_read

    def end(self, request: Request, error: Exception | None) -> None:
        self.engine.cancel(request.streams[0])
        self.open.remove(request)
        if error is None:
            self.metrics.requests.succeeded()
        elif isinstance(error, ConnectionError):
            self.metrics.requests.client_left()
        else:
            self.metrics.requests.failed(error)
        self.check()

    def value(self, name: str, *labels: str) -> float:
        families = text_string_to_metric_families(self.metrics.text())
        values = {
            (sample.name.removesuffix("_total"), *sample.labels.values()): sample.value
            for family in families
            for sample in family.samples
        }
        return values[name, *labels]

    def check(self) -> None:
        assert self.value("tgi_tokens_residual") == self.value("tgi_request_residual") == 0
        assert self.value("tgi_sequences_without_reader") == 0


@pytest.fixture
def living(tokenizer, only_group):
    """Runs a test's body beside an engine; in the end nothing may be held, and the shard's own count must come out."""

    def run(body) -> None:
        async def main() -> None:
            life = Life(tokenizer, only_group)
            life.engine.start()
            async with asyncio.timeout(20):
                await body(life)
            await life.engine.stop()
            life.check()
            assert life.value("tgi_tokens_held", "results") == life.value("tgi_tokens_held", "streams") == 0
            dropped = life.value("tgi_tokens_dropped", "ended") + life.value("tgi_tokens_dropped", "unread")
            assert life.value("tgi_tokens_streamed") + dropped == life.shard.num_sampled > 0
            assert life.value("tgi_request_running") == 0

        asyncio.run(main())

    return run


async def until_idle(life: Life) -> None:
    while life.engine.unfinished_ids():
        life.check()
        await asyncio.sleep(0.002)
    await asyncio.sleep(0.02)  # for the results of plans in flight


def test_success(living):
    async def body(life: Life) -> None:
        assert await life.read(life.submit(b"hello", 12)) == 12
        await until_idle(life)
        assert life.value("tgi_tokens_streamed") == 12
        assert life.value("tgi_request_success") == 1

    living(body)


def test_a_stop_string_leaves_tokens_behind_it(living):
    async def body(life: Life) -> None:
        assert await life.read(life.submit(b"hello", 30, stop=("aaa",))) == 3
        await until_idle(life)
        assert life.value("tgi_tokens_streamed") == 3
        assert life.value("tgi_tokens_dropped", "ended") == life.shard.num_sampled - 3 > 0

    living(body)


def test_a_client_that_leaves_and_one_that_reads_nothing(living):
    async def body(life: Life) -> None:
        leaving, stalled = life.submit(b"hello", 40), life.submit(b"other", 9)
        assert await life.read(leaving, num_tokens=3) >= 3
        while not stalled.streams[0].is_ended:
            life.check()
            await asyncio.sleep(0.002)
        assert life.value("tgi_tokens_held", "streams") == 9
        life.end(stalled, ConnectionResetError())
        await until_idle(life)
        assert life.value("tgi_tokens_dropped", "unread") >= 9
        assert life.value("tgi_request_failure", "dropped") == 2

    living(body)


def test_a_row_that_fails(living):
    async def body(life: Life) -> None:
        failing, other = life.submit(b"!hello", 9), life.submit(b"hello", 9)
        assert await asyncio.gather(life.read(failing), life.read(other)) == [0, 9]
        await until_idle(life)
        assert life.value("tgi_request_failure", "generation") == 1

    living(body)


def test_preemption(living):
    async def body(life: Life) -> None:
        requests = [life.submit(b"%d" % number * 4, 40) for number in range(4)]
        assert await asyncio.gather(*map(life.read, requests)) == [40] * 4
        await until_idle(life)
        assert life.value("tgi_preemptions") > 0
        assert life.value("tgi_recomputed_tokens") > 0
        assert life.value("tgi_tokens_streamed") == 160

    living(body)


def test_an_engine_that_ends_everything(living):
    async def body(life: Life) -> None:
        request = life.submit(b"hello", 40)
        await request.streams[0].read()
        life.engine.end_all()
        life.end(request, ConnectionResetError())
        await until_idle(life)

    living(body)


def test_a_sequence_whose_client_is_gone_shows(living):
    async def body(life: Life) -> None:
        request = life.submit(b"hello", 40)
        request.is_read = False
        assert life.value("tgi_sequences_without_reader") == 1
        request.is_read = True
        assert await life.read(request) == 40
        await until_idle(life)

    living(body)
