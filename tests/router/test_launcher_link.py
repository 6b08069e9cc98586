"""The line between router and launcher, both real ends of it."""

import asyncio
import os
import queue

import pytest
from text_generation_launcher.router_line import LostGroup, RouterLine
from text_generation_router.launcher_link import LauncherLink, NoMoreShards


def test_a_lost_group_is_reported_and_the_next_one_is_heard_of():
    async def run():
        lost = queue.SimpleQueue()
        line, link = RouterLine(lost.put), LauncherLink()
        await link.open(os.dup(line.router_descriptor))
        line.start()
        link.report_lost(1, "a reason,\nin two lines", is_stuck=True)
        assert await asyncio.to_thread(lost.get, timeout=20) == LostGroup(1, "a reason,\nin two lines", True)
        waiting = asyncio.create_task(link.next_generation(1))
        line.tell_ready(2)
        line.tell_ready(3)
        async with asyncio.timeout(20):
            assert await waiting >= 2
            assert await link.next_generation(2) == 3
            waiting = asyncio.create_task(link.next_generation(3))
            await asyncio.sleep(0)
            line.close()
            with pytest.raises(NoMoreShards):
                await waiting
        await link.close()

    asyncio.run(run())


def test_without_a_launcher_no_group_follows():
    async def run():
        link = LauncherLink()
        await link.open(None)
        link.report_lost(1, "gone", is_stuck=False)
        with pytest.raises(NoMoreShards):
            await link.next_generation(1)
        await link.close()

    asyncio.run(run())
