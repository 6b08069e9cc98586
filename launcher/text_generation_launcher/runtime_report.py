"""What `--env` prints: versions and platform."""

import importlib.metadata
import os
import platform
import subprocess
import sys

from text_generation_launcher.gpus import count_gpus, num_cores

_PACKAGES = (
    "text-generation", "torch", "triton", "transformers", "tokenizers", "safetensors", "gguf", "grpcio", "aiohttp",
)  # fmt: skip


def runtime_report() -> str:
    """Several lines of text."""
    lines = ["Runtime environment:", f"Python: {sys.version.split()[0]}", f"Platform: {platform.platform()}"]
    lines += [f"{name}: {_version(name)}" for name in _PACKAGES]
    lines.append(f"CPU cores available: {num_cores()} of {os.cpu_count()}")
    lines.append(f"GPUs: {count_gpus()}")
    return "\n".join(lines + _nvidia_smi())


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _nvidia_smi() -> list[str]:
    try:
        listed = subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ["nvidia-smi: N/A"]
    return ["nvidia-smi:", *listed.stdout.splitlines()]
