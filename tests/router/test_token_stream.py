"""TokenStream: tokens handed to a reader that waits, kept for one that does not, and the end that always wakes it."""

import asyncio

import pytest
from text_generation_router.errors import GenerationError
from text_generation_router.token_stream import FinishReason, TokenOutput, TokenStream


def token(token_id: int) -> TokenOutput:
    return TokenOutput(token_id, -0.5, str(token_id), False)


class Reader:
    """Reads to the end; notes which tokens were handed to it while it waited and which it had to read itself."""

    def __init__(self, stream: TokenStream) -> None:
        self.stream = stream
        self.takes = True
        self.taken: list[int] = []
        self.read: list[int] = []

    def take(self, outputs: list[TokenOutput]) -> bool:
        if self.takes:
            self.taken += [output.token_id for output in outputs]
        return self.takes

    async def run(self) -> None:
        while outputs := await self.stream.read(self.take):
            self.read += [output.token_id for output in outputs]


def test_tokens_before_the_last_are_taken_at_once():
    async def run():
        stream = TokenStream(1)
        stream.write([token(0)])
        reader = Reader(stream)
        task = asyncio.create_task(reader.run())
        await asyncio.sleep(0)
        stream.write([token(1)])
        stream.write([token(2), token(3)])
        assert reader.taken == [1, 2, 3]
        stream.finish(FinishReason.LENGTH, [token(4)])
        await task
        assert reader.taken == [1, 2, 3]
        assert reader.read == [0, 4]
        assert stream.num_generated_tokens == 5

    asyncio.run(run())


def test_tokens_that_are_not_taken_keep_their_order():
    async def run():
        stream = TokenStream(1)
        reader = Reader(stream)
        task = asyncio.create_task(reader.run())
        await asyncio.sleep(0)
        stream.write([token(0)])
        reader.takes = False
        stream.write([token(1)])
        reader.takes = True
        stream.write([token(2)])  # the one before it is not read yet
        await asyncio.sleep(0)
        assert reader.read == [1, 2]
        stream.write([token(3)])
        stream.finish(FinishReason.LENGTH, [token(4)])
        await task
        assert (reader.taken, reader.read) == ([0, 3], [1, 2, 4])

    asyncio.run(run())


def test_an_error_comes_after_the_tokens():
    async def run():
        stream = TokenStream(1)
        reader = Reader(stream)
        reader.takes = False
        task = asyncio.create_task(reader.run())
        await asyncio.sleep(0)
        stream.write([token(0)])
        stream.fail(GenerationError("gone"))
        with pytest.raises(GenerationError):
            await task
        assert reader.read == [0]

    asyncio.run(run())


def test_memory_that_waits_for_the_reader_is_counted():
    async def run():
        stream = TokenStream(1)
        stream.write([token(0), TokenOutput(1, -0.5, "1", False, [(1, -0.5), (2, -0.7), (3, -0.9)])])
        assert stream.num_unread_bytes == 2 * 256 + 3 * 128
        stream.finish(FinishReason.LENGTH, [token(2)])
        assert stream.num_unread_bytes == 3 * 256 + 3 * 128
        assert len(await stream.read()) == 3
        assert stream.num_unread_bytes == 0

    asyncio.run(run())
