"""Times operations and sets them against the GPU's own limits, measured first: a large copy, a large bfloat16 product.

An operation's floor is the larger of its bytes over the copy's rate and its floating-point operations over the
product's. Its runs go round over buffers that together do not fit in the second-level cache, recorded in a CUDA graph.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterable

import torch

NUM_REPLAYS = 15
MIN_LAUNCHES = 16  # in a graph, so that starting the graph does not count
CACHE_MULTIPLE = 2.5
MAX_COPIES = 64
MAX_RUN_S = 2.0  # of one case


@dataclasses.dataclass(frozen=True)
class Bench:
    """Where and how large to measure."""

    device: torch.device
    is_tiny: bool  # a rehearsal: sizes for Triton's interpreter
    dtype: torch.dtype = torch.bfloat16

    def size(self, real: int, tiny: int) -> int:
        """A dimension of the inputs."""
        return tiny if self.is_tiny else real

    def num_copies(self, num_bytes: int) -> int:
        """How many sets of inputs of so many bytes do not fit in the cache."""
        if self.device.type != "cuda":
            return 1
        cache_bytes = torch.cuda.get_device_properties(self.device).L2_cache_size
        return max(1, min(MAX_COPIES, round(CACHE_MULTIPLE * cache_bytes / max(num_bytes, 1) + 0.5)))

    def random(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Normal random numbers: zeros run faster than data."""
        return torch.randn(*shape, device=self.device, dtype=torch.float32).to(dtype or self.dtype)


@dataclasses.dataclass(frozen=True)
class Case:
    """One operation at one size: the same work on several sets of inputs."""

    name: str
    runs: list[Callable[[], object]]
    num_bytes: int  # each input read once, each output written once
    num_flops: int = 0
    settings: tuple[str, str] = ("", "")  # operation and shape in the launch table, for tuning


@dataclasses.dataclass(frozen=True)
class Roofs:
    """What the GPU reached on the simplest work."""

    copy_bytes_per_s: float
    matmul_flops_per_s: float


@dataclasses.dataclass(frozen=True)
class Measurement:
    """A case's time and its share of the limit."""

    operation: str
    name: str
    time_us: float
    gb_per_s: float
    tflops_per_s: float
    share_of_roof: float


def measure_roofs(bench: Bench) -> Roofs:
    """A copy of a gigabyte, counted as read and written, and a square product of random bfloat16 numbers.

    A copy made by a kernel can outrun the driver's own inside a graph (H200: 2.8 TB/s), so the faster one counts.
    """
    if bench.device.type != "cuda":
        return Roofs(1e9, 1e9)
    source = bench.random(1 << 28, dtype=torch.float32)
    target = torch.empty_like(source)
    copies: list[Callable[[], object]] = [lambda: target.copy_(source), lambda: torch.mul(source, 1.0, out=target)]
    copy_s = min(time_runs([copy], bench) for copy in copies)
    side = 8192
    left, right = bench.random(side, side, dtype=torch.bfloat16), bench.random(side, side, dtype=torch.bfloat16)
    matmul_s = time_runs([lambda: left @ right], bench)
    return Roofs(2 * source.numel() * source.itemsize / copy_s, 2 * side**3 / matmul_s)


def time_runs(runs: list[Callable[[], object]], bench: Bench) -> float:
    """Median seconds of one run."""
    if bench.device.type != "cuda":
        started = time.perf_counter()
        for run in runs:
            run()
        return (time.perf_counter() - started) / len(runs)
    launches = runs * -(-MIN_LAUNCHES // len(runs))
    graph = _capture(launches)
    times = [_replay(graph)]
    num_replays = max(3, min(NUM_REPLAYS, int(MAX_RUN_S / max(times[0], 1e-6))))
    times = [_replay(graph) for _ in range(num_replays)]
    return statistics.median(times) / len(launches)


def _capture(launches: list[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """The launches as one graph, after each ran once so that nothing is compiled while capturing."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for launch in launches:
            launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    graph.replay()
    torch.cuda.synchronize()
    return graph


def _replay(graph: torch.cuda.CUDAGraph) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def measure(operation: str, case: Case, roofs: Roofs, bench: Bench) -> Measurement:
    """The case's time and rates."""
    time_s = time_runs(case.runs, bench)
    floor_s = max(case.num_bytes / roofs.copy_bytes_per_s, case.num_flops / roofs.matmul_flops_per_s)
    return Measurement(
        operation=operation,
        name=case.name,
        time_us=time_s * 1e6,
        gb_per_s=case.num_bytes / time_s / 1e9,
        tflops_per_s=case.num_flops / time_s / 1e12,
        share_of_roof=floor_s / time_s,
    )


def format_row(row: Measurement) -> str:
    """A line of the table."""
    return (
        f"{row.operation:18} {row.name:44} {row.time_us:10.2f} us {row.gb_per_s:8.0f} GB/s "
        f"{row.tflops_per_s:7.1f} TFLOP/s {row.share_of_roof:6.1%}"
    )


def measure_all(operation: str, cases: Iterable[Case], roofs: Roofs, bench: Bench) -> list[Measurement]:
    """Measure one case after the other, printing each; a case's buffers are gone before the next is built."""
    measurements = []
    for case in cases:
        measurements.append(measure(operation, case, roofs, bench))
        print(format_row(measurements[-1]), flush=True)
        case.runs.clear()
    return measurements
