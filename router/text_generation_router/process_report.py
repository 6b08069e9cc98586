"""Tells the metrics, whenever they are asked for, what the processes and GPUs of this server take."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from text_generation_router.gpu_reader import GpuReader
from text_generation_router.metrics import Metrics
from text_generation_router.shard_client import ShardProcess

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def resident_bytes(pid: int) -> int | None:
    """The memory that a process has in use; None once it is gone, or on a system that does not tell."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE_BYTES
    except (OSError, ValueError, IndexError):
        return None


class ProcessReport:
    """Reads the processes' memory at once and takes over what the GPUs' reader saw last."""

    def __init__(self, metrics: Metrics, shards: Callable[[], Sequence[ShardProcess]]) -> None:
        """`shards` answers the ranks of the moment: they may be started anew."""
        self._metrics = metrics.processes
        self._shards = shards
        self._gpus = GpuReader(lambda: {shard.rank: shard.device_uuid for shard in shards() if shard.device_uuid})
        metrics.on_scrape(self._report)

    def start(self) -> None:
        """Begin to read the GPUs, if there are any."""
        self._gpus.start()

    def stop(self) -> None:
        """Read no more."""
        self._gpus.stop()

    def _report(self) -> None:
        processes = {"router": os.getpid()} | {f"shard-{shard.rank}": shard.pid for shard in self._shards()}
        for name, pid in processes.items():
            if (num_bytes := resident_bytes(pid)) is not None:
                self._metrics.set_resident(name, num_bytes)
        for rank, reading in self._gpus.latest.items():
            self._metrics.set_gpu(rank, reading)
