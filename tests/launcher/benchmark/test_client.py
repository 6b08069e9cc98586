"""The load client against a scripted server: what is sent, what is counted, what counts as a failure."""

import asyncio
import re
import time
from itertools import pairwise

import pytest
from text_generation_launcher.benchmark.client import Record, StreamClient, Target, prepare
from text_generation_launcher.benchmark.load import CONSTANT, Pace, run_load
from text_generation_launcher.benchmark.progress import Progress, describe
from text_generation_launcher.benchmark.request_sets import LoadRequest

QUIET = Progress("test", None)
ALL_AT_ONCE = Pace()


def drive(target: Target, requests: list[LoadRequest], pace: Pace = ALL_AT_ONCE) -> list[Record]:
    return run_load(target, prepare(target, requests), pace, QUIET).records


@pytest.mark.parametrize("route", ["completions", "generate_stream"])
def test_it_asks_for_exactly_so_many_tokens_and_counts_them(server, route):
    records = drive(Target(server.url, route), [LoadRequest("hello", 5), LoadRequest("you", 1)], Pace(concurrency=1))
    assert [record.num_tokens for record in records] == [5, 1]
    assert [len(record.times_ns) for record in records] == [5, 1]
    assert [record.num_prompt_tokens for record in records] == [7, 7]
    assert all(record.is_good for record in records)
    first = server.bodies[0]
    if route == "completions":
        assert first["prompt"] == "hello"
        assert first["max_tokens"] == 5
        assert first["ignore_eos"] is True
        assert first["stream"] is True
        assert first["stream_options"] == {"include_usage": True}
    else:
        assert first["inputs"] == "hello"
        assert first["parameters"]["max_new_tokens"] == 5
        assert first["parameters"]["ignore_eos"] is True


def test_token_ids_and_the_key_are_sent(server):
    [record] = drive(Target(server.url, model="m", api_key="secret"), [LoadRequest([1, 2, 3], 2)])
    assert record.is_good
    assert server.bodies[0]["prompt"] == [1, 2, 3]
    assert server.bodies[0]["model"] == "m"
    assert server.headers[0]["Authorization"] == "Bearer secret"


def test_token_ids_do_not_fit_generate_stream():
    with pytest.raises(ValueError, match="as text"):
        prepare(Target("http://nowhere", "generate_stream"), [LoadRequest([1], 2)])


def test_times_are_in_order_and_within_the_request(server):
    server.pause_s = 0.002
    before_ns = time.monotonic_ns()
    [record] = drive(Target(server.url), [LoadRequest("hello", 6)])
    times = [before_ns, record.start_ns, *record.times_ns, record.end_ns, time.monotonic_ns()]
    assert times == sorted(times)
    assert record.times_ns[-1] - record.times_ns[0] >= 5 * 0.002 * 1e9


def test_events_with_several_tokens_count_by_usage(server):
    server.tokens_per_event = 4
    [record] = drive(Target(server.url), [LoadRequest("hello", 10)])
    assert record.is_good
    assert len(record.times_ns) == 3


def test_a_server_without_usage_is_counted_by_events_and_line_ends_do_not_matter(server):
    server.has_usage = False
    server.line_end = "\r\n"
    [record] = drive(Target(server.url), [LoadRequest("hello", 10)])
    assert record.is_good


@pytest.mark.parametrize("route", ["completions", "generate_stream"])
@pytest.mark.parametrize(
    ("act", "reason"),
    [
        ("refuse", "HTTP 429: .*overloaded"),
        ("break", "ClientPayloadError|ConnectionResetError|ServerDisconnected"),
        ("error", "Request failed during generation"),
        ("silent", "without a token"),
    ],
)
def test_a_failed_request_says_why_and_the_others_go_on(server, route, act, reason):
    server.script[1] = act
    records = drive(Target(server.url, route), [LoadRequest("a", 4)] * 3, Pace(concurrency=1))
    assert [record.is_good for record in records] == [True, False, True]
    assert not records[1].is_short
    assert re.search(reason, records[1].error)


MANY = b'{"usage": {"completion_tokens": "many", "prompt_tokens": 1}}'


