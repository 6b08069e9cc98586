"""RouterConfig: everything the router can be told, each field declared once with its help text."""

from dataclasses import dataclass, field
from typing import Any


def flag(default: Any, help_text: str, **metadata: Any) -> Any:
    """Declare a field that is also a flag of the command line.

    `metadata` may hold `env` (environment variable, by default the flag in capitals), `choices`, `short`
    (a one-letter flag) and `positive` (the value must be at least 1).
    """
    return field(default=default, metadata={"help": help_text, **metadata})


def internal(default: Any) -> Any:
    """Declare a field that the launcher works out and a user never sets."""
    return field(default=default, metadata={"internal": True})


@dataclass(frozen=True)
class RouterConfig:
    """What one router process is told at start; None means: derived from the model or measured."""

    max_concurrent_requests: int = flag(128, "Requests served or queued at once; the next gets 429.", positive=True)
    max_best_of: int = flag(2, "Largest `best_of` a client may ask for.", positive=True)
    max_stop_sequences: int = flag(4, "Most stop strings in one request.")
    max_top_n_tokens: int = flag(5, "Largest `top_n_tokens` a client may ask for.", max=256)
    max_input_tokens: int | None = flag(None, "Longest prompt in tokens. Default: max-total-tokens - 1.", positive=True)
    max_total_tokens: int | None = flag(
        None,
        "Longest sequence, prompt and generated tokens together. Default: what model and memory allow.",
        positive=True,
    )
    waiting_served_ratio: float = flag(
        0.3, "Without effect here: prefill and decode share every step. Accepted for compatibility."
    )
    max_batch_prefill_tokens: int | None = flag(
        None,
        "Token budget of one step; longer prompts are computed in chunks of it. Default: by GPU and model, 256 to "
        "2048; 256 on a CPU.",
        positive=True,
    )
    max_batch_total_tokens: int | None = flag(
        None, "Limit on KV memory, in tokens. Default: as many as the memory holds.", positive=True
    )
    max_waiting_tokens: int = flag(
        20, "Without effect here: waiting requests join at every step. Accepted for compatibility."
    )
    max_batch_size: int | None = flag(None, "Most sequences in one batch.", positive=True)
    max_client_batch_size: int = flag(
        4, "Most prompts in one completions request, and instances in one request to /vertex.", positive=True
    )
    max_queued_tokens: int | None = flag(
        None,
        "Prompt tokens that may wait for their first step; a request beyond them gets 429. Default: four times the KV "
        "memory.",
        positive=True,
    )
    queue_timeout: float | None = flag(
        None,
        "Seconds from when a request's body is read until its first step; then it gets 429. Default: no limit.",
    )
    request_timeout: float | None = flag(
        None, "Seconds from a request's arrival to its last token; then it ends with 504. Default: no limit."
    )
    hostname: str = flag("0.0.0.0", "IP address to listen on.")
    port: int = flag(3000, "Port to listen on; 0 picks a free one and prints it.", short="p")
    prometheus_port: int = flag(9000, "Port that serves /metrics alone; 0 picks a free one and prints it.")
    validation_workers: int = flag(2, "Threads that tokenise prompts.", positive=True)
    payload_limit: int = flag(2_000_000, "Largest request body in bytes.", positive=True)
    cors_allow_origin: tuple[str, ...] = flag((), "Origin allowed by CORS; repeat for several. Default: any.")
    api_key: str | None = flag(None, "Clients must send it as `Authorization: Bearer KEY`.")
    api_keys_file: str | None = flag(
        None,
        "File of API keys, one a line: NAME:DIGEST, the SHA-256 digest of the key in hexadecimal, or NAME:key:KEY. "
        "Names are tenants: they are logged, and tenants share no cached prompts.",
    )
    log_prompts: bool = flag(
        False, "Log the text of each prompt, its first 10 000 characters. Default: no client text."
    )
    served_model_name: str | None = flag(None, "Name under which /v1/models and answers show the model.")
    disable_grammar_support: bool = flag(False, "Refuse requests that carry a grammar.")
    enable_prefill_logprobs: bool = flag(
        False, "Fill `prefill` of requests with `decoder_input_details`; their prompts take no prefix hits."
    )
    prefix_caching: bool = flag(True, "Share KV blocks between requests with equal prefixes.")
    disable_ui: bool = flag(False, "Leave out the live page at /ui.")
    otlp_endpoint: str | None = flag(
        None, "Collector that traces are sent to, by OTLP over gRPC: http://HOST:PORT. Default: no traces."
    )
    otlp_service_name: str = flag("text-generation-inference.router", "Name of this service in traces.")
    model_id: str = internal("")
    model_sha: str | None = internal(None)
    revision: str | None = internal(None)
    # Shown by /info; None there means null.
    model_pipeline_tag: str | None = internal(None)
    docker_label: str | None = internal(None)
    build_sha: str | None = internal(None)
    # The header x-compute-type. Default: number and name of the devices.
    compute_type: str | None = internal(None)
    # Folder with config.json, tokenizer.json and, where the model has them, tokenizer_config.json,
    # generation_config.json, chat_template.json, chat_template.jinja.
    tokenizer_folder: str = internal("")
    shard_uds_path: str = internal("")
    world_size: int = internal(1)
    # Folder that holds each rank's progress file, `progress-<rank>`.
    run_folder: str = internal("")
    # Inherited socket on which the launcher hears of lost shards and tells of new ones. None: nobody starts new ones.
    launcher_fd: int | None = internal(None)
    # How long running requests may take to finish after SIGTERM, seconds.
    graceful_termination_timeout_s: float = internal(90.0)
    json_output: bool = internal(False)
    log_level: str = internal("info")
