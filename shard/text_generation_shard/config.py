"""ShardConfig: everything one rank can be told, each field declared once with its help text."""

from dataclasses import dataclass, field
from typing import Any


def flag(default: Any, help_text: str, **metadata: Any) -> Any:
    """Declare a field that is also a flag of the command line (metadata as in the router's config)."""
    return field(default=default, metadata={"help": help_text, **metadata})


def internal(default: Any) -> Any:
    """Declare a field that the launcher works out and a user never sets."""
    return field(default=default, metadata={"internal": True})


@dataclass(frozen=True)
class ShardConfig:
    """What one shard process is told at start."""

    dtype: str | None = flag(
        None,
        "Type of weights, activations and KV memory. Default: the checkpoint's own on a GPU; on a CPU bfloat16 "
        "where the processor computes in it, else float32.",
        choices=("float32", "float16", "bfloat16"),
    )
    # Folder with config.json (a GGUF file's is written there by model_files.py).
    model_folder: str = internal("")
    # Weight files: *.safetensors, or one *.gguf.
    weight_files: tuple[str, ...] = internal(())
    uds_path: str = internal("")
    run_folder: str = internal("")
    rank: int = internal(0)
    world_size: int = internal(1)
    master_addr: str = internal("localhost")
    master_port: int = internal(29500)
    # CPU threads of this rank; 0: as torch decides.
    num_threads: int = internal(0)
    # KV memory of this rank on a CPU, bytes.
    cpu_kv_bytes: int = internal(0)
    json_output: bool = internal(False)
    log_level: str = internal("info")