class OneAnswer(asyncio.Protocol):
    """A server's connection that answers every read with the same bytes; `ended` is set once it is closed."""

    def __init__(self, answer: bytes, ended: asyncio.Event) -> None:
        self._answer, self._ended = answer, ended

    def connection_made(self, transport: asyncio.Transport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._transport.write(self._answer)

    def connection_lost(self, exc: Exception | None) -> None:
        self._ended.set()


def answered_by(answer: bytes) -> Record:
    """What becomes of one call that a server answers by these bytes, and then leaves the connection open."""

    async def run() -> Record:
        ended = asyncio.Event()
        server = await asyncio.get_running_loop().create_server(lambda: OneAnswer(answer, ended), "127.0.0.1", 0)
        target, record = Target(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"), Record(1)
        async with server:
            async with StreamClient(target) as client:
                await client.send(prepare(target, [LoadRequest("a", 1)])[0], record)
            await ended.wait()
        return record

    return asyncio.run(run())


@pytest.mark.parametrize("body", [b"Content-Length: 0\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n"])
def test_a_refusal_without_a_body_has_its_status(body):
    assert answered_by(b"HTTP/1.1 503 Service Unavailable\r\n" + body).error == "HTTP 503: no body"


@pytest.mark.parametrize(
    "event", [b"[]", b"1", b'"text"', b"null", b"{", b'{"usage": [1]}', b'{"usage": {"a": 1}}', MANY]
)
def test_an_event_of_another_kind_is_an_error_of_its_request(event):
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (len(event) + 8)
    record = answered_by(head + b"data: %b\n\n" % event)
    assert re.match("(ValueError|JSONDecodeError|TypeError|KeyError): ", record.error)


@pytest.mark.parametrize(
    "url", ["localhost:80", "ftp://host", "http://", "http://[::1", "http://h:99999", "http://h:x", "http://h:0"]
)
def test_a_url_that_is_no_address_is_refused(url):
    with pytest.raises(ValueError, match="no address of a server: .*" + re.escape(url)):
        prepare(Target(url), [LoadRequest("a", 1)])


def test_a_short_answer_is_no_good_one(server):
    server.script[0] = "short"
    [record] = drive(Target(server.url), [LoadRequest("a", 4)])
    assert record.error is None
    assert record.is_short
    assert not record.is_good


def test_nobody_listens():
    [record] = drive(Target("http://127.0.0.1:1"), [LoadRequest("a", 4)])
    assert "Connect" in record.error


@pytest.mark.parametrize("concurrency", [1, 3])
def test_no_more_requests_are_open_than_asked_for(server, concurrency):
    server.pause_s = 0.001
    records = drive(Target(server.url), [LoadRequest("a", 5)] * 9, Pace(concurrency=concurrency))
    assert all(record.is_good for record in records)
    assert server.most_open == concurrency


def test_all_at_once_and_at_a_rate_every_request_is_sent(server):
    for pace in (ALL_AT_ONCE, Pace(rate=500.0)):
        records = drive(Target(server.url), [LoadRequest("a", 3)] * 20, pace)
        assert all(record.is_good for record in records)


def test_requests_start_at_their_times_whatever_the_server_does(server):
    server.pause_s = 0.02
    before_ns = time.monotonic_ns()
    records = drive(Target(server.url), [LoadRequest("a", 5)] * 5, Pace(rate=100.0, arrivals=CONSTANT))
    # The event loop counts in whole milliseconds.
    assert all(record.start_ns >= before_ns + index * 10_000_000 - 2_000_000 for index, record in enumerate(records))
    assert server.most_open > 1


def test_arrivals_are_reproducible_and_have_the_rate():
    offsets = Pace(rate=8.0, seed=3).offsets_s(4000)
    assert offsets == Pace(rate=8.0, seed=3).offsets_s(4000)
    assert offsets != Pace(rate=8.0, seed=4).offsets_s(4000)
    assert offsets[0] == 0
    gaps = [after - before for before, after in pairwise(offsets)]
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(1 / 8, rel=0.1)
    assert (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5 == pytest.approx(mean, rel=0.1)
    assert Pace(rate=8.0, arrivals=CONSTANT).offsets_s(3) == [0, 0.125, 0.25]


def test_the_live_line_counts():
    done, open_, failed = Record(2), Record(2), Record(2)
    done.start_ns = open_.start_ns = failed.start_ns = 1
    done.end_ns = failed.end_ns = 2
    done.times_ns.extend([1, 2])
    open_.times_ns.append(1)
    failed.error = "no"
    line = describe("chat", [done, open_, failed, Record(2)], 1.5)
    assert line == "chat: 2/4 done, 1 open, 1 failed, 2 events/s, 2 s"
