"""More than the server can bear: bounds on what waits and for how long, tenants, clients that do not read or send."""

import asyncio
import dataclasses
import gc
import json
import threading
from functools import partial
from typing import Any

import pytest
from text_generation_router import publisher as publisher_module
from text_generation_router.api import body_memory as body_memory_module
from text_generation_router.api import connection as connection_module
from text_generation_router.api.body_memory import BodyMemory
from text_generation_router.block_manager import BlockManager
from text_generation_router.config import RouterConfig
from text_generation_router.engine import Engine
from text_generation_router.errors import (
    BodiesOverloaded,
    DeadlineExceeded,
    IncompleteGeneration,
    QueueFull,
    QueueTimeExceeded,
)
from text_generation_router.limits import InvalidLimits, Limits, QueueLimits, queue_limits
from text_generation_router.metrics import Metrics
from text_generation_router.scheduler import Scheduler, SchedulerLimits
from text_generation_router.step import StepPlan, StepResult
from text_generation_router.token_stream import Timings
from text_generation_router.valid_request import ValidRequest

GENERATE = {"inputs": "abc"}


class OneAtATime:
    """Answers `a` for the one sequence that its batch holds, or nothing while it is frozen."""

    processes: tuple[Any, ...] = ()

    def __init__(self) -> None:
        self.is_frozen = False
        self.num_top = 0
        self.joined: list[bytes] = []  # prompts, in the order in which they joined
        self._rows: list[int] = []

    def start(self, on_result: Any, on_failure: Any) -> None:
        self._on_result = on_result

    async def send(self, plan: StepPlan) -> None:
        self._rows = [sequence_id for sequence_id in self._rows if sequence_id not in plan.removed_sequence_ids]
        self._rows += [new.sequence_id for new in plan.new_sequences]
        self.joined += [bytes(new.token_ids) for new in plan.new_sequences]
        ids = [] if plan.is_empty else list(self._rows)
        if not self.is_frozen:
            top_tokens = [[(ord("a"), -0.5)] * self.num_top for _ in ids] if self.num_top else None
            result = StepResult(plan.step, ids, [ord("a")] * len(ids), [-0.5] * len(ids), top_tokens=top_tokens)
            asyncio.get_running_loop().call_later(0.001, self._on_result, result)

    async def close(self) -> None:
        pass


@dataclasses.dataclass
class Life:
    """An engine that runs one sequence at a time."""

    engine: Engine
    shard: OneAtATime
    scheduler: Scheduler

    def submit(self, prompt: bytes, num_tokens: int = 4, tenant: str = "", priority: int = 0):
        request = ValidRequest(list(prompt), num_tokens, tenant=tenant, priority=priority)
        return self.engine.submit(request, Timings(asyncio_now_ns(), asyncio_now_ns()))


def asyncio_now_ns() -> int:
    return int(asyncio.get_running_loop().time() * 1e9)


@pytest.fixture
def living(tokenizer, only_group):
    """Runs a test's body beside an engine; in the end nothing waits and all blocks are free."""

    def run(body, **limits) -> None:
        async def main() -> None:
            scheduler = Scheduler(SchedulerLimits(256, 1), BlockManager(64, 4), tokenizer.eos_token_ids)
            metrics, shard = Metrics(), OneAtATime()
            metrics.set_limits(100, 100)
            engine = Engine(
                scheduler, *only_group(shard, 64), tokenizer, metrics, Limits(200, 256, 257, "cpu"),
                QueueLimits(**limits),
            )  # fmt: skip
            engine.start()
            async with asyncio.timeout(20):
                await body(Life(engine, shard, scheduler))
                while scheduler.num_unfinished:  # noqa: ASYNC110
                    await asyncio.sleep(0.001)
            await engine.stop()
            assert scheduler.blocks.num_held == 0

        asyncio.run(main())

    return run


async def read_all(stream) -> int:
    num_tokens = 0
    while outputs := await stream.read():
        num_tokens += len(outputs)
    return num_tokens


async def until_running(stream) -> None:
    while not stream.timings.first_scheduled_ns:  # noqa: ASYNC110
        await asyncio.sleep(0.001)


