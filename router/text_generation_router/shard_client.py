"""Sends each plan to every rank and takes rank 0's results: the router's end of the Run stream."""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeVar

import grpc
from text_generation_proto import shard_pb2 as pb
from text_generation_proto.channel import CHANNEL_OPTIONS, shard_address
from text_generation_proto.columns import pack_float32, pack_int32, pack_strings, unpack_float32, unpack_int32
from text_generation_proto.shard_pb2_grpc import ShardStub

from text_generation_router.step import NewSequence, ScoredTokens, StepPlan, StepResult
from text_generation_router.token_scores import PromptScore, TokenScore
from text_generation_router.valid_request import LogitsChanges, SamplingParameters

logger = logging.getLogger(__name__)

T = TypeVar("T")

_LAST_PLAN = pb.StepPlan(is_last=True).SerializeToString()
_RUN_METHOD = "/text_generation.shard.v1.Shard/Run"
CONNECT_TIMEOUT_S = 10.0
LAST_RESULTS_TIMEOUT_S = 1.0


class ShardFailure(Exception):
    """A rank is gone, or ended its stream, or makes no progress (`is_stuck`)."""

    def __init__(self, reason: str, is_stuck: bool = False) -> None:
        super().__init__(reason)
        self.is_stuck = is_stuck


@dataclass(frozen=True)
class ShardInfo:
    """What the shards say of the model they hold (the fields of shard.proto's InfoReply)."""

    device_name: str
    dtype: str
    vocab_size: int
    max_position_embeddings: int
    block_size: int
    num_layer_weights: int
    num_context_features: int


@dataclass(frozen=True)
class ShardProcess:
    """One rank: its process, and the name of its GPU among all GPUs of the world, "" on a CPU."""

    rank: int
    pid: int
    device_uuid: str


def pack_plan(plan: StepPlan) -> bytes:
    """A plan as it goes over the wire."""
    return pb.StepPlan(
        step=plan.step,
        removed_sequence_ids=pack_int32(plan.removed_sequence_ids),
        new_sequences=[_pack_sequence(sequence) for sequence in plan.new_sequences],
        grown_sequence_ids=pack_int32(plan.grown_sequence_ids),
        grown_num_blocks=pack_int32(plan.grown_num_blocks),
        grown_block_ids=pack_int32(plan.grown_block_ids),
        prefill_sequence_ids=pack_int32(plan.prefill_sequence_ids),
        prefill_num_tokens=pack_int32(plan.prefill_num_tokens),
    ).SerializeToString()


def _pack_sequence(sequence: NewSequence) -> pb.NewSequence:
    return pb.NewSequence(
        sequence_id=sequence.sequence_id,
        token_ids=pack_int32(sequence.token_ids),
        num_prompt_tokens=sequence.num_prompt_tokens,
        num_computed_tokens=sequence.num_computed_tokens,
        block_ids=pack_int32(sequence.block_ids),
        sampling=_pack_sampling(sequence.sampling),
        grammar=sequence.grammar,
        scores_prompt=sequence.scores_prompt,
        prompt_top_n_tokens=sequence.prompt_top_n_tokens,
    )


def _pack_sampling(sampling: SamplingParameters) -> pb.SamplingParameters:
    return pb.SamplingParameters(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        seed=sampling.seed,
        min_p=sampling.min_p,
        typical_p=sampling.typical_p,
        changes=None if sampling.changes is None else _pack_changes(sampling.changes),
        top_n_tokens=sampling.top_n_tokens,
    )


def _pack_changes(changes: LogitsChanges) -> pb.LogitsChanges:
    return pb.LogitsChanges(
        bias_token_ids=pack_int32(changes.bias_token_ids),
        bias_values=pack_float32(changes.bias_values),
        has_watermark=changes.has_watermark,
        repetition_penalty=changes.repetition_penalty,
        share_penalty=changes.share_penalty,
        frequency_penalty=changes.frequency_penalty,
        presence_penalty=changes.presence_penalty,
        banned_token_ids=pack_int32(changes.banned_token_ids),
        min_tokens=changes.min_tokens,
    )


