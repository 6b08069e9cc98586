"""LauncherConfig: the flags that the launcher alone reads, each declared once with its help text.

The flags of the other processes are declared in their own config modules; cli.py joins all three. A flag that
refusals.py refuses is declared here too, so that it is recognised and answered with a reason.
"""

from dataclasses import dataclass, field
from typing import Any


def flag(default: Any, help_text: str, **metadata: Any) -> Any:
    """Declare a field that is also a flag of the command line (metadata as in the router's config)."""
    return field(default=default, metadata={"help": help_text, **metadata})


@dataclass(frozen=True)
class LauncherConfig:
    """What the user told the launcher about the model, the processes and the logs."""

    model_id: str | None = flag(
        None,
        "Model to serve: a name on the Hugging Face Hub, a local folder or a .gguf file. Default: the embedded "
        "demo model.",
    )
    revision: str | None = flag(None, "Branch, tag or commit of the model on the Hub.")
    sharded: str | None = flag(
        None, "Whether to split the model over several devices. Default: over all of them.", choices=("true", "false")
    )
    num_shard: int | None = flag(None, "Number of shards. Default: one per visible GPU; on a CPU one.", positive=True)
    max_input_length: int | None = flag(None, "Older name of --max-input-tokens.", positive=True)
    disable_custom_kernels: bool = flag(
        False, "Compute with PyTorch's own operations only, which is what this version does in any case."
    )
    shard_uds_path: str | None = flag(
        None, "Path of the shards' Unix sockets; rank R listens on PATH-R. Default: in a private folder."
    )
    master_addr: str = flag("localhost", "Address at which the shards meet.")
    master_port: int | None = flag(None, "Port at which the shards meet. Default: a free one.", max=65535)
    huggingface_hub_cache: str | None = flag(None, "Folder of the Hugging Face Hub cache.")
    tokenizer_config_path: str | None = flag(
        None, "File to use in place of the model's tokenizer_config.json, for example for its chat template."
    )
    json_output: bool = flag(False, "Log one JSON object per line.")
    env: bool = flag(False, "Print versions and platform, then go on.", short="e", env=None)
    usage_stats: str = flag(
        "on",
        "Accepted for compatibility. Nothing is ever sent anywhere, whatever the value.",
        choices=("on", "off", "no-stack"),
    )
    graceful_termination_timeout: int = flag(
        90, "Seconds that running requests may take to finish after SIGTERM.", short="g"
    )
    max_shard_restarts: int = flag(
        3,
        "How often, within any 10 minutes, the shards are restarted when one dies or is stuck; requests go on after "
        "that. Once more ends the server. 0: the first time does.",
    )
    quantize: str | None = flag(None, "Quantise the weights.")
    speculate: int | None = flag(None, "Tokens to guess ahead per step.")
    kv_cache_dtype: str | None = flag(None, "Type of the KV memory.")
    trust_remote_code: bool = flag(False, "Run code from the model's repository.")
    weights_cache_override: str | None = flag(None, "Folder to take weights from.")
    rope_scaling: str | None = flag(None, "Kind of rotary scaling to use instead of the model's own.")
    rope_factor: float | None = flag(None, "Factor of --rope-scaling.")
    ngrok: bool = flag(False, "Open a tunnel through ngrok.")
    ngrok_authtoken: str | None = flag(None, "Token for ngrok.")
    ngrok_edge: str | None = flag(None, "Edge of ngrok.")
    lora_adapters: str | None = flag(None, "LoRA adapters to load.")
