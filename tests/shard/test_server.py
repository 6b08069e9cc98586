"""A real server on a Unix socket, driven over the protocol: greedy tokens equal transformers' full recompute."""

import dataclasses
import json
import os
import queue
import random
import signal
import socket
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from text_generation_proto import shard_pb2 as pb
from text_generation_proto.channel import CHANNEL_OPTIONS, shard_address, shard_socket_path
from text_generation_proto.columns import pack_int32, unpack_float32, unpack_int32
from text_generation_proto.shard_pb2_grpc import ShardStub
from text_generation_shard.config import ShardConfig
from transformers import LlamaConfig, LlamaForCausalLM

CONFIG = LlamaConfig(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
)
WARM_UP = pb.WarmupRequest(max_step_tokens=32, max_num_sequences=8, max_sequence_length=96, max_kv_tokens=1024)
NUM_BLOCKS, BLOCK_SIZE = 64, 16
TIMEOUT_S = 60


class Shards:
    """The ranks of one group as real processes, and the channels to them."""

    def __init__(self, model_folder: Path, folder: Path, world_size: int) -> None:
        self.folder = folder
        self.uds_path = str(folder / "sockets" / "shard")
        config = ShardConfig(
            dtype="float32",
            model_folder=str(model_folder),
            weight_files=(str(model_folder / "model.safetensors"),),
            uds_path=self.uds_path,
            run_folder=str(folder),
            world_size=world_size,
            num_threads=1,
            cpu_kv_bytes=2**26,
            json_output=True,
        )
        with socket.create_server(("127.0.0.1", 0)) as listener:
            config = dataclasses.replace(config, master_port=listener.getsockname()[1])
            first = dataclasses.replace(config, master_listen_fd=listener.fileno())
            others = [dataclasses.replace(config, rank=rank) for rank in range(1, world_size)]
            self.processes = [self._spawn(config, listener) for config in (first, *others)]
        self.channels = [
            grpc.insecure_channel(
                shard_address(self.uds_path, rank), options=[*CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1)]
            )
            for rank in range(world_size)
        ]
        self.stubs = [ShardStub(channel) for channel in self.channels]

    def _spawn(self, config: ShardConfig, listener: socket.socket) -> "subprocess.Popen[str]":
        config_json = json.dumps(dataclasses.asdict(config))
        with (self.folder / f"log-{config.rank}").open("w") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "text_generation_shard", "serve", "--config-json", config_json],
                stdin=subprocess.DEVNULL,
                stderr=log,
                text=True,
                pass_fds=() if config.master_listen_fd is None else (listener.fileno(),),
            )

    def wait_until_loaded(self) -> None:
        for process, stub in zip(self.processes, self.stubs, strict=True):
            deadline = time.monotonic() + TIMEOUT_S
            while not Path(shard_socket_path(self.uds_path, self.processes.index(process))).exists():
                assert process.poll() is None, self.log(0)
                assert time.monotonic() < deadline
                time.sleep(0.05)
            stub.Info(pb.InfoRequest(), wait_for_ready=True, timeout=TIMEOUT_S)

    def warm_up(self) -> list[Any]:
        calls = [stub.Warmup.future(WARM_UP, timeout=TIMEOUT_S) for stub in self.stubs]
        return [call.result() for call in calls]

    def log(self, rank: int) -> str:
        return (self.folder / f"log-{rank}").read_text()

    def close(self) -> None:
        for channel in self.channels:
            channel.close()
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    reference().save_pretrained(folder)
    return folder


def reference() -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0.0, parameter.shape[1] ** -0.5)
        # Sequences that hold token 95 have no finite logits. Nothing chooses it: half of the others are always better.
        model.get_input_embeddings().weight[95] = torch.nan
        model.lm_head.weight[95] = 0.0
    return model


