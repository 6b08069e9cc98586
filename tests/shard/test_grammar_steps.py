"""Steps of sequences with grammars on a CPU, over a model that is a formula: the best token of those allowed."""

import gc
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from text_generation_shard.cpu_execution import CpuExecution
from text_generation_shard.kv_cache import KvLayout
from text_generation_shard.model_runner import ModelInfo, ModelRunner
from text_generation_shard.progress import ProgressFile
from text_generation_shard.step import NewSequence, StepPlan, StepResult
from text_generation_shard.warm_up import KvBudget, WarmUpLimits

VOCAB_SIZE = 50
EOS = 49
# Ids 0 to 48 are the bytes from "!" on: a digit d is id 15 + d.
TOKENS = [bytes([0x21 + token]) for token in range(EOS)] + [b""]
DIGITS = set(range(15, 25))
LIMITS = WarmUpLimits(max_step_tokens=24, max_num_sequences=6, max_sequence_length=0, max_kv_tokens=0)
LAYOUT = KvLayout(num_layers=1, num_kv_heads=1, head_dim=2, dtype=torch.float32)
# One or more groups of two marks below "0" and a digit.
PATTERN = "([!-/]{2}[0-9])+"
MARKS = set(range(15))


class Formula:
    """After token t at position p the best token is (3 t + p) mod 50, with logit 2 over zeros."""

    def __call__(
        self, input_ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor | None = None
    ) -> torch.Tensor:
        hidden = torch.stack((input_ids, positions), dim=1)
        return hidden if rows is None else hidden[rows]

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(len(hidden), VOCAB_SIZE)
        return logits.scatter_(1, ((3 * hidden[:, 0] + hidden[:, 1]) % VOCAB_SIZE).unsqueeze(1), 2.0)


def allowed(generated: list[int]) -> set[int]:
    if len(generated) % 3 == 2:
        return DIGITS
    return MARKS | ({EOS} if generated and len(generated) % 3 == 0 else set())


