"""What every handler needs of the server, and what it asks of the engine."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, Protocol

from aiohttp import web

from text_generation_router.api.body_memory import BodyMemory
from text_generation_router.api.open_requests import OpenRequests
from text_generation_router.api.permits import Permits
from text_generation_router.api.turns import Turns
from text_generation_router.config import RouterConfig
from text_generation_router.conversation import Conversation
from text_generation_router.live import LiveHistory
from text_generation_router.metrics import Metrics
from text_generation_router.model_family import ModelFamily
from text_generation_router.token_stream import Timings, TokenStream
from text_generation_router.tokenizer import TokenSpan
from text_generation_router.valid_request import ValidRequest
from text_generation_router.validation import GrammarCompiler, Limits, PromptEncoder, Validator

if TYPE_CHECKING:  # OpenTelemetry is loaded only where traces are on
    from text_generation_router.tracing import Tracing


class Engine(Protocol):
    """What handlers ask of the engine."""

    @property
    def limits(self) -> Limits:
        """Known after warm-up."""

    def submit(self, request: ValidRequest, timings: Timings, is_further: bool = False) -> TokenStream:
        """Queue a request; raises ShuttingDown after `end_all`, and QueueFull."""

    def cancel(self, stream: TokenStream) -> None:
        """Forget a request; without effect once it has ended."""

    def num_waiting(self) -> int:
        """Sequences that wait for their turn."""

    def unfinished_ids(self) -> list[int]:
        """The `sequence_id` of each stream whose sequence has not ended."""

    def is_healthy(self) -> bool:
        """Whether the shards make progress."""

    def is_alive(self) -> bool:
        """Whether what is accepted will be served."""

    def start_drain(self) -> None:
        """Be unhealthy from now on; admitted requests are still served."""

    def end_all(self) -> None:
        """End what still runs with an error, and refuse whatever comes."""


class Tokenizer(PromptEncoder, Protocol):
    """What handlers need of the tokenizer beside encoding."""

    def token_text(self, token_id: int) -> str:
        """A token's own text, special tokens included."""

    def is_special(self, token_id: int) -> bool:
        """Whether a token is left out of visible text."""

    def pieces(self, token_ids: list[int]) -> Iterator[str]:
        """The visible text that each of these tokens completes."""

    def as_plain_text(self, value: Any) -> Any:
        """What a client wrote, such that no special token in it is encoded as one."""

    def token_bytes(self, token_id: int) -> bytes:
        """A token's own bytes, which need not be whole characters."""

    def visible_text(self, text: str) -> str:
        """A text of plain parts, as a client may see it."""

    def special_ids(self, texts: Iterable[str]) -> list[int]:
        """Ids of those special tokens whose own text is one of these."""

    def spans_now(self, text: str, add_special_tokens: bool = True) -> Iterable[TokenSpan]:
        """The tokens of a text, with the parts of it that they stand for; in the calling thread."""


class ChatTemplate(Protocol):
    """Conversation to prompt."""

    @property
    def family(self) -> ModelFamily:
        """How the model writes reasoning and tool calls."""

    async def render(self, conversation: Conversation) -> str:
        """The prompt; raises TemplateError, and ValidationError for what the template cannot show."""

    def render_now(self, conversation: Conversation) -> str:
        """`render` in the calling thread."""


def package_version() -> str:
    """Version of the installed distribution."""
    try:
        return version("text-generation")
    except PackageNotFoundError:
        return "unknown"


@dataclass
class Context:
    """The parts of one server, as handlers see them."""

    config: RouterConfig
    engine: Engine
    tokenizer: Tokenizer
    chat_template: ChatTemplate
    metrics: Metrics
    grammars: GrammarCompiler | None = None  # None where no grammar can be followed
    tracing: "Tracing | None" = None
    live: LiveHistory | None = None  # None where the live page is left out
    version: str = field(default_factory=package_version)
    validator: Validator = field(init=False)
    permits: Permits = field(init=False)
    # Of /tokenize and /chat_tokenize, which work in a thread of their own: they take nothing from generation.
    tokenize_permits: Permits = field(init=False)
    tokenize_thread: ThreadPoolExecutor = field(default_factory=partial(ThreadPoolExecutor, 1, "tokenize"))
    bodies: BodyMemory = field(init=False)
    open_requests: OpenRequests = field(init=False)
    turns: Turns = field(default_factory=Turns)

    def __post_init__(self) -> None:
        self.validator = Validator(self.config, self.engine.limits, self.tokenizer, self.grammars)
        self.permits = Permits(self.config.max_concurrent_requests)
        self.tokenize_permits = Permits(self.config.max_concurrent_requests)
        self.bodies = BodyMemory(self.config.payload_limit)
        self.open_requests = OpenRequests(self.metrics, self.engine.unfinished_ids)
        self.metrics.processes.set_build(self.version, self.config.build_sha or "", self.config.docker_label or "")

    @property
    def served_name(self) -> str:
        """The model's name in answers."""
        return self.config.served_model_name or self.config.model_id

    @property
    def compute_type(self) -> str:
        """What computes, for the header x-compute-type: number and name of the devices."""
        device = self.engine.limits.device_name.lower().replace(" ", "-")
        return self.config.compute_type or f"{self.config.world_size}-{device}"

    @property
    def system_fingerprint(self) -> str:
        """Version and label, as TGI writes them."""
        return f"{self.version}-{self.config.docker_label or 'native'}"


CONTEXT_KEY = web.AppKey("context", Context)
# The OpenAPI document.
DOCUMENT_KEY: web.AppKey[dict[str, Any]] = web.AppKey("document")
# Names of the request's fields that have no effect, for the header x-ignored-parameters.
IGNORED_KEY = web.RequestKey("ignored_parameters", str)
# Where the request stands in its trace, for the header traceresponse.
TRACE_KEY = web.RequestKey("trace", str)
# The request's id of ours; the id that its client sent, where that is fit to be shown; whose key it carries ("": none
# or the one of `--api-key`).
REQUEST_ID_KEY = web.RequestKey("request_id", str)
CLIENT_REQUEST_ID_KEY = web.RequestKey("client_request_id", str)
TENANT_KEY = web.RequestKey("tenant", str)
