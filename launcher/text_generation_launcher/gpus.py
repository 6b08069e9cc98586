"""Which devices there are, how many shards to start, how many processor cores each may use. No torch."""

import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

from text_generation_launcher.config import LauncherConfig
from text_generation_launcher.errors import SettingsError

_NO_DEVICES = ("", "-1", "none", "void", "NoDevFiles")


def visible_gpus(environment: Mapping[str, str], num_present: int) -> list[str]:
    """Names of the GPUs this server may use, as CUDA_VISIBLE_DEVICES would name them.

    A variable that is set on a machine without GPUs (images set NVIDIA_VISIBLE_DEVICES=all) names nothing.
    """
    if num_present == 0:
        return []
    every = [str(index) for index in range(num_present)]
    for variable in ("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES"):
        value = environment.get(variable)
        if value is None:
            continue
        value = value.strip()
        if value == "all":
            return every
        return [] if value in _NO_DEVICES else [name.strip() for name in value.split(",") if name.strip()]
    return every


def count_gpus(device_folder: Path = Path("/dev")) -> int:
    """Number of NVIDIA GPUs on this machine: its device files, else what nvidia-smi lists."""
    try:
        num_files = sum(1 for entry in device_folder.iterdir() if re.fullmatch(r"nvidia\d+", entry.name))
    except OSError:
        num_files = 0
    return num_files or _count_by_nvidia_smi()


def _count_by_nvidia_smi() -> int:
    try:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines()) if listed.returncode == 0 else 0


def choose_num_shards(config: LauncherConfig, num_gpus: int) -> int:
    """How many shards to start."""
    if config.num_shard is not None:
        if config.sharded == "true" and config.num_shard <= 1:
            raise SettingsError("--sharded true needs --num-shard of at least 2.")
        if num_gpus and config.num_shard > num_gpus:
            raise SettingsError(f"--num-shard {config.num_shard} is more than the {num_gpus} visible GPUs.")
        return config.num_shard
    if config.sharded == "false":
        return 1
    if config.sharded == "true" and num_gpus <= 1:
        raise SettingsError(
            f"--sharded true found {num_gpus} GPUs and needs at least 2; on a CPU, give --num-shard as well."
        )
    return max(1, num_gpus)


def num_cores(cgroup_folder: Path = Path("/sys/fs/cgroup")) -> int:
    """Processor cores this process may use: its affinity, cut to the container's limit."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _core_quota(cgroup_folder)
    return available if quota is None else max(1, min(available, int(quota)))


def _core_quota(cgroup_folder: Path) -> float | None:
    """Cores allowed by the control group, version 2 or 1; None without a limit."""
    try:
        limit, period = (cgroup_folder / "cpu.max").read_text().split()
        return None if limit == "max" else int(limit) / int(period)
    except (OSError, ValueError):
        pass
    try:
        microseconds = int((cgroup_folder / "cpu/cpu.cfs_quota_us").read_text())
        return None if microseconds <= 0 else microseconds / int((cgroup_folder / "cpu/cpu.cfs_period_us").read_text())
    except (OSError, ValueError, ZeroDivisionError):
        return None