@pytest.fixture(scope="module", params=[1, 2], ids=["one rank", "two ranks"])
def shards(
    request: pytest.FixtureRequest, model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Shards]:
    shards = Shards(model_folder, tmp_path_factory.mktemp("run"), request.param)
    try:
        shards.wait_until_loaded()
        assert [reply.num_blocks for reply in shards.warm_up()] == [NUM_BLOCKS] * request.param
        yield shards
    finally:
        shards.close()


class Expected:
    """Greedy tokens by full recompute, a sequence at a time."""

    def __init__(self) -> None:
        self._model = reference()

    @torch.inference_mode()
    def __call__(self, prompt: Sequence[int], count: int) -> tuple[list[int], list[float]]:
        tokens, logprobs = list(prompt), []
        for _ in range(count):
            logits = self._model(torch.tensor([tokens]), use_cache=False).logits[0, -1].double()
            tokens.append(int(logits.argmax()))
            logprobs.append(float(logits.log_softmax(0).max()))
        return tokens[len(prompt) :], logprobs


@pytest.fixture(scope="module")
def expected() -> Expected:
    return Expected()


class Streams:
    """The Run stream of every rank."""

    def __init__(self, shards: Shards) -> None:
        self._plans: list[queue.SimpleQueue[pb.StepPlan | None]] = [queue.SimpleQueue() for _ in shards.stubs]
        self.calls = [
            stub.Run(iter(plans.get, None), timeout=TIMEOUT_S)
            for stub, plans in zip(shards.stubs, self._plans, strict=True)
        ]
        self.step = 0

    def send(self, **columns: Any) -> None:
        self.step += 1
        packed = {name: pack_int32(value) if name != "new_sequences" else value for name, value in columns.items()}
        for plans in self._plans:
            plans.put(pb.StepPlan(step=self.step, **packed))

    def send_raw(self, plan: pb.StepPlan) -> None:
        for plans in self._plans:
            plans.put(plan)

    def send_to_one(self, rank: int, plan: pb.StepPlan) -> None:
        self._plans[rank].put(plan)

    def receive(self) -> pb.StepResult:
        return next(self.calls[0])

    def break_off(self) -> None:
        """Let the plans end without a last one."""
        for plans in self._plans:
            plans.put(None)

    def close(self) -> None:
        """Say that no more plans come; every rank ends its stream without an error and without results left.

        Called again, without effect.
        """
        self.send_raw(pb.StepPlan(is_last=True))
        self.break_off()
        for call in self.calls:
            assert list(call) == []


@pytest.fixture
def streams(shards: Shards) -> Iterator[Streams]:
    streams = Streams(shards)
    yield streams
    streams.close()


def rows(result: pb.StepResult) -> dict[int, int]:
    ids, tokens = unpack_int32(result.sequence_ids), unpack_int32(result.token_ids)
    return dict(zip(ids.tolist(), tokens.tolist(), strict=True))


def new(sequence_id: int, tokens: Sequence[int], blocks: Sequence[int], **changes: Any) -> pb.NewSequence:
    fields = {"num_prompt_tokens": len(tokens), "sampling": pb.SamplingParameters()} | changes
    return pb.NewSequence(sequence_id=sequence_id, token_ids=pack_int32(tokens), block_ids=pack_int32(blocks), **fields)


@dataclasses.dataclass
class Sequence_:
    """One sequence as a router keeps it while plans are in flight."""

    sequence_id: int
    prompt: list[int]
    count: int
    sampling: pb.SamplingParameters
    tokens: list[int] = dataclasses.field(default_factory=list)  # generated and received
    logprobs: list[float] = dataclasses.field(default_factory=list)
    num_sent: int = 0  # tokens the shard was told of
    num_computed: int = 0
    num_planned: int = 0  # tokens that plans will have sampled
    blocks: list[int] = dataclasses.field(default_factory=list)
    last_step: int = 0


