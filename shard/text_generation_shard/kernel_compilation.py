"""The process that compiles a model's kernels while the shard imports torch and loads weights.

Kept free of torch: the shard starts that process first of all.
"""

import dataclasses
import json
import logging
import subprocess
import sys

from text_generation_shard.config import ShardConfig

logger = logging.getLogger(__name__)

# Longer than any compilation; kernels that are not compiled by then are compiled where they are first launched.
TIMEOUT_S = 120.0
COMMAND = ("-m", "text_generation_shard.kernel_variants")


class KernelCompilation:
    """Fills Triton's cache on disk for one model on one kind of GPU."""

    def __init__(self, config: ShardConfig) -> None:
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

    def stop(self) -> None:
        """End it, if it has not ended."""
        self._process.kill()
        self._process.wait()
        assert self._process.stderr is not None
        self._process.stderr.close()
