"""The router's end of the protocol, spoken to real gRPC servers that follow a script."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import grpc
import pytest
from text_generation_proto import shard_pb2 as pb
from text_generation_proto.channel import shard_address
from text_generation_proto.columns import pack_float32, pack_int32, unpack_float32, unpack_int32
from text_generation_proto.shard_pb2_grpc import ShardServicer, add_ShardServicer_to_server
from text_generation_router.shard_client import ShardClient, ShardFailure, pack_plan, unpack_result
from text_generation_router.step import NewSequence, ScoredTokens, StepPlan, StepResult
from text_generation_router.token_scores import PromptScore
from text_generation_router.valid_request import LogitsChanges, SamplingParameters


class ScriptedShard(ShardServicer):
    """One rank: notes the plans, and rank 0 answers each after `delay_s`."""

    def __init__(self, rank: int, world_size: int, **info: Any) -> None:
        fields = {"dtype": "float32", "device_name": "cpu", "vocab_size": 300, "block_size": 16}
        fields |= {"num_layer_weights": 7000, "num_context_features": 600} | info
        self._info = pb.InfoReply(rank=rank, world_size=world_size, **fields)
        self._answers = rank == 0
        self.delay_s = 0.0
        self.plans: list[pb.StepPlan] = []
        self.has_plan = asyncio.Event()
        self.ending = ""

    async def Info(self, request: pb.InfoRequest, context: Any) -> pb.InfoReply:
        return self._info

    async def Run(self, plans: AsyncIterator[pb.StepPlan], context: Any) -> AsyncIterator[pb.StepResult]:
        self.ending = "broken off"
        async for plan in plans:
            if plan == pb.StepPlan(is_last=True):
                self.ending = "closed"
                return
            self.plans.append(plan)
            self.has_plan.set()
            if self._answers:
                await asyncio.sleep(self.delay_s)
                ids = pack_int32([plan.step])
                yield pb.StepResult(step=plan.step, sequence_ids=ids, token_ids=ids, logprobs=pack_float32([-1.0]))


def run_with_shards(
    folder: Path, shards: list[ScriptedShard], body: Callable[[ShardClient], Coroutine[Any, Any, None]]
) -> None:
    async def main() -> None:
        servers = [grpc.aio.server() for _ in shards]
        for rank, (server, shard) in enumerate(zip(servers, shards, strict=True)):
            add_ShardServicer_to_server(shard, server)
            server.add_insecure_port(shard_address(str(folder / "shard"), rank))
            await server.start()
        client = ShardClient(str(folder / "shard"), len(shards))
        try:
            async with asyncio.timeout(20):
                await body(client)
        finally:
            await client.close()
            for server in servers:
                await server.stop(None)

    asyncio.run(main())


PLAN = StepPlan(
    step=1,
    removed_sequence_ids=[3],
    new_sequences=[NewSequence(7, [5, 6], 2, 1, [4], SamplingParameters(0.5, 3, 0.9, seed=2**64 - 1))],
    grown_sequence_ids=[8],
    grown_num_blocks=[2],
    grown_block_ids=[10, 11],
    prefill_sequence_ids=[7],
    prefill_num_tokens=[1],
)
COLUMNS = (
    "removed_sequence_ids", "grown_sequence_ids", "grown_num_blocks", "grown_block_ids", "prefill_sequence_ids",
    "prefill_num_tokens",
)  # fmt: skip


def test_every_rank_gets_each_plan_and_answers_all_before_the_end(tmp_path: Path) -> None:
    shards = [ScriptedShard(rank, 2) for rank in range(2)]
    shards[0].delay_s = 0.2
    results: list[StepResult] = []
    failures: list[ShardFailure] = []

    async def body(client: ShardClient) -> None:
        client.start(results.append, failures.append)
        await client.send(PLAN)
        await client.send(StepPlan(step=2))
        await client.close()

    run_with_shards(tmp_path, shards, body)
    assert results == [StepResult(step, [step], [step], [-1.0]) for step in (1, 2)]
    assert failures == []
    for shard in shards:
        assert shard.ending == "closed"
        first, second = shard.plans
        assert second == pb.StepPlan(step=2)
        for column in COLUMNS:
            assert unpack_int32(getattr(first, column)).tolist() == getattr(PLAN, column)
        (sequence,) = first.new_sequences
        assert (sequence.sequence_id, sequence.num_prompt_tokens, sequence.num_computed_tokens) == (7, 2, 1)
        assert unpack_int32(sequence.token_ids).tolist() == [5, 6]
        assert unpack_int32(sequence.block_ids).tolist() == [4]
        assert (sequence.sampling.temperature, sequence.sampling.top_k, sequence.sampling.seed) == (0.5, 3, 2**64 - 1)


def test_what_changes_logits_and_what_is_told_beside_tokens() -> None:
    """Over the wire and back: absent unless asked for."""
    changes = LogitsChanges((5, 6), (1.5, -2.0), True, 1.25, 0.5, 0.25, -0.5, (7,), 3)
    sampling = SamplingParameters(changes=changes, top_n_tokens=2)
    new = NewSequence(7, [5, 6], 2, 1, [4], sampling, scores_prompt=True, prompt_top_n_tokens=1)
    (packed,) = pb.StepPlan.FromString(pack_plan(StepPlan(step=1, new_sequences=[new]))).new_sequences
    assert (packed.scores_prompt, packed.prompt_top_n_tokens, packed.sampling.top_n_tokens) == (True, 1, 2)
    message = packed.sampling.changes
    assert unpack_int32(message.bias_token_ids).tolist() == [5, 6]
    assert unpack_float32(message.bias_values).tolist() == [1.5, -2.0]
    assert unpack_int32(message.banned_token_ids).tolist() == [7]
    penalties = (message.repetition_penalty, message.share_penalty, message.frequency_penalty, message.presence_penalty)
    assert penalties == (1.25, 0.5, 0.25, -0.5)
    assert (message.has_watermark, message.min_tokens) == (True, 3)
    (plain,) = pb.StepPlan.FromString(pack_plan(PLAN)).new_sequences
    assert not plain.sampling.HasField("changes")

    result = unpack_result(
        pb.StepResult(
            step=1, sequence_ids=pack_int32([8, 9]), token_ids=pack_int32([1, 2]), logprobs=pack_float32([-1, -2]),
            top_num_tokens=pack_int32([0, 2]), top_token_ids=pack_int32([2, 3]), top_logprobs=pack_float32([-2, -3]),
            scored_sequence_ids=pack_int32([8, 9]), scored_first_positions=pack_int32([1, 5]),
            scored_num_tokens=pack_int32([2, 1]), scored_logprobs=pack_float32([-1, -2, -3]), scored_top_n_tokens=1,
            scored_top_token_ids=pack_int32([4, 5, 6]), scored_top_logprobs=pack_float32([-0.5, -1.5, -2.5]),
        )
    )  # fmt: skip
    assert result.top_tokens == [[], [(2, -2.0), (3, -3.0)]]
    first = [PromptScore(-1.0, [(4, -0.5)]), PromptScore(-2.0, [(5, -1.5)])]
    assert result.scored_prompts == [ScoredTokens(8, 1, first), ScoredTokens(9, 5, [PromptScore(-3.0, [(6, -2.5)])])]


def test_a_shard_that_does_not_answer_in_time_does_not_hold_up_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("text_generation_router.shard_client.LAST_RESULTS_TIMEOUT_S", 0.05)
    shard = ScriptedShard(0, 1)
    shard.delay_s = 3600.0

    async def body(client: ShardClient) -> None:
        client.start(lambda result: None, lambda failure: None)
        await client.send(PLAN)
        await shard.has_plan.wait()
        await client.close()

    run_with_shards(tmp_path, [shard], body)
    assert shard.ending == "broken off"


@pytest.mark.parametrize(
    ("ranks", "changes", "message"),
    [
        ([(0, 2), (1, 2)], {}, None),
        ([(1, 2), (0, 2)], {}, "one group"),
        ([(0, 2), (0, 2)], {}, "one group"),
        ([(0, 1)] * 2, {}, "one group"),
        ([(0, 2), (1, 2)], {"vocab_size": 301}, "shard 1 .* same model"),
        ([(0, 2), (1, 2)], {"dtype": "bfloat16"}, "shard 1 .* same model"),
    ],
)
def test_ranks_that_are_no_group_are_refused(
    tmp_path: Path, ranks: list[tuple[int, int]], changes: dict[str, Any], message: str | None
) -> None:
    first, second = ranks
    shards = [ScriptedShard(*first), ScriptedShard(*second, **changes)]

    async def body(client: ShardClient) -> None:
        if message is None:
            info = await client.info()
            assert (info.device_name, info.vocab_size, info.block_size) == ("cpu", 300, 16)
            assert (info.num_layer_weights, info.num_context_features) == (7000, 600)
            return
        with pytest.raises(ShardFailure, match=message):
            await client.info()

    run_with_shards(tmp_path, shards, body)