def test_the_bound_on_prompt_tokens(living):
    async def body(life: Life) -> None:
        running = life.submit(b"x" * 90)
        await until_running(running)
        waiting = [life.submit(b"y" * 60, tenant="a"), life.submit(b"z" * 40, tenant="a")]
        with pytest.raises(QueueFull, match="100 prompt tokens wait, at most 100 may"):
            life.submit(b"w", tenant="a")
        waiting.append(life.submit(b"w" * 50, tenant="b"))
        with pytest.raises(QueueFull):
            life.submit(b"w", tenant="b")
        assert life.engine.num_waiting() == 3
        assert await asyncio.gather(*map(read_all, [running, *waiting])) == [4] * 4
        assert await read_all(life.submit(b"v" * 150)) == 4, "an empty queue takes anything"

    living(body, max_prompt_tokens=100)


def test_who_waits_longer_than_the_limit_gets_an_error_and_who_runs_does_not(living):
    async def body(life: Life) -> None:
        running = life.submit(b"x", 150)
        await until_running(running)
        waiting = life.submit(b"y")
        with pytest.raises(QueueTimeExceeded, match=r"longer than 0\.02 s"):
            await read_all(waiting)
        assert await read_all(running) == 150
        assert life.shard.joined == [b"x"]

    living(body, queue_timeout_s=0.02)


def test_what_was_waited_before_the_queue_counts(living):
    async def body(life: Life) -> None:
        running = life.submit(b"x", 150)
        await until_running(running)
        begun_ns = asyncio_now_ns() - 3600 * 10**9
        waiting = life.engine.submit(ValidRequest(list(b"y"), 4), Timings(begun_ns, begun_ns))
        with pytest.raises(QueueTimeExceeded):
            await read_all(waiting)
        assert await read_all(running) == 150

    living(body, queue_timeout_s=3600)


def test_the_deadline_ends_what_runs_and_what_waits(living):
    async def body(life: Life) -> None:
        life.shard.is_frozen = True
        running = life.submit(b"x", 100)
        await until_running(running)
        for stream in (running, life.submit(b"y")):
            with pytest.raises(DeadlineExceeded, match=r"longer than 0\.03 s"):
                await read_all(stream)
        life.shard._on_result(StepResult(1, [], [], []))

    living(body, request_timeout_s=0.03)


def test_tenants_take_turns_and_priority_orders_a_tenants_own(living):
    async def body(life: Life) -> None:
        first = life.submit(b"first")
        await until_running(first)
        streams = [life.submit(b"a%d" % number, tenant="a", priority=-number) for number in range(4)]
        streams += [life.submit(b"b%d" % number, tenant="b") for number in range(2)]
        await asyncio.gather(*map(read_all, [first, *streams]))
        order = life.shard.joined[1:]
        assert [prompt for prompt in order if prompt.startswith(b"a")] == [b"a3", b"a2", b"a1", b"a0"]
        assert {prompt[:1] for prompt in order[:2]} == {prompt[:1] for prompt in order[2:4]} == {b"a", b"b"}

    living(body)


@pytest.mark.parametrize(("num_top", "num_unread"), [(0, 6), (2, 3)])
def test_a_client_that_does_not_read_costs_a_bounded_buffer(living, monkeypatch, num_top, num_unread):
    """In which a token counts with the best ones at its place."""
    monkeypatch.setattr(publisher_module, "MAX_UNREAD_BYTES", 5 * 256)

    async def body(life: Life) -> None:
        life.shard.num_top = num_top
        stalled = life.submit(b"x", 200)
        assert await read_all(life.submit(b"y", 20)) == 20
        assert stalled.num_unread_tokens == num_unread
        with pytest.raises(IncompleteGeneration, match="does not read"):
            await read_all(stalled)

    living(body)


@pytest.mark.parametrize("name", ["queue_timeout", "request_timeout"])
def test_limits_of_no_time_are_refused(name):
    with pytest.raises(InvalidLimits, match=f"--{name.replace('_', '-')} must be more than 0"):
        queue_limits(RouterConfig(**{name: 0.0}), 1000)


def test_by_default_four_times_the_memory_may_wait_for_any_time():
    assert queue_limits(RouterConfig(), 1000) == QueueLimits(4000, None, None)


