"""Every sampling parameter through whole steps on a CPU, over a model that is a table of logits.

References: the logits processors of transformers where they exist, and a definition in float64 for all of them.
"""

import gc
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from text_generation_kernels.philox import uniform_numbers
from text_generation_shard.cpu_execution import CpuExecution
from text_generation_shard.kv_cache import KvLayout
from text_generation_shard.model_runner import ModelInfo, ModelRunner
from text_generation_shard.progress import ProgressFile
from text_generation_shard.step import LogitsChanges, NewSequence, StepPlan, StepResult
from text_generation_shard.warm_up import KvBudget, WarmUpLimits
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
    WatermarkLogitsProcessor,
)

VOCAB_SIZE, MAX_LENGTH = 60, 64
LAYOUT = KvLayout(num_layers=1, num_kv_heads=1, head_dim=2, dtype=torch.float32)


class TableModel:
    """Logits that depend on the last token and its position alone."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        self.by_token = torch.randn(VOCAB_SIZE, VOCAB_SIZE, generator=generator) * 1.5
        self.by_position = torch.randn(MAX_LENGTH, VOCAB_SIZE, generator=generator)

    def __call__(
        self, input_ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor | None = None
    ) -> torch.Tensor:
        hidden = torch.stack((input_ids, positions), dim=1)
        return hidden if rows is None else hidden[rows]

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.by_token[hidden[:, 0]] + self.by_position[hidden[:, 1]]

    def logits_after(self, tokens: list[int]) -> torch.Tensor:
        return self.compute_logits(torch.tensor([[tokens[-1], len(tokens) - 1]]))


MODEL = TableModel()


@pytest.fixture(autouse=True)
def _restore_gc() -> Iterator[None]:
    yield
    gc.enable()
    gc.unfreeze()


def make_runner(folder: Path, max_num_sequences: int, max_step_tokens: int) -> ModelRunner:
    info = ModelInfo("cpu", VOCAB_SIZE, max_position_embeddings=MAX_LENGTH)
    budget = KvBudget(cpu_bytes=8 * LAYOUT.bytes_per_block)
    runner = ModelRunner(CpuExecution(MODEL), info, LAYOUT, budget, torch.device("cpu"), ProgressFile(folder, 0))
    runner.warm_up(WarmUpLimits(max_step_tokens, max_num_sequences, max_sequence_length=MAX_LENGTH, max_kv_tokens=0))
    return runner


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


@dataclass(frozen=True)
class Setting:
    """The parameters of one sequence."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    changes: LogitsChanges | None = None
    top_n_tokens: int = 0
    biases: dict[int, float] = field(default_factory=dict)

    def sequence(self, number: int, tokens: list[int], num_prompt: int, seed: int) -> NewSequence:
        changes = self.changes
        if self.biases:
            values = np.array(list(self.biases.values()), np.float32)
            changes = replace(changes or LogitsChanges(), bias_token_ids=ints(*self.biases), bias_values=values)
        return NewSequence(
            number, ints(*tokens), num_prompt, 0, ints(*range(-(-MAX_LENGTH // LAYOUT.block_size))),
            temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p,
            typical_p=self.typical_p, seed=seed, changes=changes, top_n_tokens=self.top_n_tokens,
        )  # fmt: skip


@dataclass
class Told:
    """What came back for one sequence."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top: list[list[tuple[int, float]]] = field(default_factory=list)


def top_rows(result: StepResult) -> list[list[tuple[int, float]]]:
    if result.top_tokens is None:
        return [[] for _ in result.sequence_ids]
    pairs = list(zip(result.top_tokens.token_ids.tolist(), result.top_tokens.logprobs.tolist(), strict=True))
    ends = np.cumsum(result.top_tokens.num_tokens).tolist()
    return [pairs[start:end] for start, end in zip([0, *ends], ends, strict=False)]


class Driver:
    """Steps of one batch; a sequence's number is its place among the settings, counted from 1."""

    def __init__(self, folder: Path) -> None:
        self.runner = make_runner(folder, max_num_sequences=20, max_step_tokens=200)
        self.told: dict[int, Told] = {}
        self.step = 0

    def run(self, new: list[NewSequence] = [], removed: list[int] = []) -> StepResult:  # noqa: B006
        self.step += 1
        result = self.runner.run_step(
            StepPlan(
                self.step,
                removed_sequence_ids=ints(*removed),
                new_sequences=tuple(new),
                prefill_sequence_ids=ints(*(sequence.sequence_id for sequence in new)),
                prefill_num_tokens=ints(*(len(sequence.token_ids) for sequence in new)),
            )
        )
        assert not result.failures
        rows = zip(result.sequence_ids.tolist(), result.token_ids.tolist(), result.logprobs.tolist(), strict=True)
        for (number, token, logprob), top in zip(rows, top_rows(result), strict=True):
            told = self.told.setdefault(number, Told())
            told.tokens.append(token)
            told.logprobs.append(logprob)
            told.top.append(top)
        return result


def expected_scores(setting: Setting, prompt: list[int], generated: list[int]) -> torch.Tensor:
    """Logits after all that changes and filters them, by transformers; what it lacks by hand."""
    changes, ids = setting.changes or LogitsChanges(), torch.tensor([prompt + generated])
    scores = MODEL.logits_after(prompt + generated)
    if setting.biases:
        scores = SequenceBiasLogitsProcessor([[[token], value] for token, value in setting.biases.items()])(ids, scores)
    if changes.has_watermark:
        scores = WatermarkLogitsProcessor(VOCAB_SIZE, "cpu", greenlist_ratio=0.5, bias=2.0)(ids, scores)
    scores = RepetitionPenaltyLogitsProcessor(changes.repetition_penalty)(ids, scores)
    counts = torch.bincount(torch.tensor(generated, dtype=torch.int64), minlength=VOCAB_SIZE)
    share = torch.bincount(ids[0], minlength=VOCAB_SIZE) / ids.shape[1]
    scores = scores - changes.frequency_penalty * counts - changes.presence_penalty * (counts > 0)
    scores = scores - changes.share_penalty * share
    if changes.min_tokens:
        ends = changes.banned_token_ids.tolist()
        scores = MinNewTokensLengthLogitsProcessor(len(prompt), changes.min_tokens, ends)(ids, scores)
    if setting.temperature == 0:
        return scores[0]
    warpers = LogitsProcessorList([TemperatureLogitsWarper(setting.temperature)])
    if setting.top_k:
        warpers.append(TopKLogitsWarper(setting.top_k))
    if setting.top_p < 1:
        warpers.append(TopPLogitsWarper(setting.top_p))
    if setting.min_p:
        warpers.append(MinPLogitsWarper(setting.min_p))
    if setting.typical_p < 1:
        warpers.append(TypicalLogitsWarper(setting.typical_p))
    return warpers(ids, scores)[0]


PENALISED = LogitsChanges(repetition_penalty=1.4, frequency_penalty=0.3, presence_penalty=0.5)
ENDS = tuple(range(0, VOCAB_SIZE, 2))
SETTINGS = [
    Setting(temperature=0.0, changes=LogitsChanges(repetition_penalty=1.3)),
    Setting(temperature=0.0, changes=LogitsChanges(frequency_penalty=1.2), top_n_tokens=3),
    Setting(temperature=0.0),
    Setting(changes=LogitsChanges(presence_penalty=-1.5)),
    Setting(changes=LogitsChanges(share_penalty=2.0), top_n_tokens=5),
    Setting(biases={3: 5.0, 7: -100.0, 9: 2.0}),
    Setting(changes=LogitsChanges(banned_token_ids=ints(*ENDS), min_tokens=4), top_n_tokens=1),
    Setting(changes=LogitsChanges(has_watermark=True)),
    Setting(temperature=0.7, top_k=20, top_p=0.9, min_p=0.01, typical_p=0.9, top_n_tokens=4),
    Setting(temperature=1.3, top_p=0.8, changes=PENALISED, biases={11: 3.0, 12: -2.0}, top_n_tokens=2),
    Setting(
        temperature=0.8, top_k=30, min_p=0.02,
        changes=replace(PENALISED, has_watermark=True, banned_token_ids=ints(*ENDS), min_tokens=3),
    ),
    Setting(),
]  # fmt: skip


def prompt_of(number: int) -> list[int]:
    return np.random.default_rng(number).integers(0, VOCAB_SIZE, 3 + number).tolist()


def check(setting: Setting, prompt: list[int], seed: int, told: Told) -> None:
    """Each token is the one that the inverse of the cumulative distribution gives; log-probabilities agree."""
    for index, (token, logprob, top) in enumerate(zip(told.tokens, told.logprobs, told.top, strict=True)):
        generated = told.tokens[:index]
        expected = expected_scores(setting, prompt, generated).double().log_softmax(0)
        assert logprob == pytest.approx(float(expected[token]), abs=1e-5)
        if setting.temperature == 0:
            assert token == int(expected.argmax())
        else:
            number = uniform_numbers(np.array([seed]), np.array([len(prompt) + index]))[0]
            ends = expected.exp().cumsum(0).tolist()
            assert (ends[token - 1] if token else 0) - 1e-5 <= number <= ends[token] + 1e-5
        best, ids = expected.sort(descending=True, stable=True)
        count = min(setting.top_n_tokens, int((expected > -math.inf).sum()))
        assert [token for token, _ in top] == ids[:count].tolist()
        assert [value for _, value in top] == pytest.approx(best[:count].tolist(), abs=1e-5)


def test_all_at_once_alone_and_after_a_preemption(tmp_path: Path) -> None:
    """Counts and seeds go on where they were; neighbours with other parameters change nothing."""
    driver = Driver(tmp_path)
    texts = {number: prompt_of(number) for number in range(1, len(SETTINGS) + 1)}
    starts = [
        SETTINGS[number - 1].sequence(number, prompt, len(prompt), seed=number) for number, prompt in texts.items()
    ]
    driver.run(starts[:5])
    for _ in range(3):
        driver.run()
    driver.run(starts[5:])
    driver.run()
    # All leave, and some come back in another order, so on other rows.
    back = [5, 10, 2, 11, 4, 7, 1]
    driver.run(removed=list(texts))
    for number in back:
        prompt, told = texts[number], driver.told[number]
        driver.run([SETTINGS[number - 1].sequence(100 + number, prompt + told.tokens, len(prompt), seed=number)])
        told.tokens += driver.told[100 + number].tokens
        told.logprobs += driver.told[100 + number].logprobs
        told.top += driver.told[100 + number].top
        driver.told.pop(100 + number)
    for _ in range(3):
        driver.run()
    for number in back:
        more = driver.told[100 + number]
        told = driver.told[number]
        told.tokens, told.logprobs, told.top = (
            told.tokens + more.tokens, told.logprobs + more.logprobs, told.top + more.top
        )  # fmt: skip
    for number, prompt in texts.items():
        assert len(driver.told[number].tokens) >= 2
        check(SETTINGS[number - 1], prompt, number, driver.told[number])
    # The same alone, in a batch of its own.
    for number in (4, 5, 10, 11):
        alone = Driver(tmp_path)
        alone.run([SETTINGS[number - 1].sequence(1, texts[number], len(texts[number]), seed=number)])
        for _ in driver.told[number].tokens[1:]:
            alone.run()
        assert alone.told[1].tokens == driver.told[number].tokens


def definition(setting: Setting, prompt: list[int], generated: list[int]) -> np.ndarray:
    """The probabilities in float64, from what each parameter is said to do."""
    changes = setting.changes or LogitsChanges()
    logits = MODEL.logits_after(prompt + generated)[0].double().numpy().copy()
    for token, bias in setting.biases.items():
        logits[token] += bias
    if changes.has_watermark:
        generator = torch.Generator().manual_seed(15485863 * generated[-1])
        logits[torch.randperm(VOCAB_SIZE, generator=generator)[: VOCAB_SIZE // 2]] += 2.0
    for token in {*prompt, *generated}:
        factor = changes.repetition_penalty
        logits[token] = logits[token] / factor if logits[token] > 0 else logits[token] * factor
    for token in range(VOCAB_SIZE):
        count = generated.count(token)
        logits[token] -= changes.frequency_penalty * count + changes.presence_penalty * (count > 0)
        logits[token] -= changes.share_penalty * (prompt + generated).count(token) / len(prompt + generated)
    if len(generated) < changes.min_tokens:
        logits[changes.banned_token_ids] = -np.inf
    logits /= setting.temperature
    p = np.exp(logits - logits.max())
    if setting.top_k:
        p[p < np.sort(p)[-setting.top_k]] = 0
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    p[order[np.cumsum(p[order]) - p[order] >= setting.top_p]] = 0
    p[p < setting.min_p * p.max()] = 0
    p /= p.sum()
    if setting.typical_p < 1:
        with np.errstate(divide="ignore"):
            surprise = -np.log(p)
        distance = np.abs(surprise - np.sum(p[p > 0] * surprise[p > 0]))
        order = np.argsort(distance, kind="stable")
        p[order[np.cumsum(p[order]) - p[order] >= setting.typical_p]] = 0
    return p / p.sum()


ALONE = [
    Setting(changes=LogitsChanges(repetition_penalty=1.7)),
    Setting(changes=LogitsChanges(frequency_penalty=1.5)),
    Setting(changes=LogitsChanges(presence_penalty=2.0)),
    Setting(changes=LogitsChanges(share_penalty=-2.0)),
    Setting(changes=LogitsChanges(has_watermark=True)),
    Setting(biases={5: 4.0, 20: 3.0, 1: -100.0}),
    Setting(changes=LogitsChanges(banned_token_ids=ints(*ENDS), min_tokens=9)),
    Setting(temperature=0.9, top_p=0.9, changes=replace(PENALISED, banned_token_ids=ints(*ENDS), min_tokens=9)),
]


@pytest.mark.parametrize(
    "setting",
    [
        Setting(temperature=0.6),
        Setting(temperature=1.8, top_k=9),
        Setting(top_p=0.7),
        Setting(temperature=1.5, min_p=0.1),
        Setting(temperature=1.5, typical_p=0.6),
        Setting(temperature=1.4, top_k=40, top_p=0.95, min_p=0.01, typical_p=0.95, changes=PENALISED, biases={8: 2.5}),
        *(pytest.param(setting, marks=pytest.mark.slow) for setting in ALONE),
    ],
)
def test_frequencies_follow_the_definition(setting: Setting, tmp_path: Path) -> None:
    """20 000 sequences of one text that differ in their seeds alone."""
    count, prompt, generated = 20_000, [4, 8, 15], [16, 23, 4, 4]
    runner = make_runner(tmp_path, count, count * 7)
    new = tuple(setting.sequence(number, prompt + generated, 3, seed=number * 7919) for number in range(1, count + 1))
    numbers = np.arange(1, count + 1, dtype=np.int32)
    result = runner.run_step(
        StepPlan(1, ints(), new, prefill_sequence_ids=numbers, prefill_num_tokens=ints(*[7] * count))
    )
    expected = definition(setting, prompt, generated) * count
    counts = np.bincount(result.token_ids, minlength=VOCAB_SIZE)
    assert counts[expected == 0].sum() == 0
    # The test wants five of each kind; rarer tokens count together.
    is_rare = expected < 5
    if is_rare.any():
        counts = np.append(counts[~is_rare], counts[is_rare].sum())
        expected = np.append(expected[~is_rare], expected[is_rare].sum())
    is_possible = expected > 0
    assert is_possible.sum() > 2
    counts, expected = counts[is_possible], expected[is_possible]
    statistic = torch.tensor(((counts - expected) ** 2 / expected).sum())
    degrees = torch.tensor(len(expected) - 1.0, dtype=torch.float64)
    assert float(torch.special.gammaincc(degrees / 2, statistic / 2)) >= 1e-4
