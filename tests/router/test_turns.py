"""Turns: few handlers begin in one pass of the loop, in the order in which they came."""

import asyncio

from text_generation_router.api.turns import TURNS_PER_PASS, Turns


def test_a_burst_is_spread_over_passes_in_order():
    async def run():
        turns, begun, passes = Turns(), [], 0

        async def handle(number):
            await turns.take()
            begun.append((passes, number))

        tasks = [asyncio.create_task(handle(number)) for number in range(5 * TURNS_PER_PASS)]
        while not all(task.done() for task in tasks):
            await asyncio.sleep(0)
            passes += 1
        assert [number for _, number in begun] == list(range(5 * TURNS_PER_PASS))
        in_pass = [when for when, _ in begun]
        assert max(in_pass.count(when) for when in in_pass) == TURNS_PER_PASS

    asyncio.run(run())


def test_a_turn_that_nobody_takes_any_more_is_passed_on():
    async def run():
        turns = Turns()
        tasks = [asyncio.create_task(turns.take()) for _ in range(3 * TURNS_PER_PASS)]
        await asyncio.sleep(0)
        for task in tasks[TURNS_PER_PASS : 2 * TURNS_PER_PASS]:
            task.cancel()
        async with asyncio.timeout(5):
            await asyncio.gather(*tasks, return_exceptions=True)
        assert [task.cancelled() for task in tasks].count(True) == TURNS_PER_PASS
        async with asyncio.timeout(5):
            await turns.take()

    asyncio.run(run())
