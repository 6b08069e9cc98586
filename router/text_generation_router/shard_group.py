"""Groups of shards as the engine uses them: connected, warmed up, and a new one when one is lost."""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from text_generation_router.config import RouterConfig
from text_generation_router.launcher_link import LauncherLink, NoMoreShards
from text_generation_router.limits import Limits, derive_limits, step_limits
from text_generation_router.shard_client import ShardClient, ShardFailure, ShardInfo
from text_generation_router.shard_progress import ShardProgress
from text_generation_router.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

# A later group may take so much longer than the first to get ready: other processes may use the machine by then.
READY_FACTOR = 5.0
READY_GRACE_S = 60.0
# A grammar took 1.5 s at most when it was accepted; a group that needs so much longer for one is stuck.
GRAMMAR_LIMIT_S = 30.0


@dataclass(frozen=True)
class ShardGroup:
    """One life of the ranks that share the model, ready for plans."""

    shards: ShardClient
    progress: ShardProgress
    info: ShardInfo
    num_blocks: int


class ShardSupply:
    """Gets the groups that the launcher starts ready for plans, one after another."""

    def __init__(self, config: RouterConfig, tokenizer: Tokenizer, link: LauncherLink) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._link = link
        self._generation = 1
        self._first: tuple[ShardInfo, int, Limits] | None = None  # what the first group had, and what it allowed
        self._ready_s = 0.0  # what the first group took

    async def first_group(self) -> tuple[ShardGroup, Limits]:
        """The first group, and the limits on requests that hold from then on.

        Raises ShardFailure when a shard does not answer or the limits do not fit its memory, and InvalidLimits when
        they contradict the model.
        """
        started_s = time.monotonic()
        config = self._config
        group = await self._prepare(config.max_total_tokens or 0, config.max_batch_total_tokens or 0)
        limits = derive_limits(config, group.info, group.num_blocks)
        self._first = group.info, group.num_blocks, limits
        self._ready_s = time.monotonic() - started_s
        return group, limits

    async def next_group(self, lost: ShardFailure, grammars: Callable[[], Iterable[str]]) -> ShardGroup:
        """Report that the group is lost, and get the next one ready, also for these grammars.

        Raises ShardFailure, with the reason of the last loss, when no further group will come.
        """
        while True:
            self._link.report_lost(self._generation, str(lost), lost.is_stuck)
            try:
                self._generation = await self._link.next_generation(self._generation)
            except NoMoreShards:
                raise lost from None
            try:
                return await self._prepare_again(grammars)
            except TimeoutError:
                lost = ShardFailure("the shards did not get ready in time", is_stuck=True)
            except ShardFailure as error:
                lost = error
            except Exception as error:  # whatever a group does while it gets ready: another one may do better
                logger.exception("Group %d of the shards broke off", self._generation)
                lost = ShardFailure(repr(error))
            logger.error("Group %d of the shards: %s", self._generation, lost)

    async def _prepare_again(self, grammars: Callable[[], Iterable[str]]) -> ShardGroup:
        """A group that must be able to do what the first one could: requests were accepted on its word."""
        assert self._first is not None
        info, num_blocks, limits = self._first
        async with asyncio.timeout(READY_GRACE_S + READY_FACTOR * self._ready_s):
            group = await self._prepare(limits.max_total_tokens, num_blocks * info.block_size)
        try:
            if group.info != info:
                raise ShardFailure("the shards hold another model than before")
            await _prepare_grammars(group.shards, grammars)
        except BaseException:
            await group.shards.close()
            raise
        return group

    async def _prepare(self, max_total_tokens: int, max_kv_tokens: int) -> ShardGroup:
        config = self._config
        shards = ShardClient(config.shard_uds_path, config.world_size)
        try:
            info = await shards.info()
            limits = step_limits(config, info)
            num_blocks = await shards.warm_up(
                limits.max_step_tokens, limits.max_num_sequences, max_total_tokens, max_kv_tokens
            )
            tokens = self._tokenizer.grammar_tokens(info.vocab_size)
            if tokens is not None and not config.disable_grammar_support:
                await shards.load_vocabulary(*tokens)
            return ShardGroup(shards, ShardProgress(config.run_folder, config.world_size), info, num_blocks)
        except BaseException:
            await shards.close()
            raise

    async def close(self) -> None:
        """Say that no group is needed any more."""
        await self._link.close()


async def _prepare_grammars(shards: ShardClient, grammars: Callable[[], Iterable[str]]) -> None:
    """Each has its own time: clients decide how many there are. Those of requests that end meanwhile are left out."""
    prepared: set[str] = set()
    while missing := set(grammars()) - prepared:
        grammar = missing.pop()
        async with asyncio.timeout(GRAMMAR_LIMIT_S):
            await shards.prepare_grammar(grammar)
        prepared.add(grammar)