def unpack_result(message: pb.StepResult) -> StepResult:
    """A result as the scheduler reads it; each row is one token."""
    failed = unpack_int32(message.failed_sequence_ids).tolist()
    return StepResult(
        step=message.step,
        sequence_ids=unpack_int32(message.sequence_ids).tolist(),
        token_ids=unpack_int32(message.token_ids).tolist(),
        logprobs=unpack_float32(message.logprobs).tolist(),
        top_tokens=_unpack_top_tokens(message) if message.top_num_tokens else None,
        scored_prompts=_unpack_scores(message) if message.scored_sequence_ids else [],
        failures=dict(zip(failed, message.failure_messages, strict=True)),
        forward_ns=message.forward_ns,
        sample_ns=message.sample_ns,
        step_ns=message.step_ns,
        idle_ns=message.idle_ns,
        mask_ns=message.mask_ns,
    )


def _unpack_top_tokens(message: pb.StepResult) -> list[list[TokenScore]]:
    top = _pairs(message.top_token_ids, message.top_logprobs)
    return _pieces(top, unpack_int32(message.top_num_tokens).tolist())


def _unpack_scores(message: pb.StepResult) -> list[ScoredTokens]:
    logprobs = unpack_float32(message.scored_logprobs).tolist()
    top = _pairs(message.scored_top_token_ids, message.scored_top_logprobs)
    top_tokens = _pieces(top, [message.scored_top_n_tokens] * len(logprobs))
    scores = [PromptScore(*pair) for pair in zip(logprobs, top_tokens, strict=True)]
    columns = (message.scored_sequence_ids, message.scored_first_positions)
    sequence_ids, first_positions = (unpack_int32(column).tolist() for column in columns)
    pieces = _pieces(scores, unpack_int32(message.scored_num_tokens).tolist())
    return [ScoredTokens(*one) for one in zip(sequence_ids, first_positions, pieces, strict=True)]


def _pairs(token_ids: bytes, logprobs: bytes) -> list[TokenScore]:
    return list(zip(unpack_int32(token_ids).tolist(), unpack_float32(logprobs).tolist(), strict=True))


def _pieces(values: list[T], counts: list[int]) -> list[list[T]]:
    ends = list(accumulate(counts))
    assert len(values) == (ends[-1] if ends else 0), "the counts of a column do not add up"
    return [values[end - count : end] for count, end in zip(counts, ends, strict=True)]


