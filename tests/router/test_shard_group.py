"""How the next group of shards gets ready, with scripted shards and a scripted launcher."""

import asyncio

import pytest
from text_generation_router import shard_group
from text_generation_router.config import RouterConfig
from text_generation_router.launcher_link import NoMoreShards
from text_generation_router.limits import Limits
from text_generation_router.shard_client import ShardFailure, ShardInfo
from text_generation_router.shard_group import ShardGroup, ShardSupply

INFO = ShardInfo("cpu", "float32", 257, 256, 4, 1000, 0)
LOST = ShardFailure("gone")


class ScriptedShards:
    """Ready at once, but for grammars: each takes `grammar_s`."""

    grammar_s = 0.0

    def __init__(self, uds_path: str, world_size: int) -> None:
        self.grammars: list[str] = []
        self.is_closed = False

    async def info(self) -> ShardInfo:
        return INFO

    async def warm_up(self, *limits: int) -> int:
        return 64

    async def prepare_grammar(self, text: str) -> str:
        await asyncio.sleep(self.grammar_s)
        self.grammars.append(text)
        return ""

    async def close(self) -> None:
        self.is_closed = True


class ScriptedLink:
    """Has as many further groups as it is told."""

    def __init__(self, num_groups: int) -> None:
        self.num_groups = num_groups
        self.losses: list[tuple[str, bool]] = []

    def report_lost(self, generation: int, reason: str, is_stuck: bool) -> None:
        self.losses.append((reason, is_stuck))

    async def next_generation(self, after: int) -> int:
        if len(self.losses) > self.num_groups:
            raise NoMoreShards
        return after + 1


class NoGrammarTokens:
    def grammar_tokens(self, vocab_size: int) -> None:
        return None


@pytest.fixture
def supply(monkeypatch: pytest.MonkeyPatch) -> ShardSupply:
    monkeypatch.setattr(shard_group, "ShardClient", ScriptedShards)
    monkeypatch.setattr(shard_group, "ShardProgress", lambda run_folder, world_size: None)
    supply = ShardSupply(RouterConfig(), NoGrammarTokens(), ScriptedLink(1))
    supply._first = INFO, 64, Limits(200, 256, 257, "cpu")
    return supply


def next_group(supply: ShardSupply, grammars) -> ShardGroup:
    return asyncio.run(supply.next_group(LOST, grammars))


def test_many_grammars_may_take_longer_than_the_shards_themselves(supply, monkeypatch):
    monkeypatch.setattr(shard_group, "READY_GRACE_S", 0.02)
    monkeypatch.setattr(ScriptedShards, "grammar_s", 0.01)
    grammars = {f"grammar {number}" for number in range(10)}
    assert set(next_group(supply, lambda: grammars).shards.grammars) == grammars
    assert supply._link.losses == [("gone", False)]


def test_the_grammar_of_a_request_that_has_ended_is_left_out(supply):
    rounds = iter([{"a", "b"}, set()])
    assert len(next_group(supply, lambda: next(rounds)).shards.grammars) == 1


def test_a_group_that_does_not_end_a_grammar_is_stuck(supply, monkeypatch):
    monkeypatch.setattr(shard_group, "GRAMMAR_LIMIT_S", 0.01)
    monkeypatch.setattr(ScriptedShards, "grammar_s", 60.0)
    with pytest.raises(ShardFailure, match="did not get ready in time"):
        next_group(supply, lambda: {"a"})
    assert supply._link.losses[1:] == [("the shards did not get ready in time", True)]
