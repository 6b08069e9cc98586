"""The gRPC service on this rank's Unix socket: messages in and out. The only file that touches proto messages.

Handlers run in gRPC's threads and leave all work to the step loop.
"""

import logging
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
from text_generation_proto import shard_pb2 as pb
from text_generation_proto.channel import CHANNEL_OPTIONS, shard_address, shard_socket_path
from text_generation_proto.columns import pack_float32, pack_int32, unpack_float32, unpack_int32, unpack_strings
from text_generation_proto.shard_pb2_grpc import ShardServicer, add_ShardServicer_to_server

from text_generation_shard import distributed
from text_generation_shard.compiled_grammars import CompiledGrammars, UnusableGrammar
from text_generation_shard.step import LogitsChanges, NewSequence, PlanError, StepPlan, StepResult
from text_generation_shard.step_loop import PlanStream, StepLoop
from text_generation_shard.warm_up import WarmUpError, WarmUpLimits

logger = logging.getLogger(__name__)

# Run and Warmup hold a thread each for as long as they last; the others answer at once.
NUM_HANDLER_THREADS = 8
# A router that reconnects may be faster than the news of its old connection's end.
OLD_STREAM_TIMEOUT_S = 5.0
STOP_TIMEOUT_S = 1.0
MAX_SOCKET_PATH_BYTES = 107  # sockaddr_un


def unpack_plan(message: pb.StepPlan) -> StepPlan:
    """A plan as the batch reads it; raises PlanError for a column that is not whole."""
    try:
        return StepPlan(
            step=message.step,
            removed_sequence_ids=unpack_int32(message.removed_sequence_ids),
            new_sequences=tuple(_unpack_sequence(sequence) for sequence in message.new_sequences),
            grown_sequence_ids=unpack_int32(message.grown_sequence_ids),
            grown_num_blocks=unpack_int32(message.grown_num_blocks),
            grown_block_ids=unpack_int32(message.grown_block_ids),
            prefill_sequence_ids=unpack_int32(message.prefill_sequence_ids),
            prefill_num_tokens=unpack_int32(message.prefill_num_tokens),
        )
    except ValueError as error:
        raise PlanError(f"step {message.step}: {error}") from None


def _unpack_sequence(message: pb.NewSequence) -> NewSequence:
    if message.sequence_id >= 2**31:
        raise PlanError(f"sequence id {message.sequence_id} does not fit the columns")
    return NewSequence(
        sequence_id=message.sequence_id,
        token_ids=unpack_int32(message.token_ids),
        num_prompt_tokens=message.num_prompt_tokens,
        num_computed_tokens=message.num_computed_tokens,
        block_ids=unpack_int32(message.block_ids),
        temperature=message.sampling.temperature,
        top_k=message.sampling.top_k,
        top_p=message.sampling.top_p,
        seed=message.sampling.seed,
        min_p=message.sampling.min_p,
        typical_p=message.sampling.typical_p or 1.0,
        grammar=message.grammar,
        changes=_unpack_changes(message.sampling.changes) if message.sampling.HasField("changes") else None,
        top_n_tokens=message.sampling.top_n_tokens,
        scores_prompt=message.scores_prompt,
        prompt_top_n_tokens=message.prompt_top_n_tokens,
    )


def _unpack_changes(message: pb.LogitsChanges) -> LogitsChanges:
    return LogitsChanges(
        bias_token_ids=unpack_int32(message.bias_token_ids),
        bias_values=unpack_float32(message.bias_values),
        has_watermark=message.has_watermark,
        repetition_penalty=message.repetition_penalty,
        share_penalty=message.share_penalty,
        frequency_penalty=message.frequency_penalty,
        presence_penalty=message.presence_penalty,
        banned_token_ids=unpack_int32(message.banned_token_ids),
        min_tokens=message.min_tokens,
    )


def pack_result(result: StepResult) -> pb.StepResult:
    """A result as it goes over the wire."""
    message = pb.StepResult(
        step=result.step,
        sequence_ids=pack_int32(result.sequence_ids),
        token_ids=pack_int32(result.token_ids),
        logprobs=pack_float32(result.logprobs),
        failed_sequence_ids=pack_int32(list(result.failures)),
        failure_messages=result.failures.values(),
        forward_ns=result.forward_ns,
        sample_ns=result.sample_ns,
        step_ns=result.step_ns,
        idle_ns=result.idle_ns,
        mask_ns=result.mask_ns,
    )
    if (top := result.top_tokens) is not None:
        message.top_num_tokens = pack_int32(top.num_tokens)
        message.top_token_ids = pack_int32(top.token_ids)
        message.top_logprobs = pack_float32(top.logprobs)
    if (scores := result.prompt_scores) is not None:
        message.scored_sequence_ids = pack_int32(scores.sequence_ids)
        message.scored_first_positions = pack_int32(scores.first_positions)
        message.scored_num_tokens = pack_int32(scores.num_tokens)
        message.scored_logprobs = pack_float32(scores.logprobs)
        message.scored_top_n_tokens = scores.top_token_ids.shape[1]
        message.scored_top_token_ids = pack_int32(scores.top_token_ids)
        message.scored_top_logprobs = pack_float32(scores.top_logprobs)
    return message


