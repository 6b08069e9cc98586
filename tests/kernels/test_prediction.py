"""Predicted times: the work they count is that of the published model, and none is below what the GPU can do."""

import subprocess
import sys

import pytest
from text_generation_kernels.benchmarks.prediction import (
    COPY_BYTES_PER_S,
    ITEM_BYTES,
    LAYERS,
    MATMUL_FLOPS_PER_S,
    STEPS,
    Launch,
    predicted_s,
    prompt_attention,
    step,
)


def test_a_decode_step_reads_the_models_weights():
    """Llama-3.1-8B has 8 030 261 248 parameters; a step reads all but the embedding and the norms' vectors."""
    launches = [launch for launch in step(1, 1) if launch.part == "products"]
    num_read = sum(launch.num_bytes * launch.count for launch in launches) / ITEM_BYTES
    assert num_read == pytest.approx(8_030_261_248 - 128_256 * 4096 - 65 * 4096, rel=1e-3)


def test_attention_counts_every_pair_of_a_token_and_its_past():
    pairs = sum(cached + 1 for cached in range(100, 107))
    launch = prompt_attention(7, 100)
    assert launch.num_scores == 32 * pairs
    assert launch.num_flops == 4 * 32 * 128 * pairs  # two products of a multiply and an add


@pytest.mark.parametrize("name", STEPS)
def test_nothing_is_faster_than_the_gpu(name):
    for launch in step(*STEPS[name]):
        floor_s = max(launch.num_bytes / COPY_BYTES_PER_S, launch.num_flops / MATMUL_FLOPS_PER_S)
        assert predicted_s(launch) > floor_s
        assert launch.count in (1, LAYERS, 2 * LAYERS)


def test_occupancy_counts():
    """Too little in flight does not reach the copy rate; one program alone cannot hide its exponentials."""
    alone, two = (Launch("", "", 1e9, programs_per_multiprocessor=n, bytes_in_flight=8000) for n in (1, 2))
    assert predicted_s(alone) == pytest.approx(1e9 / (132 * 8000 / 0.7e-6), rel=0.01)
    assert predicted_s(two) == pytest.approx(1e9 / 132 / 16000 * 0.7e-6, rel=0.01)
    alone, two = (Launch("", "", 0, 79e12, 1e11, programs_per_multiprocessor=n) for n in (1, 2))
    assert predicted_s(two) == pytest.approx(0.1, rel=0.01)
    assert predicted_s(alone) == pytest.approx(0.1 + 1e11 * (1 / 16 + 6 / 128) / (132 * 1.755e9), rel=0.01)


def test_the_command_prints_tables():
    command = [sys.executable, "-m", "text_generation_kernels.benchmarks.prediction"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for text in ("| whole step |", "| gate_up | 64 |", "| attention, wide | 8192 |"):
        assert text in printed