# The HTTP side.


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", GENERATE),
        ("/generate_stream", GENERATE),
        ("/v1/completions", {"prompt": "a", "stream": True}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "stream": True}),
    ],
)
def test_a_full_queue_is_a_429_on_every_route(serving, make_engine, path, body):
    class FullEngine(make_engine):
        def submit(self, request: ValidRequest, timings: Timings, is_further: bool = False):
            raise QueueFull(": 9 prompt tokens wait, at most 8 may")

        def num_waiting(self) -> int:
            return 12

    async def run():
        async with serving(FullEngine()) as served:
            async with served.client.post(path, json=body) as response:
                assert response.status == 429
                assert response.headers["Retry-After"] == "1", "nothing has been measured yet"
                answer = await response.json()
                assert answer["error_type"] == "overloaded"
            served.context.permits.take(1)
            served.context.permits.give_back(1)
            async with served.client.post(path, json=body) as response:
                # One request has ended in the first second: twelve take twelve seconds.
                assert response.headers["Retry-After"] == "12"
            counts = served.counts()
            assert counts['tgi_request_rejected{reason="queued_tokens"}'] == 2
            assert counts["tgi_request_residual"] == counts["tgi_request_running"] == 0

    asyncio.run(run())


def test_a_deadline_is_a_504(serving, make_engine):
    async def run():
        async with serving(make_engine(answer="", error=DeadlineExceeded("3 s"))) as served:
            async with served.client.post("/generate", json=GENERATE) as response:
                assert response.status == 504
                assert (await response.json()) == {
                    "error": "Incomplete generation: the request took longer than 3 s",
                    "error_type": "deadline_exceeded",
                }
            assert served.counts()['tgi_request_failure{err="incomplete"}'] == 1

    asyncio.run(run())


@pytest.mark.parametrize("path", ["/tokenize", "/chat_tokenize"])
def test_what_is_tokenized_is_bounded_and_takes_nothing_from_generation(serving, until, path):
    """Two texts are being tokenized, the first without end: a third is refused, and generation goes on."""
    go_on, num_begun = threading.Event(), 0

    async def run():
        async with serving(max_concurrent_requests=2) as served:
            spans_now = served.context.tokenizer.spans_now

            def slow_spans(text, add_special_tokens=True):
                nonlocal num_begun
                num_begun += 1
                assert go_on.wait(30)
                return spans_now(text, add_special_tokens)

            served.context.tokenizer.spans_now = slow_spans
            served.context.tokenize_permits.take(1)  # one has lately been served
            served.context.tokenize_permits.give_back(1)
            chat = {"messages": [{"role": "user", "content": "a"}]}
            body = GENERATE if path == "/tokenize" else chat

            async def post():
                async with served.client.post(path, json=body) as response:
                    assert response.status == 200
                    return await response.json()

            tasks = [asyncio.create_task(post()) for _ in range(2)]
            await until(lambda: served.context.tokenize_permits.num_taken == 2 and num_begun)
            async with served.client.post(path, json=body) as response:
                assert response.status == 429
                assert response.headers["Retry-After"] == "2"
                answer = await response.json()
                assert (answer["error"], answer["error_type"]) == ("Model is overloaded", "overloaded")
            for other, given in (("/generate", GENERATE), ("/v1/chat/completions", chat)):
                async with served.client.post(other, json=given) as response:
                    assert response.status == 200
            assert num_begun == 1, "one at a time"
            go_on.set()
            first, second = await asyncio.gather(*tasks)
            assert first == second
            assert (first if path == "/tokenize" else first["tokenize_response"])[-1]["text"]
            assert served.context.tokenize_permits.num_taken == 0
            assert served.counts()["tgi_request_residual"] == 0

    try:
        asyncio.run(run())
    finally:
        go_on.set()


def test_a_client_that_leaves_gives_its_permit_back_and_its_text_up(serving, until):
    go_on, texts = threading.Event(), []

    async def run():
        async with serving(max_concurrent_requests=2) as served:

            def slow_spans(text, add_special_tokens=True):
                texts.append(text)
                assert go_on.wait(30)
                return []

            served.context.tokenizer.spans_now = slow_spans
            posting = [
                asyncio.create_task(served.client.post("/tokenize", json={"inputs": text})) for text in ("a", "b")
            ]
            await until(lambda: served.context.tokenize_permits.num_taken == 2)
            for task in posting:
                task.cancel()
            await until(lambda: served.context.tokenize_permits.num_taken == 0)
            kept = [work for work in gc.get_objects() if type(work) is partial and "b" in work.args]
            assert not kept, "what never began is not kept until the thread gets to it"
            go_on.set()
            async with served.client.post("/tokenize", json={"inputs": "c"}) as response:
                assert response.status == 200
            assert len(texts) == 2
            assert texts[-1] == "c"

    try:
        asyncio.run(run())
    finally:
        go_on.set()


