"""The engine's loop between fake shards and real readers: streams, stop strings, cancellation, failure, drain."""

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any

import pytest
from text_generation_router import engine as engine_module
from text_generation_router import publisher as publisher_module
from text_generation_router.block_manager import BlockManager
from text_generation_router.engine import Engine
from text_generation_router.errors import GenerationError, IncompleteGeneration, ShuttingDown, Unhealthy
from text_generation_router.limits import Limits
from text_generation_router.metrics import Metrics
from text_generation_router.scheduler import Scheduler, SchedulerLimits
from text_generation_router.shard_client import ShardFailure, ShardInfo
from text_generation_router.shard_group import ShardGroup
from text_generation_router.step import PlanInFlight, StepPlan, StepResult
from text_generation_router.token_stream import FinishReason, Timings, TokenStream
from text_generation_router.tokenizer import Tokenizer
from text_generation_router.valid_request import ValidRequest

EOS = 256


class FakeShards:
    """Continues each prompt with the text that `script` gives for it, byte by byte."""

    def __init__(self, script: dict[bytes, bytes], fail_at_step: int = 0) -> None:
        self.script = script
        self.fail_at_step = fail_at_step
        self.is_frozen = self.is_lost = False
        self.progress = FakeProgress()
        self.grammars: list[str] = []
        self.rows: dict[int, list[int]] = {}
        self.num_prompt: dict[int, int] = {}
        self.left: dict[int, int] = {}
        self.plans: list[StepPlan] = []

    def start(self, on_result: Callable[[StepResult], None], on_failure: Callable[[ShardFailure], None]) -> None:
        self.on_result, self.on_failure = on_result, on_failure

    async def send(self, plan: StepPlan) -> None:
        self.plans.append(plan)
        if self.is_frozen:
            return
        if plan.step == self.fail_at_step:
            self.on_failure(ShardFailure("shard 0: gone"))
            return
        for sequence_id in plan.removed_sequence_ids:
            del self.rows[sequence_id]
        for new in plan.new_sequences:
            self.rows[new.sequence_id] = list(new.token_ids)
            self.num_prompt[new.sequence_id] = new.num_prompt_tokens
            self.left[new.sequence_id] = len(new.token_ids) - new.num_computed_tokens
        for sequence_id, count in zip(plan.prefill_sequence_ids, plan.prefill_num_tokens, strict=True):
            self.left[sequence_id] -= count
        ids = [sequence_id for sequence_id in self.rows if not self.left[sequence_id]]  # also of a plan that is empty
        result = StepResult(plan.step, ids, [self.next_token(i) for i in ids], [-0.5] * len(ids))
        asyncio.get_running_loop().call_later(0.001, self.on_result, result)

    def next_token(self, sequence_id: int) -> int:
        tokens, num_prompt = self.rows[sequence_id], self.num_prompt[sequence_id]
        text = self.script[bytes(tokens[:num_prompt])]
        index = len(tokens) - num_prompt
        tokens.append(text[index] if index < len(text) else EOS)
        return tokens[-1]

    async def prepare_grammar(self, text: str) -> str:
        if self.is_lost:
            raise ShardFailure("gone")
        self.grammars.append(text)
        return ""

    async def close(self) -> None:
        pass

    async def abandon(self) -> None:
        self.is_lost = True


class FakeProgress:
    """A rank is stuck as soon as one is named, or when a plan has no answer for a twentieth of a second."""

    def __init__(self) -> None:
        self.rank: int | None = None

    def stuck_rank(self, in_flight: Sequence[PlanInFlight]) -> int | None:
        is_silent = bool(in_flight) and time.monotonic_ns() - in_flight[0].sent_ns > 50_000_000
        return 0 if is_silent else self.rank

    def describe(self) -> str:
        return "shard 0: somewhere"


class FakeSupply:
    """The groups that follow the first one; `losses` has the reasons for asking."""

    def __init__(self, *groups: ShardGroup) -> None:
        self.groups = list(groups)
        self.losses: list[ShardFailure] = []
        self.may_come = asyncio.Event()
        self.may_come.set()

    async def next_group(self, lost: ShardFailure, grammars: Callable[[], Iterable[str]]) -> ShardGroup:
        self.losses.append(lost)
        await self.may_come.wait()
        if not self.groups:
            raise lost
        group = self.groups.pop(0)
        for grammar in grammars():
            await group.shards.prepare_grammar(grammar)
        return group

    async def close(self) -> None:
        pass


