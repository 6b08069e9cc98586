"""The GPU's way to run steps, two under way at a time, against transformers recomputing each token from scratch.

Under Triton's interpreter a recorder that runs launches anew stands for CUDA graphs; on a GPU they are real ones.
"""

import gc
import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from text_generation_kernels import reference_sampling as reference
from text_generation_kernels.attention_settings import AttentionShape
from text_generation_kernels.shared_prefix import SharedPrefix, find_shared_prefixes
from text_generation_shard import gpu_execution
from text_generation_shard.cuda_graphs import CudaRecorder, Launch, Recorder
from text_generation_shard.gpu_execution import GpuExecution, GpuModel
from text_generation_shard.kv_cache import KvLayout
from text_generation_shard.model_config import load_model_config
from text_generation_shard.model_runner import ModelInfo, ModelRunner, StepInFlight
from text_generation_shard.progress import ProgressFile
from text_generation_shard.step import LogitsChanges, NewSequence, StepPlan, StepResult
from text_generation_shard.warm_up import KvBudget, WarmUpLimits
from text_generation_shard.weights import load_model
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    WatermarkLogitsProcessor,
)

# Attention leaves the rows of padding as it found them; the numbers there may be anything, and nobody reads them.
pytestmark = [pytest.mark.interpreted, pytest.mark.filterwarnings("ignore::RuntimeWarning")]

CONFIG = LlamaConfig(
    vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=64, max_position_embeddings=64, tie_word_embeddings=False,
    bos_token_id=None, eos_token_id=None,
)  # fmt: skip
NAN_TOKEN = 95
NUM_BLOCKS, BLOCK_SIZE = 12, 16
LIMITS = WarmUpLimits(max_step_tokens=40, max_num_sequences=6, max_sequence_length=64, max_kv_tokens=NUM_BLOCKS * 16)


@pytest.fixture(autouse=True)
def _restore_gc() -> Iterator[None]:
    yield
    gc.enable()
    gc.unfreeze()


@pytest.fixture(scope="module")
def transformers_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0.0, parameter.shape[1] ** -0.5)
        # Sequences that hold this token have no finite logits; nothing chooses it.
        model.get_input_embeddings().weight[NAN_TOKEN] = torch.nan
        model.lm_head.weight[NAN_TOKEN] = 0.0
    return model


