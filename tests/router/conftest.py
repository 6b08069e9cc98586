"""A server on a real port around a scripted engine, for the tests of the HTTP side."""

import asyncio
import dataclasses
import itertools
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager

import aiohttp
import openai
import pytest
from text_generation_router.api.context import Context
from text_generation_router.app import Server, bind
from text_generation_router.block_manager import BlockManager
from text_generation_router.config import RouterConfig
from text_generation_router.conversation import Conversation
from text_generation_router.errors import IncompleteGeneration, RouterError, ShuttingDown, TemplateError
from text_generation_router.grammar import Grammar
from text_generation_router.live import LiveHistory
from text_generation_router.metrics import Metrics
from text_generation_router.model_family import ModelFamily
from text_generation_router.scheduler import Scheduler, SchedulerLimits
from text_generation_router.schema_checks import RefusedGrammar
from text_generation_router.shard_client import ShardInfo
from text_generation_router.shard_group import ShardGroup
from text_generation_router.token_scores import PromptScore
from text_generation_router.token_stream import FinishReason, Timings, TokenOutput, TokenStream
from text_generation_router.tokenizer import Tokenizer, TokenSpan
from text_generation_router.valid_request import ValidRequest
from tokenizers import Tokenizer as BackendTokenizer
from tokenizers import decoders, models, pre_tokenizers

BOS_TOKEN_ID = 1
END_TOKEN_ID = 299


@dataclasses.dataclass(frozen=True)
class FakeLimits:
    max_input_tokens: int = 64
    max_total_tokens: int = 100
    vocab_size: int = 300
    device_name: str = "Some GPU 80GB"


class FakeTokenizer:
    """A token is a byte of UTF-8; 1 is BOS, 299 ends a text."""

    eos_token_ids = frozenset({END_TOKEN_ID})

    async def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        await asyncio.sleep(0)
        return [BOS_TOKEN_ID] * add_special_tokens + list(text.encode())

    def as_plain_text(self, value):
        return value

    def visible_text(self, text: str) -> str:
        return text

    def special_ids(self, texts) -> list[int]:
        return [END_TOKEN_ID] if "<|end|>" in texts else []

    def spans_now(self, text: str, add_special_tokens: bool = True) -> list[TokenSpan]:
        starts = list(itertools.accumulate((len(c.encode()) for c in text), initial=0))
        spans = [
            TokenSpan(ord(c), c, start, stop) for c, (start, stop) in zip(text, itertools.pairwise(starts), strict=True)
        ]
        return [TokenSpan(BOS_TOKEN_ID)] * add_special_tokens + spans

    def token_text(self, token_id: int) -> str:
        return "<|end|>" if token_id == END_TOKEN_ID else chr(token_id)

    def is_special(self, token_id: int) -> bool:
        return token_id in (BOS_TOKEN_ID, END_TOKEN_ID)

    def pieces(self, token_ids: list[int]) -> Iterator[str]:
        return ("" if self.is_special(token_id) else chr(token_id) for token_id in token_ids)

    def token_bytes(self, token_id: int) -> bytes:
        return self.token_text(token_id).encode()


class FakeGrammars:
    """Every grammar's canonical text is its own, after its kind and reasoning; one that says so is refused."""

    async def compile(self, grammar: Grammar) -> str:
        if "refused" in grammar.text:
            raise RefusedGrammar("is refused")
        return f"{grammar.kind} {grammar.reasoning} {grammar.text}"


class FakeChatTemplate:
    """Shows the messages, and the names of the tools before them."""

    def __init__(self) -> None:
        self.family = ModelFamily(tool_format=None, has_reasoning=False)
        self.prompt_end = ""

    async def render(self, conversation: Conversation) -> str:
        return self.render_now(conversation)

    def render_now(self, conversation: Conversation) -> str:
        messages = conversation.messages
        tools = "".join(f"[{tool['function']['name']}]" for tool in conversation.tools)
        if messages[0]["role"] == "bad":
            raise TemplateError("no such role")
        text = "".join(f"{m['role']}:{m['content']}\n" for m in messages)
        return f"{tools}{text}assistant:{self.prompt_end}"


