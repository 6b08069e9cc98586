"""ShardConfig: everything one rank can be told, each field declared once with its help text."""

from dataclasses import dataclass, field
from typing import Any


def flag(default: Any, help_text: str, **metadata: Any) -> Any:
    """Declare a field that is also a flag of the command line (metadata as in the router's config)."""
    return field(default=default, metadata={"help": help_text, **metadata})


# Small batches are decided by reading the weights, so that a few padded rows cost nothing. Between the larger sizes
# padding costs less than the products of odd ones: on an H100 those of 448 rows took 14.2 ms, of 512 rows 10.9 ms (8B
# shape). The largest are of prompts: launched one by one, their kernels kept an H100's host busy for 12 ms.
DEFAULT_GRAPH_SIZES = (
    1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 512, 640, 768, 896, 1024, 1152, 1280, 1536,
    1792, 2048,
)  # fmt: skip


def graph_sizes(cuda_graphs: str | None) -> tuple[int, ...]:
    """The sizes that --cuda-graphs names; none given: the default, 0: none. Raises ValueError with the reason."""
    if cuda_graphs is None:
        return DEFAULT_GRAPH_SIZES
    if not all(part.strip().isdecimal() for part in cuda_graphs.split(",")):
        raise ValueError(f"--cuda-graphs {cuda_graphs}: whole numbers with commas between them are asked for")
    sizes = tuple(int(part) for part in cuda_graphs.split(","))
    if 0 in sizes and len(sizes) > 1:
        raise ValueError(f"--cuda-graphs {cuda_graphs}: 0 stands alone, for no graphs")
    return () if sizes == (0,) else sizes


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
    cuda_graphs: str | None = flag(
        None,
        "Comma-separated numbers of sequences or tokens whose steps are recorded as CUDA graphs; 0 turns graphs off. "
        "Default: 26 sizes from 1 to 2048.",
    )
    cuda_memory_fraction: float = flag(1.0, "Share of each GPU's memory that may be used, above 0 and up to 1.")
    load_format: str = flag(
        "auto",
        "Where weights come from: auto reads the model's files, dummy makes random ones, for benchmarks.",
        choices=("auto", "dummy"),
    )
    watermark_gamma: float | None = flag(
        None,
        "Watermark (`watermark: true` of a request): share of the vocabulary that it favours, above 0 and below 1. "
        "Default: 0.5.",
    )
    watermark_delta: float | None = flag(None, "Watermark: what is added to the logits of favoured tokens. Default: 2.")
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
    # Of rank 0 alone: the socket that listens at master_port, inherited. None: it listens by itself.
    master_listen_fd: int | None = internal(None)
    # cpu or cuda. None: a GPU where torch finds one.
    device: str | None = internal(None)
    # CPU threads of this rank; 0: as torch decides.
    num_threads: int = internal(0)
    # KV memory of this rank on a CPU, bytes.
    cpu_kv_bytes: int = internal(0)
    json_output: bool = internal(False)
    log_level: str = internal("info")
