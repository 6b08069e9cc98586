"""KV memory: its size by the machine's limits, and the tensors."""

from pathlib import Path

import pytest
import torch
from text_generation_shard.kv_cache import KvLayout, allocate_kv_caches, cpu_kv_bytes, memory_limit_bytes

GIB = 2**30


def machine(root: Path, files: dict[str, str], total_gib: int = 64, available_gib: int = 60) -> Path:
    meminfo = f"MemTotal: {total_gib * 2**20} kB\nMemFree: 1 kB\nMemAvailable: {available_gib * 2**20} kB\n"
    for name, text in {"proc/meminfo": meminfo, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({}, 64 * GIB),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": f"{8 * GIB}\n"}, 8 * GIB),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "max\n"}, 64 * GIB),
        # The host's path of a container whose own group is mounted as the top one.
        ({"proc/self/cgroup": "0::/kubepods/pod1\n", "sys/fs/cgroup/memory.max": f"{8 * GIB}\n"}, 8 * GIB),
        # The parent's limit counts as well.
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/memory.max": f"{4 * GIB}\n",
                "sys/fs/cgroup/a/b/memory.max": f"{6 * GIB}\n",
            },
            4 * GIB,
        ),
        (
            {
                "proc/self/cgroup": "5:cpu,cpuacct:/c\n4:memory:/c\n0::/\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
                "sys/fs/cgroup/memory/c/memory.limit_in_bytes": f"{3 * GIB}\n",
            },
            3 * GIB,
        ),
    ],
    ids=["none", "v2", "v2-unlimited", "v2-container", "v2-parent", "v1"],
)
def test_the_smallest_limit_counts(files: dict[str, str], limit: int, tmp_path: Path) -> None:
    assert memory_limit_bytes(machine(tmp_path, files)) == limit


def test_this_machine_has_a_limit() -> None:
    assert 2**26 < memory_limit_bytes() < 2**50


@pytest.mark.parametrize(
    ("total_gib", "available_gib", "world_size", "expected"),
    [(64, 60, 1, 4 * GIB), (64, 60, 2, 2 * GIB), (8, 7, 1, 2 * GIB), (64, 2, 1, GIB)],
    ids=["most", "two ranks", "a quarter of all", "half of what is free"],
)
def test_default_budget(total_gib: int, available_gib: int, world_size: int, expected: int, tmp_path: Path) -> None:
    root = machine(tmp_path, {}, total_gib, available_gib)
    assert cpu_kv_bytes(0, world_size, root) == expected
    assert cpu_kv_bytes(12345, world_size, root) == 12345


@pytest.mark.parametrize("is_joined", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layout_and_tensors_agree(dtype: torch.dtype, is_joined: bool) -> None:
    layout = KvLayout(num_layers=3, num_kv_heads=2, head_dim=5, dtype=dtype, is_joined=is_joined)
    caches = allocate_kv_caches(layout, 7, torch.device("cpu"))
    tensors = [tensor for layer in caches for tensor in layer]
    assert sum(tensor.nbytes for tensor in tensors) == 7 * layout.bytes_per_block == 7 * 16 * layout.bytes_per_token
    for index, tensor in enumerate(tensors):
        assert tensor.shape == ((7, 16, 2 * 2, 5) if is_joined else (7, 2, 16, 5))
        assert tensor.dtype == dtype
        assert not tensor.any()  # nothing before wrote into it: no two share memory
        tensor.fill_(index + 1)
    assert [int(tensor[0, 0, 0, 0]) for tensor in tensors] == ([1, 2, 3] if is_joined else [1, 2, 3, 4, 5, 6])