@pytest.mark.parametrize(
    ("limits", "status", "kind", "failure"),
    [
        ({"request_timeout": 0.03, "queue_timeout": 60}, 504, "deadline_exceeded", "incomplete"),
        ({"request_timeout": 60, "queue_timeout": 0.03}, 429, "overloaded", "overloaded"),
    ],
)
def test_limits_of_time_hold_for_what_is_not_queued_yet(serving, limits, status, kind, failure):
    """A grammar for which there are no shards, a prompt for which there is no thread, a conversation likewise."""

    async def run():
        async with serving(**limits) as served:

            async def wait(*arguments, **named):
                await asyncio.Event().wait()

            grammar = {"type": "regex", "value": "a"}
            chat = {"messages": [{"role": "user", "content": "a"}]}
            for owner, name, path, body in (
                (served.context.validator._grammars, "compile", "/generate", {"parameters": {"grammar": grammar}}),
                (served.context.tokenizer, "encode", "/generate", {}),
                (served.context.tokenizer, "encode", "/generate_stream", {}),
                (served.context.chat_template, "render", "/v1/chat/completions", chat),
                (served.context.chat_template, "render", "/vertex", {"instances": [chat]}),
            ):
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(owner, name, wait)
                    async with served.client.post(path, json={**GENERATE, **body}) as response:
                        answer = await response.text()
                # That stream's status says nothing but that the server is too busy.
                assert response.status == (200 if (path, status) == ("/generate_stream", 504) else status), path
                assert json.loads(answer.removeprefix("data:"))["error_type"] == kind
            counts = served.counts()
            assert counts[f'tgi_request_failure{{err="{failure}"}}'] == 5
            assert counts['tgi_request_rejected{reason="queue_time"}'] == (5 if failure == "overloaded" else 0)
            assert counts["tgi_request_residual"] == counts["tgi_request_running"] == 0
            assert served.context.permits.num_taken == 0

    asyncio.run(run())