def as_group(shards: FakeShards, num_blocks: int = 64) -> ShardGroup:
    return ShardGroup(shards, shards.progress, ShardInfo("cpu", "float32", 257, 256, 4, 1000, 0), num_blocks)


def run_with_engine(
    tokenizer: Tokenizer,
    shards: FakeShards,
    body: Callable[[Engine, Metrics], Coroutine[Any, Any, None]],
    *later: FakeShards,
) -> None:
    async def main() -> None:
        blocks = BlockManager(64, 4)
        scheduler = Scheduler(SchedulerLimits(16, 8), blocks, tokenizer.eos_token_ids)
        metrics = Metrics()
        metrics.set_limits(100, 100)
        supply = FakeSupply(*map(as_group, later))
        engine = Engine(scheduler, supply, as_group(shards), tokenizer, metrics, Limits(200, 256, 257, "cpu"))
        engine.start()
        try:
            async with asyncio.timeout(20):
                await body(engine, metrics)
        finally:
            await engine.stop()
        last = [shards, *later][-1]
        if not last.is_frozen and not last.fail_at_step:
            scheduler.check_idle()

    asyncio.run(main())


async def read_all(stream: TokenStream) -> tuple[str, list[int]]:
    text, ids = "", []
    while outputs := await stream.read():
        text += "".join(output.text for output in outputs)
        ids += [output.token_id for output in outputs]
    return text, ids


def request(prompt: bytes, max_new_tokens: int = 50, **fields: Any) -> ValidRequest:
    return ValidRequest(list(prompt), max_new_tokens, **fields)


def test_many_streams_get_their_own_text(tokenizer):
    script = {f"prompt {i} ".encode() * (i + 1): f"answer {i} ✓ 日本".encode() for i in range(6)}

    async def body(engine: Engine, metrics: Metrics) -> None:
        streams = [engine.submit(request(prompt), Timings()) for prompt in script]
        for (text, ids), stream, expected in zip(
            await asyncio.gather(*map(read_all, streams)), streams, script.values(), strict=True
        ):
            assert text == expected.decode()
            assert ids == [*expected, EOS]
            assert stream.finish_reason is FinishReason.EOS_TOKEN
            timings = stream.timings
            assert 0 < timings.queued_ns <= timings.first_scheduled_ns < timings.first_token_ns < timings.finished_ns

    run_with_engine(tokenizer, FakeShards(script), body)


@pytest.mark.parametrize(("keep", "expected"), [(True, "the quick brown STOP"), (False, "the quick brown ")])
def test_a_stop_string_ends_the_text(tokenizer, keep, expected):
    async def body(engine: Engine, metrics: Metrics) -> None:
        stream = engine.submit(request(b"p", stop_strings=("STOP",), keep_stop_string=keep), Timings())
        assert (await read_all(stream))[0] == expected
        assert stream.finish_reason is FinishReason.STOP_SEQUENCE

    run_with_engine(tokenizer, FakeShards({b"p": b"the quick brown STOP fox"}), body)


@pytest.mark.parametrize(("keep", "expected"), [(True, "the q"), (False, "the ")])
@pytest.mark.parametrize("max_new_tokens", [5, 50])
def test_a_stop_token_ends_the_text(tokenizer, keep, expected, max_new_tokens):
    """The last allowed token too; what a stop string held back comes out."""

    async def body(engine: Engine, metrics: Metrics) -> None:
        fields = {"stop_token_ids": frozenset(b"qz"), "stop_strings": ("he z",), "keep_stop_string": keep}
        stream = engine.submit(request(b"p", max_new_tokens, **fields), Timings())
        text, ids = await read_all(stream)
        assert (text, bytes(ids)) == (expected, b"the q")
        assert stream.finish_reason is FinishReason.STOP_SEQUENCE

    run_with_engine(tokenizer, FakeShards({b"p": b"the quick"}), body)


def test_a_stop_token_after_half_a_character(tokenizer):
    async def body(engine: Engine, metrics: Metrics) -> None:
        fields = {"stop_token_ids": frozenset(b"q"), "keep_stop_string": False}
        assert (await read_all(engine.submit(request(b"p", **fields), Timings())))[0] == "a\ufffd"

    run_with_engine(tokenizer, FakeShards({b"p": "a✓".encode()[:3] + b"q"}), body)


