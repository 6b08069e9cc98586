"""Steps and warm-up over a model that is a formula, so that what comes out is known without running ours."""

import gc
import math
import struct
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from text_generation_kernels.cpu_attention_plan import CpuAttentionPlan
from text_generation_shard.cpu_execution import CpuExecution
from text_generation_shard.forward_context import get_forward_context
from text_generation_shard.kv_cache import KvLayout
from text_generation_shard.model_runner import ModelInfo, ModelRunner
from text_generation_shard.progress import ProgressFile
from text_generation_shard.step import NewSequence, StepPlan
from text_generation_shard.warm_up import KvBudget, WarmUpError, WarmUpLimits

VOCAB_SIZE = 50
NAN_TOKEN, INFINITE_TOKEN, DEVICE_ERROR_TOKEN = 13, 14, 15
LIMITS = WarmUpLimits(max_step_tokens=24, max_num_sequences=6, max_sequence_length=0, max_kv_tokens=0)


class Formula:
    """After token t at position p the best token is (3 t + p) mod 50, with logit 2 over zeros."""

    def __init__(self) -> None:
        self.query_lengths: list[list[int]] = []
        self.sequence_lengths: list[list[int]] = []
        self.last_positions: list[list[int]] = []
        self.num_cache_blocks: list[int] = []
        self.on_forward: Callable[[torch.Tensor], None] = lambda input_ids: None

    def __call__(
        self, input_ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor | None = None
    ) -> torch.Tensor:
        self.on_forward(input_ids)
        context = get_forward_context()
        assert isinstance(context.plan, CpuAttentionPlan)
        starts = context.plan.query_starts
        self.query_lengths.append(np.diff(starts).tolist())
        self.sequence_lengths.append(context.plan.sequence_lengths.tolist())
        self.last_positions.append(positions[starts[1:] - 1].tolist())
        self.num_cache_blocks.append(len(context.kv_caches[0][0]))
        if (input_ids == DEVICE_ERROR_TOKEN).any():
            raise RuntimeError("the device is lost")
        hidden = torch.stack((input_ids, positions), dim=1)
        return hidden if rows is None else hidden[rows]

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(len(hidden), VOCAB_SIZE)
        best = (3 * hidden[:, 0] + hidden[:, 1]) % VOCAB_SIZE
        logits.scatter_(1, best.unsqueeze(1), 2.0)
        logits[hidden[:, 0] == NAN_TOKEN, 4] = torch.nan
        logits[hidden[:, 0] == INFINITE_TOKEN] = torch.inf
        return logits


LOGPROB = 2 - math.log(math.exp(2) + VOCAB_SIZE - 1)
LAYOUT = KvLayout(num_layers=1, num_kv_heads=1, head_dim=2, dtype=torch.float32)


@pytest.fixture(autouse=True)
def _restore_gc() -> Iterator[None]:
    yield
    gc.enable()
    gc.unfreeze()


class Knot:
    """Refers to itself, so that only the collector can free it."""

    itself: object = None


def make_runner(folder: Path, num_blocks: int = 10) -> tuple[ModelRunner, Formula]:
    model = Formula()
    info = ModelInfo("cpu", VOCAB_SIZE, max_position_embeddings=64)
    budget = KvBudget(cpu_bytes=num_blocks * LAYOUT.bytes_per_block)
    runner = ModelRunner(CpuExecution(model), info, LAYOUT, budget, torch.device("cpu"), ProgressFile(folder, 0))
    return runner, model


@pytest.fixture
def runner(tmp_path: Path) -> ModelRunner:
    runner, _ = make_runner(tmp_path)
    runner.warm_up(LIMITS)
    return runner


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def plan(
    step: int, sequences: dict[int, list[int]], prefills: dict[int, int], removed: tuple[int, ...] = ()
) -> StepPlan:
    new = tuple(
        NewSequence(sequence_id, ints(*tokens), len(tokens), 0, ints(sequence_id))
        for sequence_id, tokens in sequences.items()
    )
    return StepPlan(
        step,
        removed_sequence_ids=ints(*removed),
        new_sequences=new,
        prefill_sequence_ids=ints(*prefills),
        prefill_num_tokens=ints(*prefills.values()),
    )


