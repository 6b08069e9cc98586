"""The benchmarks run from end to end under the interpreter; the launch table and the tuner answer what they should."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from text_generation_kernels import launch_settings
from text_generation_kernels.benchmarks import harness
from text_generation_kernels.benchmarks.harness import Bench, Case, Roofs, measure_all
from text_generation_kernels.benchmarks.tune import combinations, ranked
from text_generation_kernels.gpu import Gpu, gpu_of
from text_generation_kernels.launch_settings import GPU_CLASSES, SETTINGS, gpu_class, settings_of_class

FILES = sorted(Path(harness.__file__).parent.glob("bench_*.py"))


@pytest.mark.parametrize("operation", [path.stem.removeprefix("bench_") for path in FILES])
def test_rehearsal(operation, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("a rehearsal is for machines without a GPU: here the benchmarks themselves run")
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "text_generation_kernels.benchmarks", operation]
    subprocess.run(
        [*command, "--tiny", "--cpu", "--json", str(report)],
        check=True, timeout=250, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    rows = json.loads(report.read_text())["rows"]
    assert {row["operation"] for row in rows} == {operation}
    assert all(row["time_us"] > 0 and row["gb_per_s"] > 0 for row in rows)


def test_share_of_roof():
    """A thousand bytes at a thousand bytes a second last a second, less is a smaller share of it."""
    calls = []
    case = Case("nothing", [lambda: calls.append(1)], num_bytes=1000, num_flops=10)
    (row,) = measure_all("nothing", [case], Roofs(1000.0, 1000.0), Bench(torch.device("cpu"), is_tiny=True))
    assert calls == [1]
    assert row.share_of_roof == pytest.approx(1e6 / row.time_us)
    assert row.gb_per_s == pytest.approx(1e-6 / (row.time_us / 1e6))


def settings_of_default(operation: str) -> dict[str, int]:
    """The entry that serves every class: the shape's own, or its operation's."""
    return SETTINGS.get((operation, "default")) or SETTINGS[operation.partition("/")[0], "default"]


def test_every_entry_can_be_launched():
    for (operation, kind), entry in SETTINGS.items():
        assert kind in GPU_CLASSES or kind == "default", operation
        assert entry["num_warps"] in (1, 2, 4, 8, 16, 32), operation
        assert 1 <= entry["num_stages"] <= 8, operation
        if kind != "default":
            assert entry.keys() ^ settings_of_default(operation).keys() <= {"maxnreg", "MERGED_SLOTS"}


def test_closest_entry(monkeypatch):
    table = {
        ("op", "default"): {"A": 1},
        ("op", "h100"): {"A": 2},
        ("op/wide", "default"): {"A": 3},
        ("op/wide", "h200"): {"A": 4},
    }
    monkeypatch.setattr(launch_settings, "SETTINGS", table)
    found = [settings_of_class("op", kind, shape)["A"] for kind in ("a100", "h100", "h200") for shape in ("", "wide")]
    assert found == [1, 3, 2, 3, 1, 4]
    with pytest.raises(KeyError):
        settings_of_class("other", "h100")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-40GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "ada"),
        ("NVIDIA B200", "default"),
    ],
)
def test_gpu_classes(name, kind):
    assert gpu_class(Gpu(name, (9, 0), 100)) == kind
    assert gpu_class(gpu_of(torch.device("cpu"))) == "default"


def test_tuner_ranks_by_relative_time():
    """Two cases of very different length count alike; what did not run anywhere does not count."""
    times = {"a": [1.0, 300.0, math.inf], "b": [2.0, 100.0, math.inf], "c": [1.0, math.inf, math.inf]}
    assert [text for _, text in ranked(times)] == ["b", "a", "c"]
    assert ranked(times)[0][0] == pytest.approx(1.5)


def test_combinations():
    assert list(combinations({"A": [1, 2], "B": [3]})) == [{"A": 1, "B": 3}, {"A": 2, "B": 3}]
