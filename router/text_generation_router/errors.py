"""Every error a client can be sent, with its HTTP status and TGI's `error_type`.

RouterError
├── ValidationError                 422  validation
│   ├── MalformedRequest            400
│   ├── MalformedBody               400
│   ├── RequestTimeout              408
│   ├── PayloadTooLarge             413
│   └── UnsupportedContentEncoding  415
├── BatchSizeExceeded               422  batch size exceeded
├── TemplateError                   422  template_error
├── ToolError                       422  tool_error
├── Overloaded                      429  overloaded
│   ├── QueueFull
│   ├── QueueTimeExceeded
│   ├── GrammarsOverloaded
│   └── BodiesOverloaded
├── ShuttingDown                    503  overloaded
├── GenerationError                 424  generation
├── IncompleteGeneration            500  incomplete_generation
├── IncompleteGenerationStream      500  incomplete_generation_stream
├── DeadlineExceeded                504  deadline_exceeded
├── InternalError                   500  internal_error
├── NotOffered                      501  not_implemented
└── Unhealthy                       503  healthcheck
"""

# Why a request is refused. Keys and broken HTTP are refused before there is an error of ours.
REJECTIONS = (
    "concurrent_requests",
    "queued_tokens",
    "queue_time",
    "grammars",
    "draining",
    "unhealthy",
    "validation",
    "template",
    "malformed",
    "payload",
    "header_time",
    "body_time",
    "body_memory",
    "http",
    "api_key",
)


class RouterError(Exception):
    """A request that ends without an answer: `status` and `error_type` are the class's, the text is the reason's.

    `param` names the field of the body that is at fault, where there is one. `failure_label` is the value of
    `tgi_request_failure`'s label `err`, `rejection` that of `tgi_request_rejected`'s label `reason`: one of REJECTIONS,
    or "" where the error ends a request that was accepted.
    """

    status: int
    error_type: str
    failure_label: str
    rejection: str = ""
    prefix: str = ""
    ends_connection: bool = False  # whether the rest of the client's bytes cannot be understood

    def __init__(self, reason: str = "", param: str | None = None) -> None:
        super().__init__(f"{self.prefix}{reason}")
        self.param = param


class ValidationError(RouterError):
    """A request that asks for something this server or model does not do."""

    status, error_type, failure_label = 422, "validation", "validation"
    prefix = "Input validation error: "
    rejection = "validation"


class MalformedRequest(ValidationError):
    """Bytes that are not HTTP, or a body that breaks its own framing; nothing after them can be read."""

    status = 400
    ends_connection = True
    rejection = "malformed"


class MalformedBody(ValidationError):
    """A body that is not JSON."""

    status = 400
    rejection = "malformed"


class RequestTimeout(ValidationError):
    """A body that does not come to its end in time."""

    status = 408
    ends_connection = True
    rejection = "body_time"


class PayloadTooLarge(ValidationError):
    """A body longer than `--payload-limit`."""

    status = 413
    rejection = "payload"


class UnsupportedContentEncoding(ValidationError):
    """A compressed body."""

    status = 415


class BatchSizeExceeded(RouterError):
    """More prompts in one request than `--max-client-batch-size`; `error_type` is TGI's."""

    status, error_type, failure_label = 422, "batch size exceeded", "validation"
    rejection = "validation"


class TemplateError(RouterError):
    """The chat template is missing or refuses the messages."""

    status, error_type, failure_label = 422, "template_error", "template"
    prefix = "Template error: "
    rejection = "template"


class ToolError(RouterError):
    """Tools that cannot be used as asked."""

    status, error_type, failure_label = 422, "tool_error", "validation"
    prefix = "Tool error: "
    rejection = "validation"


class Overloaded(RouterError):
    """More requests than `--max-concurrent-requests`."""

    status, error_type, failure_label = 429, "overloaded", "overloaded"
    prefix = "Model is overloaded"
    rejection = "concurrent_requests"


class QueueFull(Overloaded):
    """More prompt tokens wait than `--max-queued-tokens`."""

    rejection = "queued_tokens"


class QueueTimeExceeded(Overloaded):
    """A request waited longer than `--queue-timeout` for its first step."""

    prefix = "Model is overloaded: the request waited longer than "
    rejection = "queue_time"


class GrammarsOverloaded(Overloaded):
    """More grammars wait to be compiled than is bearable, or the process that tries them does not start."""

    rejection = "grammars"


class BodiesOverloaded(Overloaded):
    """The request bodies that are being read take all the memory that they may."""

    rejection = "body_memory"


class ShuttingDown(RouterError):
    """The server is draining and takes no new requests."""

    status, error_type, failure_label = 503, "overloaded", "overloaded"
    prefix = "Model is overloaded: the server is shutting down"
    rejection = "draining"


class GenerationError(RouterError):
    """A shard could not compute this request."""

    status, error_type, failure_label = 424, "generation", "generation"
    prefix = "Request failed during generation: "


class IncompleteGeneration(RouterError):
    """Generation ended before the request was done."""

    status, error_type, failure_label = 500, "incomplete_generation", "incomplete"
    prefix = "Incomplete generation"


class IncompleteGenerationStream(RouterError):
    """A stream ended before the request was done."""

    status, error_type, failure_label = 500, "incomplete_generation_stream", "incomplete"
    prefix = "Incomplete generation"


class DeadlineExceeded(RouterError):
    """A request took longer than `--request-timeout`."""

    status, error_type, failure_label = 504, "deadline_exceeded", "incomplete"
    prefix = "Incomplete generation: the request took longer than "


class InternalError(RouterError):
    """A bug of ours; the log has the details, the client none."""

    status, error_type, failure_label = 500, "internal_error", "generation"
    prefix = "Internal error"


class NotOffered(RouterError):
    """A route that other servers have and this one has not."""

    status, error_type, failure_label = 501, "not_implemented", "validation"


class Unhealthy(RouterError):
    """A shard is gone or makes no progress."""

    status, error_type, failure_label = 503, "healthcheck", "generation"
    prefix = "unhealthy"
    rejection = "unhealthy"