def test_held_back_text_comes_out_at_the_end(tokenizer):
    async def body(engine: Engine, metrics: Metrics) -> None:
        stream = engine.submit(request(b"p", stop_strings=("STOP",), keep_stop_string=False), Timings())
        assert (await read_all(stream))[0] == "no end ST"
        cut = engine.submit(request(b"p", 2, stop_strings=("STOP",), keep_stop_string=False), Timings())
        assert (await read_all(cut))[0] == "no"
        assert cut.finish_reason is FinishReason.LENGTH

    run_with_engine(tokenizer, FakeShards({b"p": b"no end ST"}), body)


def test_a_character_cut_off_by_the_limit_is_flushed(tokenizer):
    async def body(engine: Engine, metrics: Metrics) -> None:
        stream = engine.submit(request(b"p", 2), Timings())
        assert (await read_all(stream))[0] == "a\ufffd"

    run_with_engine(tokenizer, FakeShards({b"p": "a✓".encode()}), body)


def test_a_traced_request_notes_its_chunks_and_preemptions(tokenizer):
    prompts = (b"p" * 60, b"q" * 60)  # together with their answers more than the 256 tokens of KV memory

    async def body(engine: Engine, metrics: Metrics) -> None:
        streams = [engine.submit(request(prompt, 120), Timings()) for prompt in prompts]
        for stream in streams:
            stream.prefills = []
        untraced = engine.submit(request(b"r"), Timings())
        await asyncio.gather(*map(read_all, streams), read_all(untraced))
        assert untraced.prefills is None
        for stream, num_preemptions in zip(streams, (0, 1), strict=True):
            assert stream.num_preemptions == num_preemptions
            chunks = stream.prefills
            first_pass = [chunk for chunk in chunks if chunk.ended_ns <= stream.timings.first_token_ns]
            assert sum(chunk.num_tokens for chunk in first_pass) == 60
            assert all(chunk.num_tokens <= 16 for chunk in chunks), "the budget of a step"
            assert (len(chunks) > len(first_pass)) == bool(num_preemptions), "what is computed again shows too"
            times = [time_ns for chunk in chunks for time_ns in (chunk.started_ns, chunk.ended_ns)]
            assert times == sorted(times)
            assert stream.timings.first_scheduled_ns <= times[0]

    run_with_engine(tokenizer, FakeShards({prompts[0]: b"x" * 110, prompts[1]: b"y" * 110, b"r": b"z"}), body)


def test_a_cancelled_request_is_removed_within_a_step(tokenizer):
    shards = FakeShards({b"p": b"x" * 40, b"q": b"y" * 40})

    async def body(engine: Engine, metrics: Metrics) -> None:
        stream = engine.submit(request(b"p"), Timings())
        other = engine.submit(request(b"q"), Timings())
        await stream.read()
        num_plans = len(shards.plans)
        engine.cancel(stream)
        engine.cancel(stream)
        assert (await read_all(other))[0] == "y" * 40
        removed = [i for i, plan in enumerate(shards.plans) if stream.sequence_id in plan.removed_sequence_ids]
        assert num_plans <= removed[0] <= num_plans + 1
        assert "tgi_kv_blocks_used 0" in metrics.text()

    run_with_engine(tokenizer, shards, body)


def test_slices_of_one_token_lose_and_mix_up_nothing(tokenizer, monkeypatch):
    monkeypatch.setattr(publisher_module, "SLICE_NS", 0)
    monkeypatch.setattr(publisher_module, "CHUNK_SIZE", 1)
    script = {bytes([97 + i]) * (i + 1): f"text {i} ".encode() * 4 for i in range(8)}

    async def body(engine: Engine, metrics: Metrics) -> None:
        streams = [engine.submit(request(prompt), Timings()) for prompt in script]
        texts = [text for text, _ in await asyncio.gather(*map(read_all, streams))]
        assert texts == [text.decode() for text in script.values()]
        num_gaps = sum(len(text) for text in script.values())  # and EOS, but for the first token
        assert f"tgi_request_inter_token_duration_count {num_gaps}\n" in metrics.text()

    run_with_engine(tokenizer, FakeShards(script), body)


def test_what_ended_before_a_shard_died_ends_well(tokenizer):
    class DyingShards(FakeShards):
        """Dies in the moment in which the first sequence ends."""

        def start(self, on_result, on_failure):
            def on_last_result(result):
                on_result(result)
                if EOS in result.token_ids:
                    on_failure(ShardFailure("shard 0: gone"))

            super().start(on_last_result, on_failure)

    async def body(engine: Engine, metrics: Metrics) -> None:
        ended = engine.submit(request(b"p"), Timings())
        other = engine.submit(request(b"q"), Timings())
        texts = await asyncio.gather(read_all(ended), read_all(other), return_exceptions=True)
        assert texts[0] == ("xyz", [*b"xyz", EOS])
        assert ended.finish_reason is FinishReason.EOS_TOKEN
        assert isinstance(texts[1], GenerationError)

    run_with_engine(tokenizer, DyingShards({b"p": b"xyz", b"q": b"x" * 40}, fail_at_step=-1), body)


