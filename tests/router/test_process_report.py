"""What the processes and GPUs take: memory against psutil, GPUs against a driver that is scripted."""

import os
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pynvml
import pytest
from text_generation_router import gpu_reader
from text_generation_router.gpu_reader import GpuReader
from text_generation_router.metrics import Metrics
from text_generation_router.process_metrics import GpuReading
from text_generation_router.process_report import ProcessReport, resident_bytes
from text_generation_router.shard_client import ShardProcess

GPUS = {"GPU-a": (10, 80, 75, 500_000), "GPU-b": (20, 80, 0, None)}


@pytest.fixture
def driver(monkeypatch):
    """A driver that knows the GPUs of the table, and not the power of the second one."""
    monkeypatch.setattr(gpu_reader, "INTERVAL_S", 0.001)
    calls = []
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: calls.append("init"))
    monkeypatch.setattr(pynvml, "nvmlShutdown", lambda: calls.append("shutdown"))

    def handle(uuid: bytes):
        if uuid.decode() not in GPUS:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return GPUS[uuid.decode()]

    def power(gpu):
        if gpu[3] is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return gpu[3]

    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", handle)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", lambda gpu: SimpleNamespace(used=gpu[0], total=gpu[1]))
    monkeypatch.setattr(pynvml, "nvmlDeviceGetUtilizationRates", lambda gpu: SimpleNamespace(gpu=gpu[2]))
    monkeypatch.setattr(pynvml, "nvmlDeviceGetPowerUsage", power)
    yield calls
    # A thread that was told to stop still has the driver to leave, and must not find the real one.
    wait_for(lambda: calls.count("shutdown") == calls.count("init"))


def wait_for(condition) -> None:
    """The test's own time limit ends a wait in vain."""
    while not condition():
        pass


def test_readings_of_each_rank(driver):
    reader = GpuReader(lambda: {0: "GPU-a", 1: "GPU-b", 2: "GPU-gone"})
    reader.start()
    wait_for(lambda: reader.latest)
    assert reader.latest == {
        0: GpuReading(10, 80, 0.75, 500.0),
        1: GpuReading(20, 80, 0.0, None),
        2: GpuReading(None, None, None, None),
    }
    reader.stop()
    wait_for(lambda: driver == ["init", "shutdown"])


def test_without_gpus_the_driver_is_left_alone(driver):
    reader = GpuReader(dict)
    reader.start()
    reader.stop()
    assert not driver
    assert not reader.latest


def test_without_a_driver_there_are_no_readings(monkeypatch, caplog):
    def fail() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", fail)
    reader = GpuReader(lambda: {0: "GPU-a"})
    reader.start()
    wait_for(lambda: caplog.records)
    assert "not measured" in caplog.text
    assert not reader.latest


def test_memory_is_what_the_system_says():
    with subprocess.Popen([sys.executable, "-c", "print(flush=True); input()"], stdin=-1, stdout=-1) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert resident_bytes(child.pid) == psutil.Process(child.pid).memory_info().rss
        child.kill()
    assert resident_bytes(child.pid) is None


def test_the_exposition_follows_shards_that_are_started_anew(driver):
    metrics = Metrics()
    shards = [ShardProcess(0, os.getpid(), "GPU-a")]
    report = ProcessReport(metrics, lambda: shards)
    report.start()
    wait_for(lambda: 'tgi_gpu_power_watts{rank="0"} 500' in metrics.text())
    assert 'tgi_process_resident_memory_bytes{process="router"}' in metrics.text()
    assert 'tgi_process_resident_memory_bytes{process="shard-0"}' in metrics.text()
    shards[:] = [ShardProcess(0, os.getpid(), "GPU-b")]
    wait_for(lambda: 'tgi_gpu_memory_used_bytes{rank="0"} 20' in metrics.text())
    report.stop()
