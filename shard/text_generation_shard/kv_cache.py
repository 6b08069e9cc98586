"""KV memory: what a block costs, how many blocks fit this rank, and the tensors themselves."""

import logging
import mmap
from dataclasses import dataclass
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

BLOCK_SIZE = 16

# On a CPU the KV cache shares memory with everything else on the machine: by default it takes at most this much,
# and at most a quarter of what the container may use or half of what is free.
DEFAULT_CPU_KV_BYTES = 4 * 2**30

# What a size of graphs takes, all kinds of it together (8B shape, H100); and what is left for the allocator's gaps.
CUDA_GRAPH_SIZE_BYTES = 32 * 2**20
CUDA_SPARE_BYTES = 768 * 2**20

# Of each layer keys and values, both [num_blocks, num_kv_heads, block_size, head_dim]; or joined in one tensor,
# [num_blocks, block_size, 2 * num_kv_heads, head_dim], of each token its keys, then its values.
KvCaches = list[tuple[torch.Tensor, ...]]


@dataclass(frozen=True)
class KvLayout:
    """Shape of this rank's KV memory."""

    num_layers: int
    num_kv_heads: int  # of this rank
    head_dim: int
    dtype: torch.dtype
    block_size: int = BLOCK_SIZE
    is_joined: bool = False  # a layer's keys and values are one tensor, as attention on a CPU takes them

    @property
    def bytes_per_token(self) -> int:
        """KV memory of one token on this rank."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype.itemsize

    @property
    def bytes_per_block(self) -> int:
        """KV memory of one block on this rank."""
        return self.bytes_per_token * self.block_size


def allocate_kv_caches(layout: KvLayout, num_blocks: int, device: torch.device) -> KvCaches:
    """Zeroed: attention multiplies what was never written by zero."""
    shape = (num_blocks, layout.num_kv_heads, layout.block_size, layout.head_dim)
    if layout.is_joined:
        shape = (num_blocks, layout.block_size, 2 * layout.num_kv_heads, layout.head_dim)

    def allocate() -> torch.Tensor:
        if device.type == "cpu":
            return _allocate_on_touch(shape, layout.dtype)
        return torch.zeros(shape, dtype=layout.dtype, device=device)

    num_tensors = 1 if layout.is_joined else 2
    return [tuple(allocate() for _ in range(num_tensors)) for _ in range(layout.num_layers)]


def _allocate_on_touch(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Zeroed memory that the kernel hands out page by page as it is first written.

    Filling 4 GiB with zeros would take longer than all the rest of start-up.
    """
    num_elements = 1
    for length in shape:
        num_elements *= length
    memory = mmap.mmap(-1, num_elements * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=dtype, count=num_elements).view(shape)


def cpu_kv_bytes(configured_bytes: int, world_size: int, root: Path = Path("/")) -> int:
    """Bytes of KV memory for one of `world_size` ranks on this machine's CPU; `configured_bytes` is a rank's."""
    if configured_bytes > 0:
        return configured_bytes
    free_bytes = _meminfo_bytes("MemAvailable", root)
    budget = min(memory_limit_bytes(root) // 4, free_bytes // 2, DEFAULT_CPU_KV_BYTES)
    return budget // world_size


def cuda_kv_bytes(memory_fraction: float, num_graph_sizes: int, device: torch.device) -> int:
    """Bytes of KV memory on a GPU: what is free of `memory_fraction` of it, after the worst-case pass."""
    torch.cuda.synchronize(device)
    peak_bytes = torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device)
    # What steps take and give back lies in the allocator's cache; KV memory comes from what the driver has left.
    torch.cuda.empty_cache()
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    reserved_bytes = total_bytes - int(total_bytes * memory_fraction)
    graph_bytes = num_graph_sizes * CUDA_GRAPH_SIZE_BYTES
    ledger = {
        "weights and buffers": torch.cuda.memory_allocated(device),
        "driver and libraries": total_bytes - free_bytes - torch.cuda.memory_reserved(device),
        "largest step": peak_bytes,
        "graphs": graph_bytes,
        "kept free": CUDA_SPARE_BYTES + reserved_bytes,
    }
    kv_bytes = max(0, free_bytes - reserved_bytes - peak_bytes - graph_bytes - CUDA_SPARE_BYTES)
    ledger["keys and values"] = kv_bytes
    logger.info("GPU memory: %s", ", ".join(f"{name} {size / 2**30:.2f} GiB" for name, size in ledger.items()))
    return kv_bytes


def memory_limit_bytes(root: Path = Path("/")) -> int:
    """Memory this process may use: the smallest limit of its control groups (v2 or v1), or the machine's."""
    limits = [_meminfo_bytes("MemTotal", root)]
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, group = line.split(":", 2)
        if not controllers:
            folder, name = root / "sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            folder, name = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        # A container often sees its own group mounted as the top one.
        parts = Path(group.lstrip("/")).parts
        for depth in range(len(parts) + 1):
            for text in _lines(folder.joinpath(*parts[:depth], name)):
                if text.isdecimal():
                    limits.append(int(text))
    return min(limits)


def _meminfo_bytes(name: str, root: Path = Path("/")) -> int:
    for line in _lines(root / "proc/meminfo"):
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0]) * 1024
    raise RuntimeError(f"/proc/meminfo does not tell {name}")


def _lines(path: Path) -> list[str]:
    """A small system file's lines; none if it is not there."""
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