def expected(prompt: list[int], count: int) -> list[int]:
    """The best token of those allowed; the lowest where all are equal. No text here ends."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + count:
        choices = allowed(tokens[len(prompt) :])
        best = (3 * tokens[-1] + len(tokens) - 1) % VOCAB_SIZE
        tokens.append(best if best in choices else min(choices))
    assert EOS not in tokens
    return tokens[len(prompt) :]


def grammar(pattern: str = PATTERN) -> str:
    source = '%llguidance {"no_forcing": true}\nstart: /' + pattern.replace("/", r"\/") + "/"
    return json.dumps({"grammars": [{"lark_grammar": source}]})


@pytest.fixture(autouse=True)
def _restore_gc() -> Iterator[None]:
    yield
    gc.enable()
    gc.unfreeze()


@pytest.fixture
def runner(tmp_path: Path) -> ModelRunner:
    info = ModelInfo("cpu", VOCAB_SIZE, max_position_embeddings=64)
    budget = KvBudget(cpu_bytes=10 * LAYOUT.bytes_per_block)
    runner = ModelRunner(CpuExecution(Formula()), info, LAYOUT, budget, torch.device("cpu"), ProgressFile(tmp_path, 0))
    runner.warm_up(LIMITS)
    assert runner.grammars is not None
    runner.grammars.load(TOKENS, [EOS])
    return runner


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def sequence(
    number: int, prompt: list[int], text: str = "", generated: tuple[int, ...] = (), **sampling: float
) -> NewSequence:
    tokens = ints(*prompt, *generated)
    return NewSequence(number, tokens, len(prompt), 0, ints(number), grammar=text, **sampling)  # type: ignore[arg-type]


def plan(
    step: int, *new: NewSequence, prefills: dict[int, int] | None = None, removed: tuple[int, ...] = ()
) -> StepPlan:
    prefills = {one.sequence_id: len(one.token_ids) for one in new} if prefills is None else prefills
    return StepPlan(
        step,
        removed_sequence_ids=ints(*removed),
        new_sequences=new,
        prefill_sequence_ids=ints(*prefills),
        prefill_num_tokens=ints(*prefills.values()),
    )


def tokens_of(result: StepResult) -> dict[int, int]:
    return dict(zip(result.sequence_ids.tolist(), result.token_ids.tolist(), strict=True))


def test_the_best_allowed_token_beside_rows_without_a_grammar(runner: ModelRunner) -> None:
    first, second, free = [5], [7, 8, 9, 3], [9]
    results = [runner.run_step(plan(1, sequence(1, first, grammar()), sequence(2, free)))]
    results.append(runner.run_step(plan(2, sequence(3, second, grammar()))))
    results += [runner.run_step(plan(step)) for step in range(3, 9)]
    assert [tokens_of(result)[1] for result in results] == expected(first, 8)
    assert [tokens_of(result)[3] for result in results[1:]] == expected(second, 7)
    unbound = [9]
    while len(unbound) < 9:
        unbound.append((3 * unbound[-1] + len(unbound) - 1) % VOCAB_SIZE)
    assert [tokens_of(result)[2] for result in results] == unbound[1:]
    assert all(not result.failures and result.mask_ns > 0 for result in results)


def test_a_prompt_in_chunks_then_a_preemption(runner: ModelRunner) -> None:
    prompt = [7, 8, 9, 3]
    runner.run_step(plan(1, sequence(1, prompt, grammar()), prefills={1: 3}))
    generated = [tokens_of(runner.run_step(plan(2, prefills={1: 1})))[1]]
    generated += [tokens_of(runner.run_step(plan(step)))[1] for step in (3, 4)]
    runner.run_step(plan(5, removed=(1,)))
    returned = sequence(1, prompt, grammar(), tuple(generated))
    runner.run_step(plan(6, returned, prefills={1: 5}))
    generated.append(tokens_of(runner.run_step(plan(7, prefills={1: 2})))[1])
    generated += [tokens_of(runner.run_step(plan(step)))[1] for step in (8, 9)]
    assert generated == expected(prompt, 6)


def test_a_random_token_is_one_of_those_allowed(runner: ModelRunner) -> None:
    """Same seed, same tokens, also after a preemption; other seeds, others."""
    runs = []
    for number, seed in enumerate((5, 5, 6), 1):
        prompt, sampling = [7], dict(temperature=2.0, seed=seed)
        generated: list[int] = []
        step = 10 * number
        result = runner.run_step(plan(step, sequence(number, prompt, grammar(), **sampling)))
        for _ in range(8):
            token = tokens_of(result)[number]
            assert token in allowed(generated)
            if token == EOS:
                break
            generated.append(token)
            if number == 2 and len(generated) == 4:
                runner.run_step(plan(step + 20, removed=(number,)))
                new = sequence(number, prompt, grammar(), tuple(generated), **sampling)
                result = runner.run_step(plan(step + 21, new))
            else:
                result = runner.run_step(plan(step + 30))
        runs.append(generated)
        runner.run_step(plan(step + 40, removed=(number,)))
    assert runs[0] == runs[1] != runs[2]


def test_a_grammar_that_cannot_go_on_fails_its_request_alone(runner: ModelRunner) -> None:
    """The neighbours keep their tokens, and the step planned meanwhile does no harm."""
    bad = sequence(2, [7], grammar(), generated=(EOS - 1,))  # what was generated is against the grammar
    result = runner.run_step(plan(1, sequence(1, [7, 8], grammar()), bad, sequence(3, [9], "no grammar at all")))
    assert sorted(result.failures) == [2, 3]
    assert "cannot go on" in result.failures[2]
    assert "cannot be followed" in result.failures[3]
    tokens = [tokens_of(result)]
    tokens += [tokens_of(runner.run_step(plan(2))), tokens_of(runner.run_step(plan(3, removed=(2, 3))))]
    assert tokens == [{1: token} for token in expected([7, 8], 3)]


def test_a_cleared_batch_follows_nothing(runner: ModelRunner) -> None:
    runner.run_step(plan(1, sequence(1, [7, 8], grammar())))
    runner.clear()
    result = runner.run_step(plan(1, sequence(1, [7])))
    assert tokens_of(result) == {1: 21}
    assert result.mask_ns == 0
