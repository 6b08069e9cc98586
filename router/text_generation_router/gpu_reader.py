"""Reads memory, utilisation and power of the shards' GPUs through NVML, in a thread of its own.

A question to the driver can take milliseconds, and more while the GPU is busy: the event loop never asks.
"""

import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any

import pynvml

from text_generation_router.process_metrics import GpuReading

logger = logging.getLogger(__name__)

INTERVAL_S = 5.0


class GpuReader:
    """`latest` has the newest reading of each rank's GPU; none where there is no GPU or no driver."""

    def __init__(self, device_uuids: Callable[[], Mapping[int, str]]) -> None:
        """`device_uuids` answers each rank's GPU at the moment."""
        self._device_uuids = device_uuids
        self._is_stopping = threading.Event()
        self.latest: dict[int, GpuReading] = {}

    def start(self) -> None:
        """Read from now on, if there is anything to read."""
        if self._device_uuids():
            threading.Thread(target=self._run, name="gpu-reader", daemon=True).start()

    def stop(self) -> None:
        """Begin no further reading."""
        self._is_stopping.set()

    def _run(self) -> None:
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            logger.warning("The GPUs' memory, utilisation and power are not measured: %s", error)
            return
        try:
            while True:
                self.latest = {rank: _read(uuid) for rank, uuid in self._device_uuids().items()}
                if self._is_stopping.wait(INTERVAL_S):
                    return
        finally:
            pynvml.nvmlShutdown()


def _read(uuid: str) -> GpuReading:
    """What the driver tells of one GPU."""

    def ask(question: str) -> Any:
        try:
            return getattr(pynvml, question)(pynvml.nvmlDeviceGetHandleByUUID(uuid.encode()))
        except pynvml.NVMLError as error:
            logger.debug("%s of GPU %s: %s", question, uuid, error)
            return None

    memory = ask("nvmlDeviceGetMemoryInfo")
    rates = ask("nvmlDeviceGetUtilizationRates")
    milliwatts = ask("nvmlDeviceGetPowerUsage")
    return GpuReading(
        memory_used_bytes=None if memory is None else memory.used,
        memory_total_bytes=None if memory is None else memory.total,
        utilisation=None if rates is None else rates.gpu / 100,
        power_w=None if milliwatts is None else milliwatts / 1000,
    )
