"""Counting devices and choosing the number of shards."""

from pathlib import Path

import pytest
from text_generation_launcher.config import LauncherConfig
from text_generation_launcher.errors import SettingsError
from text_generation_launcher.gpus import choose_num_shards, count_gpus, num_cores, visible_gpus


@pytest.mark.parametrize(
    ("environment", "num_present", "names"),
    [
        ({}, 2, ["0", "1"]),
        ({}, 0, []),
        ({"CUDA_VISIBLE_DEVICES": "3,1"}, 4, ["3", "1"]),
        ({"CUDA_VISIBLE_DEVICES": ""}, 4, []),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, 4, []),
        ({"CUDA_VISIBLE_DEVICES": "0", "NVIDIA_VISIBLE_DEVICES": "all"}, 4, ["0"]),
        ({"NVIDIA_VISIBLE_DEVICES": "all"}, 3, ["0", "1", "2"]),
        ({"NVIDIA_VISIBLE_DEVICES": "all"}, 0, []),
        ({"NVIDIA_VISIBLE_DEVICES": "void"}, 1, []),
        ({"NVIDIA_VISIBLE_DEVICES": "GPU-8a1,GPU-9b2"}, 2, ["GPU-8a1", "GPU-9b2"]),
    ],
)
def test_visible_gpus(environment: dict[str, str], num_present: int, names: list[str]) -> None:
    assert visible_gpus(environment, num_present) == names


def test_device_files_are_counted(tmp_path: Path) -> None:
    for name in ("nvidia0", "nvidia1", "nvidia11", "nvidiactl", "nvidia-uvm", "null"):
        (tmp_path / name).touch()
    assert count_gpus(tmp_path) == 3


@pytest.mark.parametrize(
    ("output", "count"), [("GPU 0: A (UUID: x)\nGPU 1: B (UUID: y)", 2), ("No devices were found", 0)]
)
def test_nvidia_smi_is_asked_without_device_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str, count: int
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{output}\nEND\n")
    program.chmod(0o700)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    (tmp_path / "dev").mkdir()
    assert count_gpus(tmp_path / "dev") == count


@pytest.mark.parametrize(
    ("sharded", "num_shard", "num_gpus", "shards"),
    [
        (None, None, 0, 1),
        (None, None, 1, 1),
        (None, None, 4, 4),
        (None, 2, 4, 2),
        (None, 3, 0, 3),
        ("true", None, 4, 4),
        ("true", 2, 4, 2),
        ("true", 2, 0, 2),
        ("false", None, 4, 1),
        ("false", 2, 4, 2),
    ],
)
def test_number_of_shards(sharded: str | None, num_shard: int | None, num_gpus: int, shards: int) -> None:
    assert choose_num_shards(LauncherConfig(sharded=sharded, num_shard=num_shard), num_gpus) == shards


@pytest.mark.parametrize(
    ("sharded", "num_shard", "num_gpus"), [("true", None, 1), ("true", None, 0), ("true", 1, 4), (None, 5, 4)]
)
def test_numbers_of_shards_that_are_refused(sharded: str | None, num_shard: int | None, num_gpus: int) -> None:
    with pytest.raises(SettingsError):
        choose_num_shards(LauncherConfig(sharded=sharded, num_shard=num_shard), num_gpus)


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"cpu.max": "150000 100000\n"}, 1),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),
    ],
)
def test_cores_respect_the_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], quota: int | None
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(6)))
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert num_cores(tmp_path) == (quota or 6)