class ShardService(ShardServicer):
    """The calls of shard.proto."""

    def __init__(self, loop: StepLoop) -> None:
        self._loop = loop
        self._warm_up_lock = threading.Lock()
        self._warm_up_reply: tuple[WarmUpLimits, pb.WarmupReply] | None = None

    def Info(self, request: pb.InfoRequest, context: grpc.ServicerContext) -> pb.InfoReply:
        """Dimensions of the model."""
        info, layout = self._loop.runner.info, self._loop.runner.layout
        return pb.InfoReply(
            dtype=str(layout.dtype).removeprefix("torch."),
            device_name=info.device_name,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            vocab_size=info.vocab_size,
            max_position_embeddings=info.max_position_embeddings,
            block_size=layout.block_size,
            pid=os.getpid(),
            device_uuid=info.device_uuid,
            num_layer_weights=info.num_layer_weights,
            num_context_features=info.num_context_features,
        )

    def Warmup(self, request: pb.WarmupRequest, context: grpc.ServicerContext) -> pb.WarmupReply:
        """Worst case, then KV memory. Asked again for the same limits, it answers the same."""
        limits = WarmUpLimits(
            max_step_tokens=request.max_step_tokens,
            max_num_sequences=request.max_num_sequences,
            max_sequence_length=request.max_sequence_length,
            max_kv_tokens=request.max_kv_tokens,
        )
        with self._warm_up_lock:
            if self._warm_up_reply is None:
                try:
                    num_blocks = self._loop.call(lambda: self._loop.runner.warm_up(limits), WarmUpError)
                except WarmUpError as error:
                    context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
                reply = pb.WarmupReply(num_blocks=num_blocks)
                self._warm_up_reply = limits, reply
            warm_limits, reply = self._warm_up_reply
        if warm_limits != limits:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"already warmed up for {warm_limits}")
        return reply

    def Vocabulary(self, request: pb.VocabularyRequest, context: grpc.ServicerContext) -> pb.VocabularyReply:
        """The tokens, for grammars."""
        grammars = self._sampling_grammars(context)
        try:
            token_bytes = unpack_strings(request.token_lengths, request.token_bytes)
            grammars.load(token_bytes, unpack_int32(request.eos_token_ids).tolist())
        except ValueError as error:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        return pb.VocabularyReply()

    def Grammar(self, request: pb.GrammarRequest, context: grpc.ServicerContext) -> pb.GrammarReply:
        """Compiles in this thread, so that no step waits for it."""
        try:
            self._sampling_grammars(context).prepare(request.grammar)
        except UnusableGrammar as error:
            return pb.GrammarReply(error=str(error))
        return pb.GrammarReply()

    def _sampling_grammars(self, context: grpc.ServicerContext) -> CompiledGrammars:
        grammars: CompiledGrammars | None = self._loop.runner.grammars
        if grammars is None:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "rank 0 alone follows grammars")
        assert grammars is not None
        return grammars

    def Health(self, request: pb.HealthRequest, context: grpc.ServicerContext) -> pb.HealthReply:
        """Answers while the process can."""
        return pb.HealthReply()

    def Run(self, plans: Iterator[pb.StepPlan], context: grpc.ServicerContext) -> Iterator[pb.StepResult]:
        """Plans in, results out, until the client goes or a plan breaks the protocol."""
        if not self._loop.runner.is_warm:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "Warmup comes before Run")
        stream = PlanStream()
        if not self._loop.open(stream, OLD_STREAM_TIMEOUT_S):
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "another Run stream is open")
        if not context.add_callback(lambda: self._loop.close(stream)):
            self._loop.close(stream)
            return
        threading.Thread(target=self._read_plans, args=(plans, stream), name="read-plans", daemon=True).start()
        while (result := stream.next_result()) is not None:
            yield pack_result(result)
        if isinstance(stream.error, PlanError):
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(stream.error))
        elif stream.error is not None:
            context.abort(grpc.StatusCode.UNAVAILABLE, str(stream.error))

    def _read_plans(self, plans: Iterator[pb.StepPlan], stream: PlanStream) -> None:
        # A call that is cancelled may end `plans` without an error too, so only a plan can say that it is the last.
        try:
            for message in plans:
                if message.is_last:
                    self._loop.submit(stream, None)
                    return
                self._loop.submit(stream, unpack_plan(message))
        except PlanError as error:
            self._loop.submit(stream, error)
            return
        except grpc.RpcError:
            pass  # the client is gone
        self._loop.close(stream)


class ShardServer:
    """The socket that a ShardService answers on: open from `start` to `stop`, for this user alone."""

    def __init__(self, service: ShardService, uds_path: str, rank: int) -> None:
        self._path = Path(shard_socket_path(uds_path, rank))
        if len(os.fsencode(self._path)) > MAX_SOCKET_PATH_BYTES:
            raise OSError(f"{self._path} is longer than a Unix socket's path can be ({MAX_SOCKET_PATH_BYTES} bytes)")
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._server = grpc.server(
            ThreadPoolExecutor(NUM_HANDLER_THREADS, thread_name_prefix="grpc"), options=CHANNEL_OPTIONS
        )
        add_ShardServicer_to_server(service, self._server)
        self._address = shard_address(uds_path, rank)

    def start(self) -> None:
        """Listen; from now on the shard counts as loaded."""
        # Nobody but this user may connect, not even between the socket's birth and a chmod.
        old_mask = os.umask(0o177)
        try:
            self._server.add_insecure_port(self._address)
        finally:
            os.umask(old_mask)
        self._server.start()
        logger.info("Server started at %s", self._address)

    def stop(self) -> None:
        """Let running calls end, then close and remove the socket."""
        self._server.stop(STOP_TIMEOUT_S).wait()
        self._path.unlink(missing_ok=True)