def test_prefill_in_chunks_then_decode(runner: ModelRunner) -> None:
    first = runner.run_step(plan(1, {1: [7, 8, 9]}, {1: 2}))
    assert (len(first.sequence_ids), first.num_tokens, first.failures) == (0, 2, {})
    token, expected = 9, []
    for step in range(2, 6):
        result = runner.run_step(plan(step, {}, {1: 1} if step == 2 else {}))
        token = (3 * token + step) % VOCAB_SIZE  # step s computes position s
        expected.append(token)
        assert (result.step, result.sequence_ids.tolist(), result.token_ids.tolist()) == (step, [1], [token])
        assert result.logprobs.tolist() == pytest.approx([LOGPROB])
        assert result.step_ns >= result.forward_ns + result.sample_ns
    assert len(set(expected)) > 1


@pytest.mark.parametrize("bad_token", [NAN_TOKEN, INFINITE_TOKEN])
def test_a_row_that_is_not_finite_fails_alone(runner: ModelRunner, bad_token: int) -> None:
    result = runner.run_step(plan(1, {1: [5], 2: [bad_token], 3: [6]}, {1: 1, 2: 1, 3: 1}))
    assert dict(zip(result.sequence_ids.tolist(), result.token_ids.tolist(), strict=True)) == {1: 15, 3: 18}
    assert result.logprobs.tolist() == pytest.approx([LOGPROB] * 2)
    assert list(result.failures) == [2]
    assert "finite" in result.failures[2]
    runner.clear()
    # The step after it was planned without knowing, and takes no harm.
    runner.run_step(plan(2, {1: [5], 2: [bad_token], 3: [6]}, {1: 1, 2: 1, 3: 1}))
    later = runner.run_step(plan(3, {4: [8]}, {4: 1}, removed=(1,)))
    assert (sorted(later.sequence_ids.tolist()), later.failures) == ([3, 4], {})
    last = runner.run_step(plan(4, {}, {}, removed=(2, 3, 4)))
    assert (last.sequence_ids.tolist(), last.num_tokens) == ([], 0)


def test_a_bad_token_id_fails_that_sequence_alone(runner: ModelRunner) -> None:
    result = runner.run_step(plan(1, {1: [5], 2: [VOCAB_SIZE]}, {1: 1, 2: 1}))
    assert result.token_ids.tolist() == [15]
    assert list(result.failures) == [2]


def test_progress_shows_steps_and_a_lost_device(tmp_path: Path) -> None:
    runner, _ = make_runner(tmp_path)
    runner.warm_up(LIMITS)

    def words() -> tuple[int, ...]:
        return struct.unpack("<4Q", (tmp_path / "progress-0").read_bytes()[:32])

    runner.run_step(plan(1, {1: [5]}, {1: 1}))
    step, started, _, ended = words()
    assert (step, started <= ended) == (1, True)
    with pytest.raises(RuntimeError, match="device is lost"):
        runner.run_step(plan(2, {2: [DEVICE_ERROR_TOKEN]}, {2: 1}))
    step, started, deadline, ended = words()
    assert (step, started > ended, deadline > started) == (2, True, True)
    runner.report_failure()
    step, started, deadline, ended = words()
    assert (started > ended, deadline <= started) == (True, True)


def test_garbage_is_collected_between_steps_only(runner: ModelRunner) -> None:
    assert not gc.isenabled()
    assert gc.get_freeze_count() > 0
    runner.run_step(plan(1, {1: [5]}, {1: 1}))
    knot = Knot()
    knot.itself = knot
    is_alive = weakref.ref(knot)
    del knot
    assert is_alive() is not None
    runner.collect_garbage()
    assert is_alive() is None


def test_warm_up_runs_the_worst_case_on_one_block(tmp_path: Path) -> None:
    runner, model = make_runner(tmp_path, num_blocks=10)
    assert not runner.is_warm
    assert runner.warm_up(LIMITS) == 10
    assert runner.is_warm
    assert model.query_lengths == [[24], [1] * 6]
    assert model.sequence_lengths == [[24], [64, 1, 1, 1, 1, 1]]
    assert model.last_positions == [[23], [63, 0, 0, 0, 0, 0]]
    runner.run_step(plan(1, {1: [5]}, {1: 1}))
    assert model.num_cache_blocks == [1, 1, 10]


