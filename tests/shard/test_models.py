"""Every family against transformers, logit by logit, on random weights: a CPU's way through the model, and a GPU's."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from text_generation_kernels.attention_settings import AttentionShape, attention_layout
from text_generation_kernels.attention_work import plan_attention
from text_generation_kernels.cpu_attention_plan import CpuAttentionPlan
from text_generation_kernels.paged_attention import AttentionWorkspace
from text_generation_shard.forward_context import ForwardContext, KernelAttentionPlan, forward_context
from text_generation_shard.kv_cache import KvCaches
from text_generation_shard.layers.cpu_linear import CpuLinear, cpu_linear
from text_generation_shard.model_config import ModelConfig, load_model_config
from text_generation_shard.weights import load_model
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

CPU = torch.device("cpu")
BLOCK_SIZE = 4
SMALL: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 101,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
# What a family's case becomes where kernels compute it: the smallest heads that they take.
FOR_KERNELS = {"hidden_size": 128, "head_dim": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "beta_fast": 4.0,
    "original_max_position_embeddings": 16,
}
CASES: dict[str, Callable[[], PretrainedConfig]] = {
    "llama2": lambda: LlamaConfig(**SMALL | {"num_key_value_heads": 6}),
    "llama3": lambda: LlamaConfig(**SMALL, tie_word_embeddings=True, rope_parameters=LLAMA3_ROPE),
    "llama-biases": lambda: LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True),
    "llama-linear": lambda: LlamaConfig(
        **SMALL, rope_parameters={"rope_type": "linear", "rope_theta": 100.0, "factor": 3.0}
    ),
    "llama-dynamic": lambda: LlamaConfig(
        **SMALL, rope_parameters={"rope_type": "dynamic", "rope_theta": 100.0, "factor": 3.0}
    ),
    "llama-yarn": lambda: LlamaConfig(**SMALL, rope_parameters=YARN_ROPE),
    "mistral": lambda: MistralConfig(**SMALL, sliding_window=6, head_dim=16),
    "qwen2": lambda: Qwen2Config(**SMALL, tie_word_embeddings=True),
    "qwen2-window": lambda: Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "qwen3": lambda: Qwen3Config(**SMALL, head_dim=32, tie_word_embeddings=True),
    "qwen3-biases": lambda: Qwen3Config(**SMALL, head_dim=8, attention_bias=True),
}


def random_model(config: PretrainedConfig) -> PreTrainedModel:
    """All weights random, those included that models start as 0 or 1."""
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            size = 0.5 if parameter.dim() == 1 else parameter.shape[1] ** -0.5
            parameter.normal_(0.0, size, generator=generator)
            if name.endswith("norm.weight"):
                parameter.add_(1.0)
    return model


class PagedBatch:
    """Some sequences over blocks in shuffled order, computed as many tokens at a time as one likes."""

    def __init__(
        self, model: torch.nn.Module, config: ModelConfig, sequences: list[list[int]], device: torch.device = CPU
    ) -> None:
        self.model, self.config, self.device = model, config, device
        self.sequences, self.num_computed = sequences, [0] * len(sequences)
        max_blocks = max(-(-len(tokens) // BLOCK_SIZE) for tokens in sequences)
        num_blocks = len(sequences) * max_blocks
        order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(1))
        self.tables = order.view(len(sequences), max_blocks).int()
        self.caches: KvCaches = [self.cache(num_blocks) for _ in range(config.num_layers)]
        self.logits: list[list[torch.Tensor]] = [[] for _ in sequences]

    def step(self, num_tokens: dict[int, int], last_of: tuple[int, ...] | None = None) -> torch.Tensor:
        """Compute the next tokens of some sequences in one forward pass; logits of all, or of some sequences' last."""
        ids, positions, slots, starts, lengths = [], [], [], [0], []
        for row, count in num_tokens.items():
            first, end = self.num_computed[row], self.num_computed[row] + count
            ids += self.sequences[row][first:end]
            positions += range(first, end)
            slots += [
                int(self.tables[row, position // BLOCK_SIZE]) * BLOCK_SIZE + position % BLOCK_SIZE
                for position in range(first, end)
            ]
            starts.append(len(ids))
            lengths.append(end)
            self.num_computed[row] = end
        plan = self.plan(
            self.tables[list(num_tokens)],
            np.array(starts, np.int32),
            np.array(lengths, np.int32),
            np.array(positions),
            np.array(slots),
        )
        with torch.inference_mode(), forward_context(ForwardContext(self.caches, plan)):
            ends = [starts[index + 1] - 1 for index, row in enumerate(num_tokens) if last_of is None or row in last_of]
            rows = None if last_of is None else torch.tensor(ends, dtype=torch.int64)
            inputs = torch.tensor([ids, positions], device=self.device)
            hidden = self.model(inputs[0], inputs[1], rows)
            logits: torch.Tensor = self.model.compute_logits(hidden)  # type: ignore[operator]
        for index, row in enumerate(num_tokens) if last_of is None else ():
            self.logits[row].append(logits[starts[index] : starts[index + 1]])
        return logits

    def cache(self, num_blocks: int) -> tuple[torch.Tensor, ...]:
        """A layer's, in which nothing was written yet."""
        shape = (num_blocks, BLOCK_SIZE, 2 * self.config.num_kv_heads, self.config.head_dim)
        return (torch.full(shape, torch.nan),)

    def plan(
        self, tables: torch.Tensor, starts: np.ndarray, lengths: np.ndarray, positions: np.ndarray, slots: np.ndarray
    ) -> CpuAttentionPlan | KernelAttentionPlan:
        """How attention goes about a step."""
        return CpuAttentionPlan(tables.numpy(), starts, lengths, positions, slots, self.caches[0][0])


class KernelBatch(PagedBatch):
    """The same by kernels, as on a GPU."""

    def cache(self, num_blocks: int) -> tuple[torch.Tensor, ...]:
        """A layer's, in which nothing was written yet."""
        shape = (num_blocks, self.config.num_kv_heads, BLOCK_SIZE, self.config.head_dim)
        return tuple(torch.full(shape, torch.nan, device=self.device) for _ in range(2))

    def plan(
        self, tables: torch.Tensor, starts: np.ndarray, lengths: np.ndarray, positions: np.ndarray, slots: np.ndarray
    ) -> CpuAttentionPlan | KernelAttentionPlan:
        """One workspace for each sliding window."""
        config, workspaces = self.config, {}
        shape = AttentionShape(config.num_heads, config.num_kv_heads, config.head_dim, BLOCK_SIZE, torch.float32)
        layout = attention_layout(shape, self.device, len(positions), len(tables), has_prompts=True)
        for window in set(config.sliding_windows):
            work = torch.zeros(layout.size, dtype=torch.int32)
            plan_attention(layout, work.numpy(), starts, lengths, window)
            workspaces[window] = AttentionWorkspace(
                layout, config.num_kv_heads, config.head_dim, self.device, work.to(self.device)
            )
        slot_mapping = torch.tensor(slots, dtype=torch.int32, device=self.device)
        return KernelAttentionPlan(slot_mapping, tables.to(self.device), workspaces)


def random_ids(count: int, seed: int) -> list[int]:
    return torch.randint(101, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture(params=CASES)
def models(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[PreTrainedModel, torch.nn.Module, ModelConfig]:
    reference = random_model(CASES[request.param]())
    reference.save_pretrained(tmp_path)
    config = load_model_config(tmp_path)
    model = load_model(config, sorted(tmp_path.glob("*.safetensors")), torch.float32, torch.device("cpu"))
    return reference, model, config


def test_equals_transformers_whole_chunked_and_decoding(
    models: tuple[PreTrainedModel, torch.nn.Module, ModelConfig],
) -> None:
    reference, model, config = models
    sequences = [random_ids(23, 1), random_ids(17, 2), random_ids(9, 3)]
    batch = PagedBatch(model, config, sequences)
    batch.step({0: 15})  # a whole prompt
    batch.step({0: 1, 1: 6})  # a decode beside a chunk
    batch.step({1: 5, 0: 1, 2: 9})  # the next chunk, a decode, another whole prompt
    while batch.num_computed[1] < 17:
        batch.step({row: 1 for row in (1, 0)})
    assert batch.num_computed == [23, 17, 9]
    for tokens, logits in zip(sequences, batch.logits, strict=True):
        with torch.no_grad():
            expected = reference(torch.tensor([tokens])).logits[0]
        assert expected.std() > 0.1
        torch.testing.assert_close(torch.cat(logits), expected, atol=1e-4, rtol=1e-4)


def test_rows_that_are_asked_for_and_the_keys_of_the_others_equal_transformers(
    models: tuple[PreTrainedModel, torch.nn.Module, ModelConfig],
) -> None:
    reference, model, config = models
    sequences = [random_ids(23, 1), random_ids(17, 2), random_ids(9, 3)]
    batch = PagedBatch(model, config, sequences)
    assert batch.step({0: 15, 2: 4}, last_of=()).shape == (0, config.vocab_size)  # chunks; no prompt ends
    logits = [*batch.step({0: 8, 2: 4, 1: 17}, last_of=(1, 0)), batch.step({2: 1})[0]]
    assert batch.num_computed == [23, 17, 9]
    for tokens, found in zip(sequences, logits, strict=True):
        with torch.no_grad():
            expected = reference(torch.tensor([tokens])).logits[0, -1]
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_a_torch_without_torchscript_can_import_the_layers() -> None:
    code = "import torch; del torch.jit.script, torch.jit.ignore; import text_generation_shard.layers.cpu_decoder"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("has_torchscript", [True, False])
def test_layers_without_python_between_operations_where_torch_can(
    has_torchscript: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_torchscript:
        monkeypatch.delattr(torch.jit, "script")
    products = []

    def noted(x: torch.Tensor, linear: CpuLinear) -> torch.Tensor:
        products.append(len(x))
        return cpu_linear(x, linear)

    reference = random_model(CASES["qwen3"]())
    reference.save_pretrained(tmp_path)
    config = load_model_config(tmp_path)
    model = load_model(config, sorted(tmp_path.glob("*.safetensors")), torch.float32, torch.device("cpu"))
    tokens = random_ids(23, 1)
    batch = PagedBatch(model, config, [tokens])
    batch.step({0: 20})  # now it is compiled
    monkeypatch.setattr("text_generation_shard.layers.cpu_decoder.cpu_linear", noted)
    for _ in range(3):
        batch.step({0: 1})
    assert len(products) == (0 if has_torchscript else 3 * 4 * config.num_layers)
    with torch.no_grad():
        expected = reference(torch.tensor([tokens])).logits[0]
    torch.testing.assert_close(torch.cat(batch.logits[0]), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.interpreted
@pytest.mark.parametrize("case", CASES)
def test_kernels_equal_transformers(case: str, device: torch.device, tmp_path: Path) -> None:
    sizes = CASES[case]()
    sizes.update(FOR_KERNELS | {"num_key_value_heads": 2 if case == "llama2" else 1})
    if getattr(sizes, "layer_types", None):
        sizes.layer_types = sizes.layer_types[: sizes.num_hidden_layers]
    reference = random_model(sizes)
    reference.save_pretrained(tmp_path)
    config = load_model_config(tmp_path)
    model = load_model(config, sorted(tmp_path.glob("*.safetensors")), torch.float32, device)
    sequences = [random_ids(20, 1), random_ids(8, 2)]
    batch = KernelBatch(model, config, sequences, device)
    batch.step({0: 19, 1: 7})
    batch.step({0: 1, 1: 1})
    for tokens, logits in zip(sequences, batch.logits, strict=True):
        with torch.no_grad():
            expected = reference(torch.tensor([tokens])).logits[0]
        assert expected.std() > 0.1
        torch.testing.assert_close(torch.cat(logits).cpu(), expected, atol=1e-4, rtol=1e-4)


def test_every_family_has_a_case() -> None:
    from text_generation_shard.models import REGISTRY

    assert {build().model_type for build in CASES.values()} == set(REGISTRY)
