"""Profiling: plans that a batch accepts, figures that follow from a trace counted by hand, and the whole command."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from text_generation_shard.input_batch import InputBatch
from text_generation_shard.profiling.measurement import traced_figures
from text_generation_shard.profiling.scripted_router import LoadTooLarge, ScriptedRouter
from text_generation_shard.profiling.trace_summary import busy_us, read_trace, split_steps, step_times, times_by_kernel
from text_generation_shard.step import StepPlan
from text_generation_shard.step_inputs import BatchLimits, StepInputs

BLOCK_SIZE, NUM_BLOCKS, MAX_STEP_TOKENS = 4, 60, 24
LIMITS = BatchLimits(
    vocab_size=50,
    block_size=BLOCK_SIZE,
    num_blocks=NUM_BLOCKS,
    max_num_sequences=8,
    max_step_tokens=MAX_STEP_TOKENS,
    max_sequence_length=NUM_BLOCKS * BLOCK_SIZE,
)


def make_router() -> ScriptedRouter:
    return ScriptedRouter(NUM_BLOCKS, BLOCK_SIZE, MAX_STEP_TOKENS, vocab_size=50)


def run(batch: InputBatch, plans: Iterator[StepPlan]) -> Iterator[StepInputs]:
    """Each step as a shard lays it out; the batch checks every plan against the protocol."""
    for plan in plans:
        assert batch.apply(plan) == {}
        inputs = batch.prepare(plan)
        assert inputs is not None
        batch.advance(inputs)
        slots = inputs.slot_mapping.tolist()
        assert len(set(slots)) == len(slots)
        yield inputs


def test_steady_decode() -> None:
    batch, router = InputBatch(LIMITS), make_router()
    assert all(inputs.num_tokens <= MAX_STEP_TOKENS for inputs in run(batch, router.bring_to(5, 12)))
    tables = [set(batch.block_tables[row, : batch.num_blocks[row]].tolist()) for row in range(5)]
    assert sum(len(table) for table in tables) == len(set().union(*tables))
    for inputs in run(batch, (router.plan() for _ in range(9))):
        assert inputs.num_tokens == inputs.num_samples == 5
    # Their lengths differ, so that they do not all need a block in the same step.
    assert len({length % BLOCK_SIZE for length in inputs.sequence_lengths.tolist()}) > 1
    last = list(run(batch, router.bring_to(2, 12)))[-1]
    assert last.num_tokens == 2


def test_mixed_steps_hold_a_whole_prompt_each() -> None:
    batch, router = InputBatch(LIMITS), make_router()
    list(run(batch, router.bring_to(3, 6)))
    for _ in range(2):  # the second load finds the first one's last prompt still there
        for inputs in run(batch, router.mixed(7, 10)):
            assert (inputs.num_tokens, inputs.num_samples, inputs.max_query_length) == (13, 4, 10)
    with pytest.raises(LoadTooLarge, match="24 tokens"):
        next(router.mixed(1, MAX_STEP_TOKENS - 2))


def test_blocks_run_out() -> None:
    router = make_router()
    with pytest.raises(LoadTooLarge, match="60 blocks"):
        list(router.bring_to(8, 40))


def event(name: str, category: str, start: float, duration: float) -> dict[str, Any]:
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": duration}


# Two steps: 100 to 160 with 4 + 6 idle, then 15 idle, then 175 to 205 with 5 idle. Two kernels overlap in the first.
TRACE = [
    event("cudaGraphLaunch", "cuda_runtime", 90, 500),
    event("Memcpy HtoD (Pinned -> Device)", "gpu_memcpy", 100, 10),
    event("attention", "kernel", 114, 20),
    event("product", "kernel", 124, 22),
    event("Memcpy DtoH (Device -> Pinned)", "gpu_memcpy", 152, 8),
    event("Memcpy HtoD (Pinned -> Device)", "gpu_memcpy", 175, 5),
    event("Memcpy HtoD (Pinned -> Device)", "gpu_memcpy", 180, 5),
    event("attention", "kernel", 190, 10),
    event("Memcpy DtoH (Device -> Pinned)", "gpu_memcpy", 200, 5),
    {"ph": "M", "name": "process_name"},
]


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": TRACE[::-1]}))
    return path


def test_idle_time_and_times_by_kernel(trace: Path) -> None:
    activities = read_trace(trace)
    first, second = step_times(split_steps(activities))
    assert (first.duration_us, first.idle_us, first.idle_before_us) == (60, 10, 0)
    assert (second.duration_us, second.idle_us, second.idle_before_us) == (30, 5, 15)
    assert busy_us(activities) == 75
    attention = times_by_kernel(activities)[0]
    assert (attention.name, attention.count, attention.mean_us, attention.total_us) == ("attention", 2, 15, 30)


def test_steps_that_cannot_be_told_apart_are_not_guessed(trace: Path) -> None:
    figures = traced_figures(read_trace(trace), num_steps=3)
    assert figures["steps"] is None
    assert (figures["span_us"], figures["idle_us"]) == (105, 30)
    assert figures["kernels"][0]["us_per_step"] == 10


def test_the_command(tmp_path: Path) -> None:
    """Random weights of a tiny model on this machine: each case has its steps and what they spent time on."""
    config = {
        "model_type": "llama", "vocab_size": 90, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512, "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    report, traces = tmp_path / "report.json", tmp_path / "traces"
    command = [sys.executable, "-m", "text_generation_shard.profiling", str(tmp_path), "--load-format", "dummy"]
    command += ["--decode", "1,3", "--mixed", "2+10", "--context", "20", "--steps", "12", "--traced-steps", "4"]
    command += ["--max-step-tokens", "24", "--max-num-sequences", "4", "--max-kv-tokens", "512", "--dtype", "float32"]
    command += ["--json", str(report), "--traces", str(traces)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert ended.returncode == 0, ended.stderr
    cases = json.loads(report.read_text())["cases"]
    assert [case["name"] for case in cases] == ["decode 1", "decode 3", "decode 2 + prompt 10"]
    assert [case["untraced"]["num_tokens"] for case in cases] == [1, 3, 12]
    for case in cases:
        assert 0 < case["untraced"]["device_us"]["p50"] <= case["untraced"]["interval_us"]["max"]
        products = next(kernel for kernel in case["traced"]["kernels"] if kernel["name"] == "aten::mm")
        # Four products in each layer, and the head.
        assert products["count"] == 4 * (2 * 4 + 1)
    assert len(list(traces.iterdir())) == 3
    command[command.index("--context") + 1] = "2000"
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert ended.returncode != 0
    assert "32 blocks of 16 tokens do not hold the sequences" in ended.stderr