class FakeEngine:
    """Answers every request with `answer`, a token a character, then END; or fails after it, or hangs.

    `log` has the requests, `cancelled` the streams whose handlers ended, `left` those cancelled while running.
    """

    def __init__(self, answer: str = "Hi you", error: RouterError | None = None, is_hanging: bool = False) -> None:
        self.limits = FakeLimits()
        self.answer, self.error, self.is_hanging = answer, error, is_hanging
        self.tokens_at_once = 1
        self.logprobs: list[float] = []  # of the tokens of the first requests; -0.5 for others
        self.log: list[ValidRequest] = []
        self.left: list[TokenStream] = []
        self.is_draining = self.is_over = False
        self.healthy = self.alive = True
        self._running: dict[int, tuple[TokenStream, asyncio.Task[None]]] = {}

    def submit(self, request: ValidRequest, timings: Timings, is_further: bool = False) -> TokenStream:
        if self.is_over:
            raise ShuttingDown
        self.log.append(request)
        timings.queued_ns = time.monotonic_ns()
        stream = TokenStream(len(request.token_ids), len(self.log), timings)
        stream.note_scheduled(time.monotonic_ns(), num_cached_tokens=2)
        stream.num_preemptions, stream.num_recomputed_tokens = 1, 3
        if request.scores_prompt:
            # Token i of the prompt has -i, and is the best at its place.
            num_top = request.prompt_top_n_tokens
            rest = list(enumerate(request.token_ids))[1:]
            scores = [PromptScore(-i, [(token_id, -i), (7, -9.0)][:num_top]) for i, token_id in rest]
            stream.prompt_scores = [None, *scores]
        self._running[stream.sequence_id] = (stream, asyncio.ensure_future(self._answer(request, stream)))
        return stream

    async def _answer(self, request: ValidRequest, stream: TokenStream) -> None:
        number = self.log.index(request)
        logprob = self.logprobs[number] if number < len(self.logprobs) else -0.5
        num_top = request.sampling.top_n_tokens
        tokens = [
            # One that ties with the last is told too.
            TokenOutput(ord(c), logprob, c, False, [(ord(c), logprob), *[(300 + i, -3.0) for i in range(num_top)]])
            for c in self.answer
        ]
        tokens.append(TokenOutput(END_TOKEN_ID, logprob / 2, "", True, [(END_TOKEN_ID, logprob / 2), (7, -1.0)]))
        is_cut = len(tokens) > request.max_new_tokens
        tokens = tokens[: request.max_new_tokens]
        for start in range(0, len(tokens), self.tokens_at_once):
            await asyncio.sleep(0)
            outputs = tokens[start : start + self.tokens_at_once]
            if start + self.tokens_at_once >= len(tokens) and not self.error and not self.is_hanging:
                stream.finish(FinishReason.LENGTH if is_cut else FinishReason.EOS_TOKEN, outputs)
            else:
                stream.write(outputs)
        if self.error is not None:
            stream.fail(self.error)
        if self.is_hanging:
            await asyncio.Event().wait()
        self._running.pop(stream.sequence_id, None)

    def cancel(self, stream: TokenStream) -> None:
        _, task = self._running.pop(stream.sequence_id, (None, None))
        if task is not None:
            task.cancel()
            self.left.append(stream)

    def num_waiting(self) -> int:
        return 0

    def unfinished_ids(self) -> list[int]:
        return list(self._running)

    def is_healthy(self) -> bool:
        return self.healthy and not self.is_draining

    def is_alive(self) -> bool:
        return self.alive

    def start_drain(self) -> None:
        self.is_draining = True

    def end_all(self) -> None:
        self.is_over = True
        for stream, task in self._running.values():
            task.cancel()
            stream.fail(IncompleteGeneration(": the server is shutting down"))
        self._running.clear()