async def check_a_late_body(served, pause_s: float) -> None:
    """A body that comes so long after its headers is served."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(served.url.rsplit(":", 1)[1]))
    writer.write(b"POST /generate HTTP/1.1\r\nHost: a\r\nContent-Length: 16\r\n\r\n")
    await asyncio.sleep(pause_s)
    writer.write(b'{"inputs":"abc"}')
    assert (await reader.readline()).startswith(b"HTTP/1.1 200 ")
    writer.close()


def test_the_time_that_a_client_takes_for_its_body_is_not_waiting(serving):
    async def run():
        async with serving(queue_timeout=0.3) as served:
            await check_a_late_body(served, pause_s=0.5)

    asyncio.run(run())


def test_who_is_refused_need_not_send_a_body(serving, make_engine, until):
    async def run():
        async with serving(make_engine(is_hanging=True), max_concurrent_requests=1) as served:
            async with served.client.post("/generate_stream", json=GENERATE):
                host, port = "127.0.0.1", int(served.url.rsplit(":", 1)[1])
                reader, writer = await asyncio.open_connection(host, port)
                writer.write(b"POST /generate HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\n{")
                assert (await reader.readline()).startswith(b"HTTP/1.1 429 ")
                writer.close()
            await until(lambda: served.context.permits.num_taken == 0)
            assert served.counts()["tgi_request_residual"] == 0

    asyncio.run(run())


def test_tenant_and_priority_reach_the_engine(serving, tmp_path):
    (tmp_path / "keys").write_text("team:key:secret\n")

    async def run():
        async with serving(api_keys_file=str(tmp_path / "keys")) as served:
            headers = {"Authorization": "Bearer secret"}
            for path, body in (
                ("/generate", {"inputs": "a", "parameters": {"priority": -3}}),
                ("/v1/completions", {"prompt": "a", "priority": -3}),
            ):
                async with served.client.post(path, json=body, headers=headers) as response:
                    assert response.status == 200
                    assert "x-ignored-parameters" not in response.headers
                request = served.engine.log.pop()
                assert (request.tenant, request.priority) == ("team", -3)
            body = {"prompt": "a", "priority": 101}
            async with served.client.post("/v1/completions", json=body, headers=headers) as response:
                assert response.status == 422
                assert "`priority` must be >= -100 and <= 100" in await response.text()

    asyncio.run(run())


def test_a_tenants_share_of_permits_is_its_own(serving, make_engine, tmp_path):
    (tmp_path / "keys").write_text("a:key:key-a\nb:key:key-b\n")

    async def run():
        config = {"api_keys_file": str(tmp_path / "keys"), "max_concurrent_requests": 2}
        async with serving(make_engine(is_hanging=True), **config) as served:
            streams = []
            for key, status in (("key-a", 200), ("key-a", 200), ("key-a", 429), ("key-b", 200), ("key-b", 429)):
                headers = {"Authorization": f"Bearer {key}"}
                response = await served.client.post("/generate_stream", json=GENERATE, headers=headers)
                assert response.status == status, key
                streams.append(response)
            for response in streams:
                response.close()

    asyncio.run(run())


def test_bodies_that_are_being_read_take_a_bounded_memory(serving, until, monkeypatch):
    """Of 64 slow large bodies as many are held as the bound allows; small requests get through all the while."""
    monkeypatch.setattr(body_memory_module, "MAX_BODIES_BYTES", 0)
    monkeypatch.setattr(body_memory_module, "SMALL_BODY_BYTES", 1000)
    body = b'{"inputs":"abc"' + b" " * 19_984 + b"}"
    assert len(body) == 20_000
    head = b"POST /generate HTTP/1.1\r\nHost: a\r\nContent-Length: 20000\r\n\r\n"

    def num_refused(served):
        return served.counts()['tgi_request_rejected{reason="body_memory"}']

    async def run():
        async with serving(payload_limit=20_000) as served:
            port, memory = int(served.url.rsplit(":", 1)[1]), served.context.bodies
            connections = [await asyncio.open_connection("127.0.0.1", port) for _ in range(64)]
            for number, (_, writer) in enumerate(connections, 1):
                writer.write(head + body[:13_000])
                # A bound of 80 000, of which large ones may take 60 000.
                held, refused = min(number, 4) * 13_000, max(number - 4, 0)
                await until(lambda: (memory.num_bytes, num_refused(served)) == (held, refused))  # noqa: B023
            for path in ("/generate", "/tokenize"):
                async with served.client.post(path, json=GENERATE) as response:
                    assert response.status == 200
            statuses = []
            for reader, writer in connections:
                writer.write(body[13_000:])
                statuses.append((await reader.readline()).split()[1])
                if statuses[-1] == b"429":
                    answer = await reader.readuntil(b"}")
                    assert b"Retry-After: " in answer
                    assert b"take 52000 bytes, at most 60000 may. Send this one again later; those of up to" in answer
                writer.close()
            assert (statuses.count(b"200"), statuses.count(b"429")) == (4, 60)
            assert memory.num_bytes == 0

    asyncio.run(run())


def test_a_client_that_leaves_in_its_body_frees_the_memory(serving, until):
    async def run():
        async with serving() as served:
            _, writer = await asyncio.open_connection("127.0.0.1", int(served.url.rsplit(":", 1)[1]))
            writer.write(b"POST /generate HTTP/1.1\r\nHost: a\r\nContent-Length: 20000\r\n\r\n" + b"{" * 10_000)
            await until(lambda: served.context.bodies.num_bytes == 10_000)
            writer.close()
            await until(lambda: served.context.bodies.num_bytes == 0)

    asyncio.run(run())


def test_a_body_that_comes_too_slowly_is_cut_off(serving, monkeypatch):
    """What has come buys time for the rest."""
    monkeypatch.setattr("text_generation_router.api.body.BODY_START_S", 0.1)
    monkeypatch.setattr("text_generation_router.api.body.MIN_BODY_BYTES_PER_S", 1000)

    async def run():
        async with serving() as served:
            connections = []
            for sent in (b"", b'{"inputs":"abc"', b'{"inputs":"abc"' + b" " * 29_984):
                reader, writer = await asyncio.open_connection("127.0.0.1", int(served.url.rsplit(":", 1)[1]))
                writer.write(b"POST /generate HTTP/1.1\r\nHost: a\r\nContent-Length: 30000\r\n\r\n" + sent)
                connections.append((reader, writer))
            for reader, _ in connections[:2]:
                assert (await reader.readline()).startswith(b"HTTP/1.1 408 ")
            reader, writer = connections[2]
            writer.write(b"}")
            assert (await reader.readline()).startswith(b"HTTP/1.1 200 ")
            for _, writer in connections:
                writer.close()
            assert served.counts()['tgi_request_rejected{reason="body_time"}'] == 2
            assert served.context.bodies.num_bytes == 0

    asyncio.run(run())


def test_a_tenants_share_of_the_memory_for_bodies_is_its_own(serving, until, monkeypatch, tmp_path):
    monkeypatch.setattr(body_memory_module, "MAX_BODIES_BYTES", 0)
    (tmp_path / "keys").write_text("a:key:key-a\nb:key:key-b\n")

    async def run():
        async with serving(api_keys_file=str(tmp_path / "keys"), payload_limit=100) as served:
            head = b"POST /generate HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer key-a\r\nContent-Length: 100\r\n\r\n"
            writers = []
            for number in range(1, 5):
                _, writer = await asyncio.open_connection("127.0.0.1", int(served.url.rsplit(":", 1)[1]))
                writer.write(head + b"{" + b" " * 97)
                await until(lambda: served.context.bodies.num_bytes == 98 * number)  # noqa: B023
                writers.append(writer)
            for key, status in (("key-a", 429), ("key-b", 200)):
                headers = {"Authorization": f"Bearer {key}"}
                async with served.client.post("/generate", json=GENERATE, headers=headers) as response:
                    assert response.status == status, key
            for writer in writers:
                writer.close()
            await until(lambda: served.context.bodies.num_bytes == 0)

    asyncio.run(run())


def test_shares_do_not_grow_the_memory_for_bodies_without_end(monkeypatch):
    monkeypatch.setattr(body_memory_module, "MAX_BODIES_BYTES", 100)
    memory = BodyMemory(payload_limit=20)
    memory.take(100, 0, "a")
    memory.take(50, 0, "b")
    with pytest.raises(BodiesOverloaded):
        memory.take(1, 0, "b")
    memory.take(33, 0, "c")
    with pytest.raises(BodiesOverloaded):
        memory.take(25, 0, "d")
    assert memory.num_bytes == 183
    for tenant, num_bytes in (("a", 100), ("b", 50), ("c", 33)):
        memory.give_back(num_bytes, tenant)
    memory.take(100, 0, "b")


def test_small_bodies_are_bounded_too(monkeypatch):
    monkeypatch.setattr(body_memory_module, "MAX_BODIES_BYTES", 100)
    monkeypatch.setattr(body_memory_module, "SMALL_BODY_BYTES", 10)
    memory = BodyMemory(payload_limit=20)
    for _ in range(10):
        memory.take(4, num_before=0)
        memory.take(6, num_before=4)
    with pytest.raises(BodiesOverloaded, match="take 100 bytes, at most 100 may"):
        memory.take(1, num_before=0)
    memory.give_back(25)
    with pytest.raises(BodiesOverloaded, match="take 75 bytes, at most 75 may"):
        memory.take(1, num_before=10)
    memory.take(10, num_before=0)


@pytest.mark.parametrize("sent", [b"", b"POST /generate HT", b"POST /generate HTTP/1.1\r\nHost: a\r\nX: "])
def test_headers_that_never_end_are_cut_off(serving, monkeypatch, sent):
    monkeypatch.setattr(connection_module, "HEADER_TIMEOUT_S", 0.05)

    async def run():
        async with serving() as served:
            reader, writer = await asyncio.open_connection("127.0.0.1", int(served.url.rsplit(":", 1)[1]))
            writer.write(sent)
            async with asyncio.timeout(10):
                assert await reader.read() == b""
            writer.close()
            assert served.counts()['tgi_request_rejected{reason="header_time"}'] == 1

    asyncio.run(run())


def test_the_time_for_headers_ends_with_them(serving, monkeypatch, make_engine):
    monkeypatch.setattr(connection_module, "HEADER_TIMEOUT_S", 0.05)

    async def run():
        async with serving(make_engine()) as served:
            await check_a_late_body(served, pause_s=0.2)

    asyncio.run(run())