class ShardClient:
    """One connection to each rank of a tensor-parallel group."""

    def __init__(self, uds_path: str, world_size: int) -> None:
        # One connection a rank: channels in one process would share it otherwise, and with it a broken stream.
        options = [*CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1)]
        self._channels = [
            grpc.aio.insecure_channel(shard_address(uds_path, rank), options=options) for rank in range(world_size)
        ]
        self._stubs = [ShardStub(channel) for channel in self._channels]
        self.processes: list[ShardProcess] = []  # as `info` found them
        self._streams: list[grpc.aio.StreamStreamCall] = []
        self._readers: list[asyncio.Task[None]] = []
        self._is_closing = False
        self._is_partly_sent = False  # some ranks have a plan that others lack

    async def info(self) -> ShardInfo:
        """The dimensions of the loaded model; raises ShardFailure when a rank does not answer."""
        request = pb.InfoRequest()
        replies = await self._ask_all(
            [stub.Info(request, timeout=CONNECT_TIMEOUT_S, wait_for_ready=True) for stub in self._stubs]
        )
        self.processes = [ShardProcess(reply.rank, reply.pid, reply.device_uuid) for reply in replies]
        reply = replies[0]
        for rank, other in enumerate(replies):
            if (other.rank, other.world_size) != (rank, len(replies)):
                raise ShardFailure("the shards do not form one group of ranks")
            other.rank, other.pid, other.device_uuid = reply.rank, reply.pid, reply.device_uuid
            if other != reply:
                raise ShardFailure(f"shard {rank} does not hold the same model as shard 0")
        return ShardInfo(
            device_name=reply.device_name,
            dtype=reply.dtype,
            vocab_size=reply.vocab_size,
            max_position_embeddings=reply.max_position_embeddings,
            block_size=reply.block_size,
            num_layer_weights=reply.num_layer_weights,
            num_context_features=reply.num_context_features,
        )

    async def warm_up(
        self, max_step_tokens: int, max_num_sequences: int, max_sequence_length: int, max_kv_tokens: int
    ) -> int:
        """Let every rank run its worst case and allocate KV memory; returns the number of blocks.

        `max_sequence_length` and `max_kv_tokens` of 0 mean: no demand, no limit. Raises ShardFailure with the
        shard's reason when the limits do not fit its memory.
        """
        request = pb.WarmupRequest(
            max_step_tokens=max_step_tokens,
            max_num_sequences=max_num_sequences,
            max_sequence_length=max_sequence_length,
            max_kv_tokens=max_kv_tokens,
        )
        replies = await self._ask_all([stub.Warmup(request) for stub in self._stubs])
        assert len({reply.num_blocks for reply in replies}) == 1, "ranks disagree on the number of blocks"
        return int(replies[0].num_blocks)

    async def load_vocabulary(self, token_bytes: Sequence[bytes], eos_token_ids: Sequence[int]) -> None:
        """Tell rank 0, which samples, what the tokens are; raises ShardFailure."""
        lengths, joined = pack_strings(token_bytes)
        request = pb.VocabularyRequest(
            token_lengths=lengths, token_bytes=joined, eos_token_ids=pack_int32(eos_token_ids)
        )
        await self._ask_all([self._stubs[0].Vocabulary(request)])

    async def prepare_grammar(self, text: str) -> str:
        """Get rank 0 ready for a grammar; answers "", or why no sequence can follow it. Raises ShardFailure."""
        [reply] = await self._ask_all([self._stubs[0].Grammar(pb.GrammarRequest(grammar=text))])
        return str(reply.error)

    async def _ask_all(self, calls: list[Any]) -> list[Any]:
        try:
            return list(await asyncio.gather(*calls))
        except grpc.aio.AioRpcError as error:
            raise ShardFailure(error.details() or error.code().name) from None
        except asyncio.CancelledError:
            self._raise_if_closing()
            raise

    def _raise_if_closing(self) -> None:
        """Tell a call that was cancelled because the connection was closed from a task that was cancelled."""
        task = asyncio.current_task()
        if self._is_closing and (task is None or not task.cancelling()):
            raise ShardFailure("the connection was closed") from None

    def start(self, on_result: Callable[[StepResult], None], on_failure: Callable[[ShardFailure], None]) -> None:
        """Open the Run stream of every rank; results and the first failure are handed to the callbacks."""
        for rank, channel in enumerate(self._channels):
            # Plans are packed once for all ranks, so they go out as bytes.
            run = channel.stream_stream(_RUN_METHOD, response_deserializer=pb.StepResult.FromString)
            stream = run()
            self._streams.append(stream)
            self._readers.append(asyncio.create_task(self._read(rank, stream, on_result, on_failure)))

    async def _read(
        self,
        rank: int,
        stream: grpc.aio.StreamStreamCall,
        on_result: Callable[[StepResult], None],
        on_failure: Callable[[ShardFailure], None],
    ) -> None:
        try:
            async for message in stream:
                on_result(unpack_result(message))
            reason = "the stream ended"
        except grpc.aio.AioRpcError as error:
            reason = error.details() or error.code().name
        except Exception as error:
            logger.exception("a result of shard %d cannot be read", rank)
            reason = repr(error)
        if not self._is_closing:
            on_failure(ShardFailure(f"shard {rank}: {reason}"))

    async def send(self, plan: StepPlan) -> None:
        """Write a plan to every rank; raises ShardFailure when a stream is gone."""
        packed = pack_plan(plan)
        self._is_partly_sent = True
        try:
            for stream in self._streams:
                await stream.write(packed)
            self._is_partly_sent = False
        except (grpc.aio.AioRpcError, grpc.aio.UsageError, asyncio.InvalidStateError) as error:
            raise ShardFailure(f"a plan could not be sent: {error}") from None
        except asyncio.CancelledError:
            self._raise_if_closing()
            raise

    async def close(self) -> None:
        """Say that no plan follows, let the shards answer what they have, and end the connections.

        A group of ranks does not outlive a stream that just breaks off.
        """
        self._is_closing = True
        if not self._is_partly_sent and not any(reader.done() for reader in self._readers):
            broken = (grpc.aio.AioRpcError, grpc.aio.UsageError, asyncio.InvalidStateError)
            with contextlib.suppress(TimeoutError, *broken):
                async with asyncio.timeout(LAST_RESULTS_TIMEOUT_S):
                    for stream in self._streams:
                        await stream.write(_LAST_PLAN)
                    await asyncio.gather(*self._readers)
        await self.abandon()

    async def abandon(self) -> None:
        """End the connections to shards that are lost; nothing that they still send counts."""
        self._is_closing = True
        for reader in self._readers:
            reader.cancel()
        await asyncio.gather(*self._readers, return_exceptions=True)
        for channel in self._channels:
            await channel.close()
