"""What runs and what it takes: build, model, memory of the processes, the GPUs."""

from dataclasses import dataclass

from text_generation_router.exposition import Counter, Gauge, Registry, label


@dataclass(frozen=True)
class GpuReading:
    """One GPU as it is; what its driver does not tell is None."""

    memory_used_bytes: int | None
    memory_total_bytes: int | None
    utilisation: float | None  # share of the last moments in which a kernel ran, 0 to 1
    power_w: float | None


_GPU_GAUGES = (
    ("memory_used_bytes", "tgi_gpu_memory_used_bytes", "GPU memory in use, by whomever"),
    ("memory_total_bytes", "tgi_gpu_memory_total_bytes", "GPU memory"),
    ("utilisation", "tgi_gpu_utilization_ratio", "Share of the time in which a kernel ran, 0 to 1"),
    ("power_w", "tgi_gpu_power_watts", "Power that a GPU draws"),
)


class ProcessMetrics:
    """Gauges that appear with the first value: a server without GPUs shows none of theirs."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._gauges: dict[tuple[str, str], Gauge] = {}
        self._restarts = registry.add("tgi_shard_restarts", "Times that the shards were replaced", Counter())

    def shards_restarted(self) -> None:
        """New shards have taken the place of lost ones."""
        self._restarts.add()

    def _set(self, name: str, help_text: str, labels: str, value: float) -> None:
        gauge = self._gauges.get((name, labels))
        if gauge is None:
            gauge = self._gauges[name, labels] = self._registry.add(name, help_text, Gauge(), labels)
        gauge.set(value)

    def _set_info(self, name: str, help_text: str, fields: dict[str, str]) -> None:
        self._set(name, help_text, ",".join(label(key, value) for key, value in fields.items()), 1)

    def set_build(self, version: str, sha: str, docker_label: str) -> None:
        """What is installed; "" where that is not known."""
        fields = {"version": version, "sha": sha, "docker_label": docker_label}
        self._set_info("tgi_build_info", "The installed version: always 1", fields)

    def set_model(self, model_id: str, sha: str, dtype: str, device: str, world_size: int) -> None:
        """What is served, and on what; `sha` is "" for what has none."""
        fields = {
            "model_id": model_id,
            "model_sha": sha,
            "dtype": dtype,
            "device": device,
            "num_shards": str(world_size),
        }
        self._set_info("tgi_model_info", "The model that is served: always 1", fields)

    def set_resident(self, process: str, num_bytes: int) -> None:
        """Memory that a process has in use; `process` is router or shard-<rank>."""
        labels = label("process", process)
        self._set("tgi_process_resident_memory_bytes", "Memory that a process has in use", labels, num_bytes)

    def set_gpu(self, rank: int, reading: GpuReading) -> None:
        """The GPU of a shard."""
        for field, name, help_text in _GPU_GAUGES:
            if (value := getattr(reading, field)) is not None:
                self._set(name, help_text, label("rank", str(rank)), value)