@pytest.fixture(scope="module")
def folder(transformers_model: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    transformers_model.save_pretrained(folder)
    return folder


class CountingRecorder:
    """Stands for a GPU's: repeats the launches, and counts how often."""

    def __init__(self) -> None:
        self.num_replays = 0

    def record(self, launch: Launch) -> Launch:
        launch()

        def replay() -> None:
            self.num_replays += 1
            launch()

        return replay


@dataclass
class Driver:
    """Sends plans as a router does: the next one before the last one's result is there."""

    runner: ModelRunner
    recorder: Recorder
    step: int = 0
    in_flight: deque[StepInFlight] = field(default_factory=deque)
    tokens: dict[int, list[int]] = field(default_factory=dict)
    logprobs: dict[int, list[float]] = field(default_factory=dict)
    top: dict[int, list[list[int]]] = field(default_factory=dict)  # most likely tokens
    prompt_logprobs: dict[int, dict[int, float]] = field(default_factory=dict)  # by position
    failures: dict[int, str] = field(default_factory=dict)

    def send(
        self,
        new: Sequence[NewSequence] = (),
        prefill: dict[int, int] | None = None,
        removed: Sequence[int] = (),
        grown: dict[int, list[int]] | None = None,
    ) -> None:
        self.step += 1
        grown, prefill = grown or {}, prefill or {}
        plan = StepPlan(
            self.step,
            removed_sequence_ids=ints(*removed),
            new_sequences=tuple(new),
            grown_sequence_ids=ints(*grown),
            grown_num_blocks=ints(*(len(blocks) for blocks in grown.values())),
            grown_block_ids=ints(*(block for blocks in grown.values() for block in blocks)),
            prefill_sequence_ids=ints(*prefill),
            prefill_num_tokens=ints(*prefill.values()),
        )
        self.in_flight.append(self.runner.launch(plan))
        if len(self.in_flight) == 2:
            self.receive()

    def receive(self) -> StepResult:
        result = self.runner.finish(self.in_flight.popleft())
        rows = zip(result.sequence_ids.tolist(), result.token_ids.tolist(), result.logprobs.tolist(), strict=True)
        for sequence_id, token, logprob in rows:
            self.tokens.setdefault(sequence_id, []).append(token)
            self.logprobs.setdefault(sequence_id, []).append(logprob)
        if (top := result.top_tokens) is not None:
            pieces = np.split(top.token_ids, np.cumsum(top.num_tokens)[:-1])
            for sequence_id, piece in zip(result.sequence_ids.tolist(), pieces, strict=True):
                self.top.setdefault(sequence_id, []).append(piece.tolist())
        if (scores := result.prompt_scores) is not None:
            pieces = np.split(scores.logprobs, np.cumsum(scores.num_tokens)[:-1])
            starts = zip(scores.sequence_ids.tolist(), scores.first_positions.tolist(), pieces, strict=True)
            for sequence_id, position, piece in starts:
                self.prompt_logprobs.setdefault(sequence_id, {}).update(enumerate(piece.tolist(), position))
        self.failures |= result.failures
        return result

    def drain(self) -> None:
        while self.in_flight:
            self.receive()


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def sequence(number: int, tokens: list[int], blocks: list[int], computed: int = 0, **others: object) -> NewSequence:
    return NewSequence(number, ints(*tokens), len(tokens), computed, ints(*blocks), **others)  # type: ignore[arg-type]


def prompt(number: int, length: int) -> list[int]:
    return np.random.default_rng(number).integers(0, NAN_TOKEN, length).tolist()


@pytest.fixture(scope="module")
def load(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[torch.device], tuple[ModelRunner, Any]]:
    """Loads and warms up the model at its first call."""
    return cache(lambda device: load_runner(folder, device, tmp_path_factory.mktemp("run")))


@pytest.fixture
def start(load: Callable[[torch.device], tuple[ModelRunner, Any]], device: torch.device) -> Callable[[], Driver]:
    """An empty batch on empty KV memory; called in the test, which alone is sure to run where kernels do."""

    @torch.inference_mode()
    def start_driver() -> Driver:
        runner, recorder = load(device)
        runner.clear()
        for tensor in (tensor for layer in runner._kv_caches for tensor in layer):
            tensor.zero_()
        if isinstance(recorder, CountingRecorder):
            recorder.num_replays = 0
        return Driver(runner, recorder)

    return start_driver


def load_runner(folder: Path, device: torch.device, run_folder: Path) -> tuple[ModelRunner, Recorder]:
    recorder: Recorder = CudaRecorder(device) if device.type == "cuda" else CountingRecorder()
    config = load_model_config(str(folder))
    model = load_model(config, [folder / "model.safetensors"], torch.float32, device)
    shape = AttentionShape(2, 1, 64, BLOCK_SIZE, torch.float32)
    gpu_model = GpuModel(model, shape, config.hidden_size, torch.float32, config.sliding_windows)  # type: ignore[arg-type]
    execution = GpuExecution(gpu_model, device, recorder, sizes=(1, 2, 4, 16, 24))
    layout = KvLayout(config.num_layers, 1, 64, torch.float32, BLOCK_SIZE)
    budget = KvBudget(cpu_bytes=NUM_BLOCKS * layout.bytes_per_block)
    info = ModelInfo("device", CONFIG.vocab_size, CONFIG.max_position_embeddings)
    runner = ModelRunner(execution, info, layout, budget, device, ProgressFile(run_folder, 0))
    assert runner.warm_up(LIMITS) == NUM_BLOCKS
    return runner, recorder


@torch.inference_mode()
def greedy(model: LlamaForCausalLM, tokens: list[int], count: int) -> tuple[list[int], list[float]]:
    chosen, logprobs = list(tokens), []
    for _ in range(count):
        logits = model(torch.tensor([chosen]), use_cache=False).logits[0, -1].double()
        chosen.append(int(logits.argmax()))
        logprobs.append(float(logits.log_softmax(0).max()))
    return chosen[len(tokens) :], logprobs


SAMPLING: tuple[tuple[str, float], ...] = (
    ("temperature", 0.0), ("top_k", 0), ("top_p", 1.0), ("min_p", 0.0), ("typical_p", 1.0), ("seed", 0),
)  # fmt: skip


@torch.inference_mode()
def sample_tokens(
    model: LlamaForCausalLM,
    tokens: list[int],
    count: int,
    allows: Callable[[list[int]], set[int]] | None = None,
    **sampling: float,
) -> tuple[list[int], list[float]]:
    """Tokens chosen by the reference; among those that a grammar allows, until one ends the text."""
    chosen, logprobs = list(tokens), []
    columns = [torch.tensor([sampling.get(name, default)]) for name, default in SAMPLING]
    while len(chosen) < len(tokens) + count and (allows is None or chosen[-1] != EOS):
        logits = model(torch.tensor([chosen]), use_cache=False).logits[:, -1]
        if allows is not None:
            logits[:, list(set(range(96)) - allows(chosen[len(tokens) :]))] = float("-inf")
        token, logprob = reference.sample(logits, *columns, torch.tensor([len(chosen)]))
        chosen.append(int(token))
        logprobs.append(float(logprob))
    return chosen[len(tokens) :], logprobs


@pytest.mark.parametrize("min_shared", [gpu_execution.MIN_SHARED_TOKENS, BLOCK_SIZE])
def test_greedy_tokens_equal_transformers(
    min_shared: int,
    start: Callable[[], Driver],
    transformers_model: LlamaForCausalLM,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Chunks, decodes, a prefix hit, a preemption and an end, each while another step is under way.

    Decodes behind the same prefix read it each by itself, and as a group.
    """
    groups: list[SharedPrefix] = []

    def find(*arguments: Any) -> list[SharedPrefix]:
        found = find_shared_prefixes(*arguments)
        groups.extend(found)
        return found

    monkeypatch.setattr(gpu_execution, "MIN_SHARED_TOKENS", min_shared)
    monkeypatch.setattr(gpu_execution, "find_shared_prefixes", find)
    driver = start()
    first, second = prompt(1, 31), prompt(2, 3)
    third = first[:16] + prompt(3, 2)  # its first block is the first sequence's
    driver.send([sequence(1, first, [0, 1]), sequence(2, second, [2])], prefill={1: 13, 2: 3})
    driver.send(prefill={1: 18})
    driver.send([sequence(3, third, [0, 3], computed=16)], prefill={3: 2})
    driver.send(grown={1: [4]})
    driver.send()
    driver.send(removed=[2])  # preempted, with a token still to come
    driver.send()
    returned = second + driver.tokens[2]
    driver.send([sequence(2, returned, [5])], prefill={2: len(returned)})
    driver.send()
    driver.send(removed=[1])
    driver.send(removed=[3])
    driver.drain()
    assert driver.failures == {}
    for number, tokens, count in ((1, first, 8), (2, second, 9), (3, third, 8)):
        expected, logprobs = greedy(transformers_model, tokens, count)
        assert driver.tokens[number] == expected
        assert driver.logprobs[number] == pytest.approx(logprobs, abs=1e-4)
    assert [group.length for group in groups] == ([16] * len(groups) if min_shared == BLOCK_SIZE else [])
    assert len(groups) == (6 if min_shared == BLOCK_SIZE else 0)
    if isinstance(driver.recorder, CountingRecorder):
        # Each step's layers and each step's head.
        assert driver.recorder.num_replays == 2 * driver.step


@pytest.mark.parametrize(
    ("length", "is_recorded"),
    [(1, True), (4, True), (5, False), (16, True), (17, True), (24, True), (25, False)],
)
def test_edges_of_the_ladders(
    length: int, is_recorded: bool, start: Callable[[], Driver], transformers_model: LlamaForCausalLM
) -> None:
    """Layers are recorded for 1, 2 and 4 tokens of short queries and for 16 and 24 of any; others are launched anew."""
    driver, tokens = start(), prompt(length, length)
    driver.send([sequence(1, tokens, [4, 2, 7])], prefill={1: length})
    driver.send()
    driver.drain()
    assert driver.tokens[1] == greedy(transformers_model, tokens, 2)[0]
    if isinstance(driver.recorder, CountingRecorder):
        assert driver.recorder.num_replays == (4 if is_recorded else 3)


def test_a_batch_that_grows_and_shrinks(start: Callable[[], Driver], transformers_model: LlamaForCausalLM) -> None:
    """One sequence more in each step, then one fewer, so that steps take every recorded size and others between.

    At random: a token that another row, or padding, left in a sequence's place would lead elsewhere.
    """
    driver, prompts = start(), {number: prompt(number, number) for number in range(1, 7)}
    how = {number: dict(temperature=1.5, seed=number, top_k=5) for number in prompts}
    for number, tokens in prompts.items():
        driver.send([sequence(number, tokens, [number], **how[number])], prefill={number: number})
    for number in prompts:
        driver.send(removed=[number])  # with a token still to come
    driver.drain()
    for number, tokens in prompts.items():
        assert driver.tokens[number] == sample_tokens(transformers_model, tokens, 6, **how[number])[0]


def test_nothing_is_written_but_to_slots_of_the_steps_tokens(start: Callable[[], Driver]) -> None:
    driver = start()
    new = [sequence(1, prompt(1, 5), [3]), sequence(2, prompt(2, 17), [7, 5]), sequence(3, prompt(3, 1), [9])]
    driver.send(new, prefill={1: 5, 2: 17, 3: 1})  # padded to 24 tokens, and the decodes to 4
    for _ in range(3):
        driver.send()
    driver.drain()
    written = {(3, offset) for offset in range(8)} | {(7, offset) for offset in range(16)}
    written |= {(block, offset) for block in (5, 9) for offset in range(4)}
    for tensor in (one for layer in driver.runner._kv_caches for one in layer):
        places = tensor.abs().sum(dim=(1, 3)).nonzero().tolist()
        assert {tuple(place) for place in places} == written


def test_seeded_tokens_do_not_depend_on_neighbours(start: Callable[[], Driver]) -> None:
    driver = start()
    mine = dict(temperature=1.0, seed=2**63 + 5, top_k=40, top_p=0.95)
    driver.send([sequence(1, prompt(1, 9), [0], **mine)], prefill={1: 9})
    for _ in range(3):
        driver.send()
    driver.send(removed=[1])
    others = [sequence(10 + n, prompt(n, 4), [2 + n], temperature=0.7 * n, seed=n) for n in range(2)]
    driver.send([*others, sequence(2, prompt(1, 9), [0], **mine)], prefill={10: 4, 11: 4, 2: 9})
    for _ in range(3):
        driver.send()
    driver.drain()
    assert driver.tokens[2] == driver.tokens[1]
    assert len(set(driver.tokens[1])) > 2


def test_a_row_that_is_not_finite_fails_alone(
    start: Callable[[], Driver], transformers_model: LlamaForCausalLM
) -> None:
    driver, healthy = start(), prompt(4, 6)
    driver.send([sequence(1, healthy, [0]), sequence(2, [5, NAN_TOKEN], [1])], prefill={1: 6, 2: 2})
    driver.send()
    driver.send()
    driver.send([sequence(3, healthy, [2])], prefill={3: 6}, removed=[2])
    driver.send(removed=[1])
    driver.drain()
    assert list(driver.failures) == [2]
    assert 2 not in driver.tokens
    expected, _ = greedy(transformers_model, healthy, 4)
    assert driver.tokens[1] == expected
    assert driver.tokens[3] == expected[:2]


# Grammars: ids 0 to 93 are the bytes from "!" on, 94 ends a text.
EOS = 94
TOKENS = [bytes([0x21 + token]) for token in range(EOS)] + [b"", b""]
LETTERS, DIGITS = set(range(0x41 - 0x21, 0x4E - 0x21)), set(range(15, 25))


def grammar(pattern: str = "([A-M]{2}[0-9])+") -> str:
    source = '%llguidance {"no_forcing": true}\nstart: /' + pattern + "/"
    return json.dumps({"grammars": [{"lark_grammar": source}]})


def allowed(generated: list[int]) -> set[int]:
    if len(generated) % 3 == 2:
        return DIGITS
    return LETTERS | ({EOS} if generated and len(generated) % 3 == 0 else set())


def test_grammars_hold_while_another_step_is_under_way(
    start: Callable[[], Driver], transformers_model: LlamaForCausalLM
) -> None:
    """Beside rows without one, in chunks, after a preemption; greedy and at random."""
    driver = start()
    driver.runner.grammars.load(TOKENS, [EOS])
    sampled = dict(temperature=1.5, seed=77)
    first, second, free = prompt(1, 20), prompt(2, 3), prompt(3, 4)
    new = [sequence(2, second, [2], grammar=grammar(), **sampled), sequence(3, free, [3])]
    driver.send([sequence(1, first, [0, 1], grammar=grammar()), *new], prefill={1: 7, 2: 3, 3: 4})
    driver.send(prefill={1: 13})
    driver.send()
    driver.send(removed=[2])  # preempted, with a token still to come
    driver.send()
    returned = NewSequence(2, ints(*second, *driver.tokens[2]), len(second), 0, ints(5), grammar=grammar(), **sampled)
    driver.send([returned], prefill={2: len(returned.token_ids)})
    for _ in range(3):
        driver.send()
    driver.drain()
    assert driver.failures == {}
    expected, logprobs = greedy(transformers_model, free, 9)
    assert driver.tokens[3] == expected
    assert driver.logprobs[3] == pytest.approx(logprobs, abs=1e-4)
    for number, tokens, count, parameters in ((1, first, 8, {}), (2, second, 7, sampled)):
        expected, logprobs = sample_tokens(transformers_model, tokens, count, allowed, **parameters)
        assert driver.tokens[number][: len(expected)] == expected
        assert driver.logprobs[number][: len(expected)] == pytest.approx(logprobs, abs=1e-4)


def test_a_grammar_that_cannot_go_on_fails_alone(
    start: Callable[[], Driver], transformers_model: LlamaForCausalLM
) -> None:
    driver, healthy = start(), prompt(4, 6)
    driver.runner.grammars.load(TOKENS, [EOS])
    bad = NewSequence(2, ints(*healthy, 0), len(healthy), 0, ints(1), grammar=grammar())
    driver.send([sequence(1, healthy, [0], grammar=grammar("[A-M]{20}")), bad], prefill={1: 6, 2: 7})
    driver.send()
    driver.send(removed=[2])
    driver.drain()
    assert list(driver.failures) == [2]
    assert "cannot go on" in driver.failures[2]
    assert 2 not in driver.tokens
    assert len(driver.tokens[1]) == 3
    assert set(driver.tokens[1]) <= LETTERS


@torch.inference_mode()
def changed(
    model: LlamaForCausalLM, tokens: list[int], generated: list[int], changes: LogitsChanges, is_lettered: bool = False
) -> torch.Tensor:
    """Logits after the generated tokens, changed by transformers' processors and by hand."""
    ids = torch.tensor([tokens + generated])
    scores = model(ids, use_cache=False).logits[:, -1].float()
    pairs = zip(changes.bias_token_ids.tolist(), changes.bias_values.tolist(), strict=True)
    if entries := [[[token], value] for token, value in pairs]:
        scores = SequenceBiasLogitsProcessor(entries)(ids, scores)
    if changes.has_watermark:
        scores = WatermarkLogitsProcessor(96, "cpu", greenlist_ratio=0.5, bias=2.0)(ids, scores)
    scores = RepetitionPenaltyLogitsProcessor(changes.repetition_penalty)(ids, scores)
    counts = torch.bincount(torch.tensor(generated, dtype=torch.int64), minlength=96)
    scores = scores - changes.frequency_penalty * counts - changes.presence_penalty * (counts > 0)
    scores = scores - changes.share_penalty * torch.bincount(ids[0], minlength=96) / ids.shape[1]
    if len(generated) < changes.min_tokens:
        scores[:, changes.banned_token_ids] = -torch.inf
    if is_lettered:
        excluded = [token for token in range(96) if token not in allowed(generated)]
        scores[:, excluded] = -torch.inf
    return scores


def test_changed_logits_and_what_is_told_beside_the_tokens(
    start: Callable[[], Driver], transformers_model: LlamaForCausalLM
) -> None:
    """Rows that change their logits in their own ways, beside one that does not; in chunks, after a preemption."""
    driver = start()
    driver.runner.grammars.load(TOKENS, [EOS])
    evens = ints(*range(0, 96, 2))
    biases = dict(bias_token_ids=ints(3, 5), bias_values=np.array([4.0, 3.0], np.float32))
    changes = {
        1: LogitsChanges(repetition_penalty=1.5, frequency_penalty=0.7),
        2: LogitsChanges(has_watermark=True, presence_penalty=0.5, banned_token_ids=evens, min_tokens=4, **biases),
        3: LogitsChanges(share_penalty=2.0, repetition_penalty=0.8),
        4: LogitsChanges(),
    }
    texts = {1: prompt(1, 20), 2: prompt(2, 5), 3: prompt(3, 4), 4: prompt(4, 6)}
    sampled = dict(temperature=1.5, seed=77)
    first = sequence(1, texts[1], [0, 1], changes=changes[1], top_n_tokens=3, scores_prompt=True, prompt_top_n_tokens=1)
    others = [
        sequence(2, texts[2], [2], changes=changes[2], **sampled),
        sequence(3, texts[3], [3], changes=changes[3], grammar=grammar(), top_n_tokens=2),
        sequence(4, texts[4], [4]),
    ]
    driver.send([first, *others], prefill={1: 7, 2: 5, 3: 4, 4: 6})
    driver.send(prefill={1: 13})
    driver.send(removed=[2])  # preempted, with a token still to come
    driver.send()
    known = ints(*texts[2], *driver.tokens[2])
    returned = NewSequence(2, known, 5, 0, ints(5), changes=changes[2], **sampled)
    driver.send([returned], prefill={2: len(known)})
    for _ in range(3):
        driver.send()
    driver.drain()
    assert driver.failures == {}
    for number, tokens in texts.items():
        for index, token in enumerate(driver.tokens[number]):
            scores = changed(transformers_model, tokens, driver.tokens[number][:index], changes[number], number == 3)
            if number == 2:
                columns = [torch.tensor([sampled.get(name, default)]) for name, default in SAMPLING]
                chosen, logprob = reference.sample(scores, *columns, torch.tensor([len(tokens) + index]))
                assert token == int(chosen)
                assert driver.logprobs[number][index] == pytest.approx(float(logprob), abs=1e-4)
                continue
            best = scores[0].log_softmax(0).sort(descending=True, stable=True)
            assert token == int(best.indices[0])
            assert driver.logprobs[number][index] == pytest.approx(float(best.values[0]), abs=1e-4)
            count = {1: 3, 3: 2, 4: 0}[number]
            assert driver.top[number][index] == best.indices[:count].tolist()
    assert all(len(tokens) >= 5 for tokens in driver.tokens.values())
    with torch.inference_mode():
        own = transformers_model(torch.tensor([texts[1]]), use_cache=False).logits[0].log_softmax(-1)
    expected = {place: float(own[place - 1, token]) for place, token in enumerate(texts[1]) if place}
    assert driver.prompt_logprobs == {1: pytest.approx(expected, abs=1e-4)}