class RandomRouter:
    """Runs sequences to their end by random plans, two in flight: chunks, joins, preemptions and returns."""

    def __init__(self, streams: Streams, seed: int) -> None:
        self._streams = streams
        self._random = random.Random(seed)
        self._free = list(range(NUM_BLOCKS))
        self._running: list[Sequence_] = []
        self._waiting: list[Sequence_] = []
        self._by_id: dict[int, Sequence_] = {}
        self._num_received = 0
        self.num_preemptions = 0

    def run(self, sequences: list[Sequence_]) -> None:
        self._waiting = list(sequences)
        self._by_id = {sequence.sequence_id: sequence for sequence in sequences}
        self._plan()
        while self._waiting or self._running or self._num_received < self._streams.step:
            if self._waiting or self._running:
                self._plan()
            self._receive()

    def _receive(self) -> None:
        result = self._streams.receive()
        self._num_received += 1
        assert result.step == self._num_received
        assert not result.failed_sequence_ids
        logprobs = unpack_float32(result.logprobs).tolist()
        for (sequence_id, token), logprob in zip(rows(result).items(), logprobs, strict=True):
            self._by_id[sequence_id].tokens.append(token)
            self._by_id[sequence_id].logprobs.append(logprob)

    def _plan(self) -> None:
        step, budget = self._streams.step + 1, 32
        removed = [s for s in self._running if s.num_planned == s.count]
        preempted = [s for s in self._running if s not in removed and self._random.random() < 0.04]
        self.num_preemptions += len(preempted)
        for sequence in removed + preempted:
            self._running.remove(sequence)
            self._free += sequence.blocks
            sequence.blocks = []
        self._waiting += preempted
        ready = [s for s in self._waiting if s.last_step <= self._num_received and len(self._running) < 8]
        joining = [s for s in ready[: 8 - len(self._running)] if self._random.random() < 0.3]
        for sequence in joining:
            self._waiting.remove(sequence)
            sequence.num_sent, sequence.num_computed = len(sequence.prompt) + len(sequence.tokens), 0
            sequence.num_planned = len(sequence.tokens)
        messages = [new(s.sequence_id, s.prompt + s.tokens, [], num_prompt_tokens=len(s.prompt), sampling=s.sampling)
                    for s in joining]  # fmt: skip
        self._running += joining
        self._random.shuffle(self._free)
        budget -= sum(s.num_computed >= s.num_sent for s in self._running)
        prefills, grown = {}, {}
        for sequence in self._running:
            num_tokens = 1
            if sequence.num_computed < sequence.num_sent:
                num_tokens = min(self._random.randint(0, 11), sequence.num_sent - sequence.num_computed, budget)
                budget -= num_tokens
                if num_tokens:
                    prefills[sequence.sequence_id] = num_tokens
            if num_tokens:
                sequence.num_computed += num_tokens
                sequence.num_planned += sequence.num_computed >= sequence.num_sent
                sequence.last_step = step
            num_missing = -(-sequence.num_computed // BLOCK_SIZE) - len(sequence.blocks)
            if num_missing > 0:
                grown[sequence.sequence_id] = [self._free.pop() for _ in range(num_missing)]
                sequence.blocks += grown[sequence.sequence_id]
        self._streams.send(
            removed_sequence_ids=[s.sequence_id for s in removed + preempted],
            new_sequences=messages,
            grown_sequence_ids=list(grown),
            grown_num_blocks=[len(blocks) for blocks in grown.values()],
            grown_block_ids=[block for blocks in grown.values() for block in blocks],
            prefill_sequence_ids=list(prefills),
            prefill_num_tokens=list(prefills.values()),
        )


def prompts(count: int, seed: int) -> list[list[int]]:
    source = random.Random(seed)
    return [[source.randrange(95) for _ in range(source.randint(1, 50))] for _ in range(count)]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_greedy_tokens_equal_full_recompute_in_any_company(streams: Streams, expected: Expected, seed: int) -> None:
    source = random.Random(seed)
    greedy = pb.SamplingParameters()
    sequences = [Sequence_(i, prompt, source.randint(1, 20), greedy) for i, prompt in enumerate(prompts(14, seed), 1)]
    router = RandomRouter(streams, seed)
    router.run(sequences)
    assert router.num_preemptions > 0
    for sequence in sequences:
        tokens, logprobs = expected(sequence.prompt, sequence.count)
        assert sequence.tokens == tokens, sequence.sequence_id
        assert sequence.logprobs == pytest.approx(logprobs, abs=1e-4)
    streams.close()


def test_seeded_tokens_do_not_depend_on_neighbours_or_preemption(shards: Shards) -> None:
    def sampled(company: int, seed: int) -> list[list[int]]:
        parameters = [
            pb.SamplingParameters(temperature=0.8 + 0.1 * i, top_k=10 + 10 * i, top_p=0.95, seed=2**63 + i)
            for i in range(3)
        ]
        own = [Sequence_(i + 1, prompt, 16, parameters[i]) for i, prompt in enumerate(prompts(3, 5))]
        others = [
            Sequence_(100 + i, prompt, 12, pb.SamplingParameters(temperature=1.0, top_k=20, top_p=1.0, seed=seed + i))
            for i, prompt in enumerate(prompts(company, seed))
        ]
        streams = Streams(shards)
        router = RandomRouter(streams, seed)
        router.run(own + others)
        streams.close()
        assert router.num_preemptions > 0
        return [sequence.tokens for sequence in own]

    alone = sampled(0, 11)
    assert sampled(9, 12) == alone
    assert len({tuple(tokens) for tokens in alone}) == 3


def test_a_sampled_row_with_one_candidate_is_greedy(streams: Streams, expected: Expected) -> None:
    sequence = Sequence_(1, [3, 1, 4], 10, pb.SamplingParameters(temperature=2.0, top_k=1, top_p=1.0, seed=9))
    RandomRouter(streams, 1).run([sequence])
    assert sequence.tokens == expected([3, 1, 4], 10)[0]
    assert sequence.logprobs == pytest.approx([0.0] * 10, abs=1e-6)


def test_failing_rows_leave_their_neighbours_alone(streams: Streams, expected: Expected) -> None:
    prompt = [3, 1, 4, 1, 5]
    streams.send(
        new_sequences=[new(1, prompt, [7]), new(2, [95], [8]), new(3, [96], [9]), new(4, [-1], [10])],
        prefill_sequence_ids=[1, 2, 3, 4],
        prefill_num_tokens=[5, 1, 1, 1],
    )
    streams.send()
    # Block 8, in which a key and a value are not numbers now, goes to another sequence.
    streams.send(
        removed_sequence_ids=[2, 3, 4],
        new_sequences=[new(5, prompt[:3], [8])],
        prefill_sequence_ids=[5],
        prefill_num_tokens=[3],
    )
    streams.send()
    results = [streams.receive() for _ in range(4)]
    failed = unpack_int32(results[0].failed_sequence_ids).tolist()
    messages = dict(zip(failed, results[0].failure_messages, strict=True))
    assert sorted(messages) == [2, 3, 4]
    assert "finite" in messages[2]
    assert all("vocabulary" in messages[i] for i in (3, 4))
    assert not any(result.failed_sequence_ids for result in results[1:])
    assert [rows(result)[1] for result in results] == expected(prompt, 4)[0]
    assert [rows(result).get(5) for result in results] == [None, None, *expected(prompt[:3], 2)[0]]


def test_an_empty_plan_is_answered(streams: Streams) -> None:
    for step in (1, 2, 3):
        streams.send()
        result = streams.receive()
        assert (result.step, rows(result)) == (step, {})
    streams.close()


BROKEN_PLANS = {
    "gap in steps": pb.StepPlan(step=2),
    "unknown sequence": pb.StepPlan(step=1, removed_sequence_ids=pack_int32([5])),
    "half a number": pb.StepPlan(step=1, removed_sequence_ids=b"\0\0\0"),
    "block beyond": pb.StepPlan(step=1, new_sequences=[new(1, [1], [NUM_BLOCKS])]),
    "sequence id beyond": pb.StepPlan(step=1, new_sequences=[new(2**31, [1], [0])]),
}


@pytest.mark.parametrize("plan", BROKEN_PLANS.values(), ids=BROKEN_PLANS)
def test_a_broken_plan_ends_the_stream_and_nothing_else(shards: Shards, expected: Expected, plan: pb.StepPlan) -> None:
    streams = Streams(shards)
    streams.send_raw(plan)
    for call in streams.calls:
        with pytest.raises(grpc.RpcError) as error:
            next(call)
        assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    next_streams = Streams(shards)
    sequence = Sequence_(1, [2, 7, 1], 4, pb.SamplingParameters())
    RandomRouter(next_streams, 4).run([sequence])
    assert sequence.tokens == expected([2, 7, 1], 4)[0]
    next_streams.close()


def test_a_new_stream_starts_with_an_empty_batch(shards: Shards) -> None:
    first = Streams(shards)
    first.send(new_sequences=[new(1, [1, 2], [0])], prefill_sequence_ids=[1], prefill_num_tokens=[2])
    assert list(rows(first.receive())) == [1]
    first.close()
    second = Streams(shards)
    second.send()
    assert rows(second.receive()) == {}
    second.close()


def test_a_second_stream_is_refused_while_one_lives(shards: Shards, streams: Streams) -> None:
    streams.send()
    streams.receive()
    intruder = Streams(shards)
    for call in intruder.calls:
        with pytest.raises(grpc.RpcError) as error:
            next(call)
        assert error.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    streams.send()
    assert streams.receive().step == 2


def test_info_health_and_a_second_warm_up(shards: Shards) -> None:
    world_size = len(shards.stubs)
    for rank, stub in enumerate(shards.stubs):
        info = stub.Info(pb.InfoRequest(), timeout=TIMEOUT_S)
        assert info == pb.InfoReply(
            dtype="float32", device_name="cpu", rank=rank, world_size=world_size, vocab_size=96,
            max_position_embeddings=128, block_size=16, pid=shards.processes[rank].pid,
            num_layer_weights=2 * (3072 + 3 * 2048) // world_size, num_context_features=2 * 32 // world_size,
        )  # fmt: skip
        stub.Health(pb.HealthRequest(), timeout=TIMEOUT_S)
        assert stub.Warmup(WARM_UP, timeout=TIMEOUT_S).num_blocks == NUM_BLOCKS
        with pytest.raises(grpc.RpcError) as error:
            stub.Warmup(pb.WarmupRequest(max_step_tokens=1, max_num_sequences=1), timeout=TIMEOUT_S)
        assert error.value.code() == grpc.StatusCode.FAILED_PRECONDITION


def test_sockets_are_private_and_progress_is_written(shards: Shards, streams: Streams) -> None:
    streams.send()
    streams.receive()
    for rank in range(len(shards.stubs)):
        path = Path(shard_socket_path(shards.uds_path, rank))
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    step, started, _, ended = struct.unpack("<4Q", (shards.folder / "progress-0").read_bytes()[:32])
    assert step == 1
    assert started <= ended <= time.monotonic_ns()


def test_before_warm_up_and_after_sigterm(model_folder: Path, tmp_path: Path) -> None:
    shards = Shards(model_folder, tmp_path, 1)
    try:
        shards.wait_until_loaded()
        with pytest.raises(grpc.RpcError) as error:
            next(Streams(shards).calls[0])
        assert error.value.code() == grpc.StatusCode.FAILED_PRECONDITION
        too_long = pb.WarmupRequest(max_step_tokens=32, max_num_sequences=8, max_sequence_length=100, max_kv_tokens=64)
        with pytest.raises(grpc.RpcError) as error:
            shards.stubs[0].Warmup(too_long, timeout=TIMEOUT_S)
        assert error.value.code() == grpc.StatusCode.FAILED_PRECONDITION
        assert "at most 64" in error.value.details()
        shards.warm_up()
        streams = Streams(shards)
        streams.send()
        streams.receive()
        shards.processes[0].send_signal(signal.SIGTERM)
        assert shards.processes[0].wait(TIMEOUT_S) == 0, shards.log(0)
        with pytest.raises(grpc.RpcError) as error:
            next(streams.calls[0])
        assert error.value.code() == grpc.StatusCode.UNAVAILABLE
        assert not os.path.lexists(shard_socket_path(shards.uds_path, 0))
    finally:
        shards.close()
    lines = [json.loads(line) for line in shards.log(0).splitlines()]
    assert any("Start-up phase weights" in line["message"] for line in lines)
    assert all(line["fields"]["message"] == line["message"] and line["level"] == "INFO" for line in lines)


def test_one_rank_alone_survives_a_stream_that_breaks_off(model_folder: Path, tmp_path: Path) -> None:
    shards = Shards(model_folder, tmp_path, 1)
    try:
        shards.wait_until_loaded()
        shards.warm_up()
        first = Streams(shards)
        first.send(new_sequences=[new(1, [1, 2], [0])], prefill_sequence_ids=[1], prefill_num_tokens=[2])
        assert list(rows(first.receive())) == [1]
        first.calls[0].cancel()
        second = Streams(shards)
        second.send()
        assert rows(second.receive()) == {}
        second.close()
    finally:
        shards.close()


def cancel(streams: Streams) -> None:
    for call in streams.calls:
        call.cancel()


@pytest.mark.parametrize("break_off", [cancel, Streams.break_off])
def test_a_stream_that_breaks_off_ends_a_group(
    model_folder: Path, tmp_path: Path, break_off: Callable[[Streams], None]
) -> None:
    """Rank 1 has a plan that rank 0 never gets, and waits for it in a collective.

    A stream that is cancelled may look to a rank like one whose plans just end.
    """
    shards = Shards(model_folder, tmp_path, 2)
    try:
        shards.wait_until_loaded()
        shards.warm_up()
        streams = Streams(shards)
        streams.send()
        streams.receive()
        plan = pb.StepPlan(
            step=2, new_sequences=[new(1, [1, 2], [0])], prefill_sequence_ids=pack_int32([1]),
            prefill_num_tokens=pack_int32([2]),
        )  # fmt: skip
        streams.send_to_one(1, plan)
        progress = tmp_path / "progress-1"
        while struct.unpack("<4Q", progress.read_bytes()[:32])[0] != 2:
            time.sleep(0.01)
        break_off(streams)
        assert [process.wait(TIMEOUT_S) for process in shards.processes] == [1, 1]
    finally:
        shards.close()
    assert "broke off" in shards.log(0)


def test_a_step_that_breaks_ends_the_process(model_folder: Path, tmp_path: Path) -> None:
    shards = Shards(model_folder, tmp_path, 2)
    try:
        shards.wait_until_loaded()
        shards.warm_up()
        streams = Streams(shards)
        streams.send()
        streams.receive()
        shards.processes[1].kill()
        shards.processes[1].wait()
        # The next step's collective fails on rank 0.
        streams.send(new_sequences=[new(1, [1, 2], [0])], prefill_sequence_ids=[1], prefill_num_tokens=[2])
        with pytest.raises(grpc.RpcError) as error:
            streams.receive()
        assert error.value.code() == grpc.StatusCode.UNAVAILABLE
        assert shards.processes[0].wait(TIMEOUT_S) == 1
    finally:
        shards.close()
    assert "Traceback" in shards.log(0)
    assert not os.path.lexists(shard_socket_path(shards.uds_path, 0))
    _, started, deadline, ended = struct.unpack("<4Q", (tmp_path / "progress-0").read_bytes()[:32])
    assert ended < started
    assert deadline <= time.monotonic_ns()
