"""The process that compiles a model's kernels while the shard imports torch and loads weights.

Kept free of torch: the shard starts that process first of all. Once it has compiled everything, a mark in Triton's
cache says so, and later starts of the same model go without it.
"""

import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

from text_generation_shard.config import ShardConfig

logger = logging.getLogger(__name__)

# Longer than any compilation; kernels that are not compiled by then are compiled where they are first launched.
TIMEOUT_S = 120.0
COMMAND = ("-m", "text_generation_shard.kernel_variants")


# What a compiled kernel is made of beside the model: our code, Triton, and the GPUs as the driver names them.
SOURCES = ("text_generation_kernels", "text_generation_shard")
GPU_NAMES = Path("/proc/driver/nvidia/gpus")


def start_compilation(config: ShardConfig) -> "KernelCompilation | None":
    """The process, or None where an earlier one has left nothing to do, or where this cannot be told."""
    try:
        mark = compiled_mark(config)
    except (OSError, importlib.metadata.PackageNotFoundError) as error:
        logger.warning("Kernels will be compiled as they are used: %s", error)
        return None
    return None if mark.exists() else KernelCompilation(config, mark)


def compiled_mark(config: ShardConfig) -> Path:
    """The file that says that this model's kernels are compiled, by all that they depend on.

    It lies in Triton's cache and goes with it.
    """
    digest = hashlib.sha256()
    for fact in (importlib.metadata.version("triton"), sys.version, str(config.dtype), str(config.world_size)):
        digest.update(fact.encode() + b"\0")
    files = [Path(config.model_folder, "config.json"), *sorted(GPU_NAMES.glob("*/information"))]
    for package in SOURCES:
        spec = importlib.util.find_spec(package)
        assert spec is not None
        for folder in spec.submodule_search_locations or ():
            files += sorted(Path(folder).rglob("*.py"))
    for path in files:
        # Of a GPU the name matters, not where it sits.
        text = path.read_bytes()
        digest.update(text if path.name != "information" else text.split(b"\n", 1)[0])
    cache = os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache"
    return Path(cache, f"text-generation-{digest.hexdigest()[:32]}")


class KernelCompilation:
    """Fills Triton's cache on disk for one model on one kind of GPU."""

    def __init__(self, config: ShardConfig, mark: Path) -> None:
        self._mark = mark
        argument = json.dumps(dataclasses.asdict(config))
        command = [sys.executable, *COMMAND, "--config-json", argument]
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )

    def wait(self) -> None:
        """Wait for its end; a failure is logged, for kernels are compiled at their first launch all the same."""
        try:
            _, errors = self._process.communicate(timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.stop()
            logger.warning("Kernels were not compiled within %.0f s; the rest is compiled as they are used", TIMEOUT_S)
            return
        if self._process.returncode != 0:
            logger.warning("Kernels will be compiled as they are used, their compilation failed:\n%s", errors.strip())
        elif self._mark.parent.is_dir():
            self._mark.touch()

    def stop(self) -> None:
        """End it, if it has not ended."""
        self._process.kill()
        self._process.wait()
        assert self._process.stderr is not None
        self._process.stderr.close()