@dataclasses.dataclass
class Served:
    """A running server and a client that knows its address."""

    context: Context
    engine: FakeEngine
    server: Server
    client: aiohttp.ClientSession
    url: str
    metrics_url: str

    def counts(self) -> dict[str, float]:
        """Samples without labels, and the failures by reason, as the exposition has them."""
        lines = [line for line in self.context.metrics.text().splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


@asynccontextmanager
async def _serving(engine: FakeEngine | None = None, **config: object) -> AsyncIterator[Served]:
    engine = engine or FakeEngine()
    settings = RouterConfig(**({"model_id": "org/model", "graceful_termination_timeout_s": 1.0} | config))
    metrics = Metrics()
    metrics.set_limits(engine.limits.max_input_tokens, engine.limits.max_total_tokens)
    live = LiveHistory(metrics, Scheduler(SchedulerLimits(8, 8), BlockManager(64, 4), frozenset()))
    context = Context(
        *(settings, engine, FakeTokenizer(), FakeChatTemplate(), metrics, FakeGrammars()),
        live=None if settings.disable_ui else live,
        version="4.0.0",
    )
    listeners = bind("127.0.0.1", 0), bind("127.0.0.1", 0)
    url, metrics_url = (f"http://127.0.0.1:{listener.getsockname()[1]}" for listener in listeners)
    server = Server(context, *listeners)
    await server.start()
    try:
        async with aiohttp.ClientSession(url) as client:
            yield Served(context, engine, server, client, url, metrics_url)
    finally:
        await server.stop()


@pytest.fixture
def serving() -> Callable[..., object]:
    """`async with serving(engine, **config) as served`."""
    return _serving


@pytest.fixture
def make_engine() -> type[FakeEngine]:
    """The scripted engine's class."""
    return FakeEngine


@pytest.fixture
def until() -> Callable[..., object]:
    """`await until(condition)`: until `condition()` holds; the test's own time limit ends a wait in vain."""

    async def wait(condition: Callable[[], object]) -> None:
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)

    return wait


@pytest.fixture
def client_of() -> Callable[[Served], openai.AsyncOpenAI]:
    """`async with client_of(served) as client`: the real client of OpenAI's routes."""
    return lambda served: openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="unused", max_retries=0)


@pytest.fixture
def openai_events_of() -> Callable[..., object]:
    """`await openai_events_of(response)`: every event of a stream, decoded; the last must be [DONE]."""

    async def read(response: aiohttp.ClientResponse) -> list[object]:
        assert response.status == 200
        assert response.headers["Content-Type"] == "text/event-stream"
        blocks = (await response.read()).decode().removesuffix("\n\n").split("\n\n")
        assert all(block.startswith("data: ") for block in blocks)
        assert blocks.pop() == "data: [DONE]"
        return [json.loads(block.removeprefix("data: ")) for block in blocks]

    return read


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """Token ids are bytes; 256 ends a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    characters = {byte: character for byte, character in enumerate(bytes_to_characters(alphabet))}
    vocabulary = {character: byte for byte, character in characters.items()}
    backend = BackendTokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<end>"])
    folder = tmp_path_factory.mktemp("tokenizer")
    backend.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"eos_token_id": 256, "vocab_size": 257}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    tokenizer = Tokenizer(folder, 1)
    yield tokenizer
    tokenizer.close()


def bytes_to_characters(alphabet: list[str]) -> list[str]:
    """GPT-2's byte alphabet, in the order of bytes: printable bytes stand for themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(character for character in alphabet if ord(character) >= 256)
    return [chr(byte) if byte in printable else next(others) for byte in range(256)]


class NeverStuck:
    """Progress of shards that always make some."""

    def stuck_rank(self, unanswered) -> None:
        return None


class NoMoreGroups:
    """The supply of an engine whose shards are never lost."""

    async def close(self) -> None:
        pass


@pytest.fixture
def only_group():
    """Makes an engine's supply and its first group out of scripted shards."""

    def make(shards, num_blocks: int) -> tuple[NoMoreGroups, ShardGroup]:
        return NoMoreGroups(), ShardGroup(
            shards, NeverStuck(), ShardInfo("cpu", "float32", 257, 256, 4, 1000, 0), num_blocks
        )

    return make