def test_a_dead_shard_fails_every_stream_and_refuses_new_ones(tokenizer):
    async def body(engine: Engine, metrics: Metrics) -> None:
        stream = engine.submit(request(b"p"), Timings())
        with pytest.raises(GenerationError):
            await read_all(stream)
        assert not engine.is_healthy()
        with pytest.raises(Unhealthy):
            engine.submit(request(b"p"), Timings())

    run_with_engine(tokenizer, FakeShards({b"p": b"x" * 40}, fail_at_step=5), body)


def test_draining_serves_what_was_admitted_before(tokenizer):
    async def body(engine: Engine, metrics: Metrics) -> None:
        stream = engine.submit(request(b"p"), Timings())
        await stream.read()
        assert engine.is_healthy()
        engine.start_drain()
        assert not engine.is_healthy()
        late = engine.submit(request(b"p"), Timings())  # its prompt was being encoded when the drain began
        for each in (stream, late):
            assert (await read_all(each))[0].endswith("x")
            assert each.finish_reason is FinishReason.EOS_TOKEN

    run_with_engine(tokenizer, FakeShards({b"p": b"x" * 20}), body)


def test_what_is_left_after_the_drain_gets_a_typed_error(tokenizer):
    shards = FakeShards({b"p": b"x" * 20})

    async def body(engine: Engine, metrics: Metrics) -> None:
        stream = engine.submit(request(b"p"), Timings())
        shards.is_frozen = True
        engine.start_drain()
        engine.end_all()
        with pytest.raises(IncompleteGeneration):
            await read_all(stream)
        with pytest.raises(ShuttingDown):
            engine.submit(request(b"p"), Timings())

    run_with_engine(tokenizer, shards, body)


def test_an_idle_engine_probes_the_shards_and_notices_silence(tokenizer, monkeypatch):
    monkeypatch.setattr(engine_module, "PROBE_INTERVAL_S", 0.01)
    shards = FakeShards({})

    async def body(engine: Engine, metrics: Metrics) -> None:
        await asyncio.sleep(0.1)
        assert len(shards.plans) >= 2
        assert all(plan.is_empty for plan in shards.plans)
        assert engine.is_healthy()
        shards.is_frozen = True
        deadline = time.monotonic() + 5
        while engine.is_healthy():
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)

    run_with_engine(tokenizer, shards, body)


def test_no_probe_goes_to_a_batch_whose_plans_wait_for_the_output(tokenizer, monkeypatch):
    """A probe is a plan like any other: what is in the batch would decode by it."""

    class LateShards(FakeShards):
        """Answers once it has all plans that were sent, so that then none is in flight."""

        def start(self, on_result, on_failure):
            results: list[StepResult] = []

            def keep(result: StepResult) -> None:
                results.append(result)
                if result.step == len(self.plans):
                    for kept in results:
                        on_result(kept)
                    results.clear()

            super().start(keep, on_failure)

    monkeypatch.setattr(engine_module, "PROBE_INTERVAL_S", 0)
    monkeypatch.setattr(engine_module, "MAX_RESULTS_BEHIND", 0)
    monkeypatch.setattr(publisher_module, "SLICE_NS", 0)
    monkeypatch.setattr(publisher_module, "CHUNK_SIZE", 1)
    script = {bytes([97 + i]): f"text {i} ".encode() * 4 for i in range(8)}

    async def body(engine: Engine, metrics: Metrics) -> None:
        streams = [engine.submit(request(prompt), Timings()) for prompt in script]
        texts = [text for text, _ in await asyncio.gather(*map(read_all, streams))]
        assert texts == [text.decode() for text in script.values()]

    run_with_engine(tokenizer, LateShards(script), body)


def test_a_step_past_its_deadline_is_unhealthy(tokenizer):
    async def body(engine: Engine, metrics: Metrics) -> None:
        assert engine.is_healthy()
        shards.progress.rank = 0
        assert not engine.is_healthy()
        assert engine.is_alive()

    shards = FakeShards({})
    run_with_engine(tokenizer, shards, body)


