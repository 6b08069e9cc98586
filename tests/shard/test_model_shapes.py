"""Models as large as they are published, built without memory: their tensors are those that transformers has."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from text_generation_shard.layers.partition import Partition, WeightTarget
from text_generation_shard.model_config import ModelConfig, load_model_config
from text_generation_shard.models import model_class
from transformers import AutoConfig, AutoModelForCausalLM

LLAMA3_ROPE = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
LLAMA: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0, "rope_scaling": LLAMA3_ROPE, "max_position_embeddings": 131_072, "vocab_size": 128_256,
    "head_dim": 128, "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False,
}  # fmt: skip
MISTRAL: dict[str, Any] = {
    "model_type": "mistral", "architectures": ["MistralForCausalLM"], "hidden_act": "silu", "rms_norm_eps": 1e-5,
    "max_position_embeddings": 32_768, "tie_word_embeddings": False,
}  # fmt: skip
QWEN2: dict[str, Any] = {
    "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_act": "silu", "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0, "max_position_embeddings": 32_768, "use_sliding_window": False,
    "sliding_window": 131_072,
}  # fmt: skip
QWEN3: dict[str, Any] = {
    "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "hidden_act": "silu", "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000, "max_position_embeddings": 40_960, "head_dim": 128, "attention_bias": False,
    "use_sliding_window": False, "sliding_window": None, "vocab_size": 151_936,
}  # fmt: skip


def sizes(hidden: int, mlp: int, layers: int, heads: int, kv_heads: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, **more,
    }  # fmt: skip


# The published config, and how many parameters the model is published to have.
MODELS = {
    "Llama-3.1-8B": (LLAMA | sizes(4096, 14_336, 32, 32, 8), 8_030_261_248),
    "Llama-3.1-70B": (LLAMA | sizes(8192, 28_672, 80, 64, 8), 70_553_706_496),
    "Mistral-7B-v0.1": (
        MISTRAL | sizes(4096, 14_336, 32, 32, 8, vocab_size=32_000, rope_theta=10_000.0, sliding_window=4096),
        7_241_732_096,
    ),
    "Mistral-7B-v0.3": (
        MISTRAL | sizes(4096, 14_336, 32, 32, 8, vocab_size=32_768, rope_theta=1e6, sliding_window=None),
        7_248_023_552,
    ),
    "Mistral-Nemo": (
        MISTRAL | sizes(5120, 14_336, 40, 32, 8, vocab_size=131_072, head_dim=128, sliding_window=None),
        12_247_782_400,
    ),
    "Qwen2.5-0.5B": (
        QWEN2 | sizes(896, 4864, 24, 14, 2, vocab_size=151_936, tie_word_embeddings=True), 494_032_768,
    ),
    "Qwen2.5-7B": (
        QWEN2 | sizes(3584, 18_944, 28, 28, 4, vocab_size=152_064, tie_word_embeddings=False), 7_615_616_512,
    ),
    "Qwen2.5-72B": (
        QWEN2 | sizes(8192, 29_568, 80, 64, 8, vocab_size=152_064, tie_word_embeddings=False), 72_706_203_648,
    ),
    "Qwen3-0.6B": (QWEN3 | sizes(1024, 3072, 28, 16, 8, tie_word_embeddings=True), 596_049_920),
    "Qwen3-8B": (QWEN3 | sizes(4096, 12_288, 36, 32, 8, tie_word_embeddings=False), 8_190_735_360),
    "Qwen3-32B": (QWEN3 | sizes(5120, 25_600, 64, 64, 8, tie_word_embeddings=False), 32_762_123_264),
}  # fmt: skip


def read_config(values: dict[str, Any], folder: Path) -> ModelConfig:
    (folder / "config.json").write_text(json.dumps(values))
    return load_model_config(folder)


def build(config: ModelConfig, rank: int = 0, world_size: int = 1) -> torch.nn.Module:
    return model_class(config.model_type)(config, Partition(rank, world_size, torch.bfloat16, torch.device("meta")))


@pytest.mark.parametrize("name", MODELS)
def test_tensors_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    values, num_parameters = MODELS[name]
    config = read_config(values, tmp_path)
    with torch.device("meta"):
        reference = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    expected = {key: tuple(parameter.shape) for key, parameter in reference.named_parameters()}
    model = build(config)
    targets: dict[str, WeightTarget] = model.targets()  # type: ignore[operator]
    assert {key: target.shape for key, target in targets.items()} == expected
    assert sum(parameter.numel() for parameter in model.parameters()) == num_parameters
    matrices = [shape for key, shape in expected.items() if key.startswith("model.layers.") and len(shape) == 2]
    assert config.num_layer_weights(1) == sum(map(math.prod, matrices))
    query_features = [shape[0] for key, shape in expected.items() if key.endswith("q_proj.weight")]
    windows = config.sliding_windows
    assert config.num_context_features(1) == sum(
        features for features, window in zip(query_features, windows, strict=True) if window is None
    )
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(("name", "world_size"), [("Llama-3.1-70B", 8), ("Qwen2.5-7B", 4), ("Qwen3-32B", 2)])
def test_ranks_share_matrices_and_nothing_else(name: str, world_size: int, tmp_path: Path) -> None:
    config = read_config(MODELS[name][0], tmp_path)
    whole = dict(build(config).named_parameters())
    for rank in (0, world_size - 1):
        for key, part in build(config, rank, world_size).named_parameters():
            is_norm = "norm" in key
            assert part.numel() * (1 if is_norm else world_size) == whole[key].numel(), key
    assert config.num_layer_weights(world_size) * world_size == config.num_layer_weights(1)
    assert config.num_context_features(world_size) * world_size == config.num_context_features(1)