def test_warm_up_samples_a_full_batch_with_every_filter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, _ = make_runner(tmp_path)
    sampled: list[list[float]] = []

    def sample(
        logits: torch.Tensor,
        temperatures: torch.Tensor,
        top_k: torch.Tensor,
        top_p: torch.Tensor,
        *_: object,
        **__: object,
    ):
        sampled.append([len(logits), float(temperatures.min()), int(top_k.min()), float(top_p.max())])
        return torch.zeros(len(logits), dtype=torch.int64), torch.zeros(len(logits))

    monkeypatch.setattr("text_generation_kernels.reference_sampling.sample", sample)
    runner.warm_up(LIMITS)
    assert [row[0] for row in sampled] == [1, 6]
    for _, temperature, top_k, top_p in sampled:
        assert temperature > 0
        assert 0 < top_k < VOCAB_SIZE
        assert 0 < top_p < 1


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        (WarmUpLimits(150, 3, 0, 0), [[64, 64, 22], [1] * 3]),
        (WarmUpLimits(150, 2, 0, 0), [[64, 64], [1] * 2]),  # two sequences cannot have more tokens
        (WarmUpLimits(150, 3, 0, 32), [[32, 32, 32], [1] * 3]),  # nor longer ones than the KV memory
    ],
)
def test_a_step_longer_than_any_sequence_is_warmed_up_as_several(
    limits: WarmUpLimits, expected: list[list[int]], tmp_path: Path
) -> None:
    runner, model = make_runner(tmp_path)
    runner.warm_up(limits)
    assert model.query_lengths == expected


@pytest.mark.parametrize(
    ("num_blocks", "limits", "message"),
    [
        (2, WarmUpLimits(24, 6, 33, 0), "max_total_tokens can be at most 32"),
        (9, WarmUpLimits(24, 6, 33, 47), "max_batch_total_tokens holds 32 tokens"),
        (9, WarmUpLimits(24, 6, 0, 15), "does not hold a single block"),
        (9, WarmUpLimits(24, 6, 65, 0), "at most 64"),
        (9, WarmUpLimits(0, 6, 0, 0), "max_step_tokens is 0"),
        (9, WarmUpLimits(24, 0, 0, 0), "max_num_sequences is 0"),
        (9, WarmUpLimits(2**31, 6, 0, 0), "max_step_tokens is 2147483648"),
    ],
)
def test_limits_that_do_not_fit_are_refused(
    num_blocks: int, limits: WarmUpLimits, message: str, tmp_path: Path
) -> None:
    runner, _ = make_runner(tmp_path, num_blocks)
    with pytest.raises(WarmUpError, match=message):
        runner.warm_up(limits)
    assert not runner.is_warm
    assert runner.warm_up(LIMITS) == num_blocks


@pytest.mark.parametrize(("max_kv_tokens", "num_blocks"), [(0, 9), (47, 2), (48, 3), (10**6, 9)])
def test_kv_memory_stays_within_its_limit(max_kv_tokens: int, num_blocks: int, tmp_path: Path) -> None:
    runner, _ = make_runner(tmp_path, 9)
    assert runner.warm_up(WarmUpLimits(24, 6, 32, max_kv_tokens)) == num_blocks


def test_more_kv_memory_than_there_is_becomes_what_there_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    runner, _ = make_runner(tmp_path, 9)
    runner.warm_up(WarmUpLimits(24, 6, 0, 145))
    assert "max_batch_total_tokens 145 does not fit: the memory holds 144 tokens" in caplog.text


def test_a_worst_case_out_of_memory_names_the_largest_step_that_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, model = make_runner(tmp_path)

    def exhausted(input_ids: torch.Tensor) -> None:
        if len(input_ids) > 17:
            raise torch.OutOfMemoryError("tried to allocate 9 GiB")

    model.on_forward = exhausted
    with pytest.raises(WarmUpError, match=r"24 tokens or 6 sequences .*: with 6 sequences, 17 tokens fit"):
        runner.warm_up(LIMITS)


def test_a_worst_case_out_of_memory_names_the_limits_to_lower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, _ = make_runner(tmp_path)

    def exhausted(self: Formula, hidden: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("tried to allocate 9 GiB")

    monkeypatch.setattr(Formula, "compute_logits", exhausted)
    with pytest.raises(WarmUpError, match=r"24 tokens or 6 sequences .*: 6 sequences do not fit with any number"):
        runner.warm_up(LIMITS)