def test_streams_go_on_with_the_next_shards(tokenizer):
    script = {f"prompt {i} ".encode() * (i + 1): f"answer {i} ✓ 日本, at some length".encode() for i in range(6)}
    first, second = FakeShards(script, fail_at_step=25), FakeShards(script)

    async def body(engine: Engine, metrics: Metrics) -> None:
        streams = [engine.submit(request(prompt), Timings()) for prompt in script]
        for (text, ids), expected in zip(await asyncio.gather(*map(read_all, streams)), script.values(), strict=True):
            assert (text, ids) == (expected.decode(), [*expected, EOS])
        assert engine.is_healthy()
        assert "\ntgi_shard_restarts 1\n" in metrics.text()

    run_with_engine(tokenizer, first, body, second)
    assert first.is_lost
    assert [plan.step for plan in second.plans] == list(range(1, len(second.plans) + 1))
    known = {
        new.sequence_id: (len(new.token_ids), new.num_prompt_tokens) for p in second.plans for new in p.new_sequences
    }
    assert len(known) == 6
    assert any(num_known > num_prompt for num_known, num_prompt in known.values())


def test_requests_wait_while_there_are_no_shards(tokenizer, until):
    async def body(engine: Engine, metrics: Metrics) -> None:
        supply = engine._supply
        supply.may_come.clear()
        running = engine.submit(request(b"p"), Timings())
        left = engine.submit(request(b"p"), Timings())
        await until(lambda: supply.losses)
        assert (engine.is_healthy(), engine.is_alive()) == (False, True)
        waiting = engine.submit(request(b"q", grammar="made ready again"), Timings())
        grammar = asyncio.create_task(engine.prepare_grammar("new"))
        engine.cancel(left)
        await asyncio.sleep(0.01)
        assert not grammar.done()
        supply.may_come.set()
        assert [text for text, _ in await asyncio.gather(read_all(running), read_all(waiting))] == ["x" * 40, "yes"]
        assert await grammar == ""

    script = {b"p": b"x" * 40, b"q": b"yes"}
    second = FakeShards(script)
    run_with_engine(tokenizer, FakeShards(script, fail_at_step=5), body, second)
    assert second.grammars == ["made ready again", "new"]


def test_a_request_that_loses_its_shards_twice_fails_and_those_behind_it_do_not(tokenizer):
    class Poisoned(FakeShards):
        """Dies of the token that follows "bad"."""

        def next_token(self, sequence_id: int) -> int:
            if self.rows[sequence_id][-3:] == [*b"bad"]:
                self.on_failure(ShardFailure("shard 0: gone"))
            return super().next_token(sequence_id)

    script = {b"p": b"not all bad, but"}
    script |= {bytes([97 + i]): f"the text of {i}, which is long enough".encode() for i in range(7)}
    script |= {b"z": b"what comes later"}

    async def body(engine: Engine, metrics: Metrics) -> None:
        streams = {prompt: engine.submit(request(prompt), Timings()) for prompt in script}
        results = await asyncio.gather(*map(read_all, streams.values()), return_exceptions=True)
        texts = dict(zip(streams, results, strict=True))
        assert isinstance(texts.pop(b"p"), GenerationError)
        assert texts == {p: (t.decode(), [*t, EOS]) for p, t in script.items() if p != b"p"}
        assert len(engine._supply.losses) == 2

    run_with_engine(tokenizer, Poisoned(script), body, Poisoned(script), Poisoned(script))


def test_stuck_shards_are_given_up(tokenizer, monkeypatch):
    monkeypatch.setattr(engine_module, "PROBE_INTERVAL_S", 0.01)
    first = FakeShards({b"p": b"x" * 40})

    async def body(engine: Engine, metrics: Metrics) -> None:
        stream = engine.submit(request(b"p"), Timings())
        await stream.read()
        first.is_frozen = True
        text, _ = await read_all(stream)
        assert text.endswith("x")
        assert [loss.is_stuck for loss in engine._supply.losses] == [True]

    run_with_engine(tokenizer, first, body, FakeShards({b"p": b"x" * 40}))


def test_the_end_comes_without_shards_too(tokenizer, until):
    async def body(engine: Engine, metrics: Metrics) -> None:
        engine._supply.may_come.clear()
        stream = engine.submit(request(b"p"), Timings())
        await until(lambda: engine._supply.losses)
        grammar = asyncio.create_task(engine.prepare_grammar("new"))
        await asyncio.sleep(0)
        engine.start_drain()
        engine.end_all()
        with pytest.raises(IncompleteGeneration):
            await read_all(stream)
        with pytest.raises(ShuttingDown):
            await grammar

    run_with_engine(tokenizer, FakeShards({b"p": b"x" * 40}, fail_at_step=5), body)
