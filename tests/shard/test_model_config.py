"""ModelConfig against what transformers reads from the same config.json."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from text_generation_shard.model_config import (
    FAMILIES,
    UnsupportedModel,
    load_model_config,
    parse_model_config,
)
from transformers import LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config, Qwen3Config

SMALL: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 101,
    "max_position_embeddings": 64,
}
LLAMA = SMALL | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


@pytest.mark.parametrize(
    "reference",
    [
        LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True, rms_norm_eps=1e-5, tie_word_embeddings=True),
        MistralConfig(**SMALL, sliding_window=7, head_dim=16),
        MistralConfig(**SMALL, sliding_window=None),
        Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=9, max_window_layers=2),
        Qwen2Config(**SMALL, use_sliding_window=False, sliding_window=9),
        Qwen3Config(**SMALL, head_dim=32, rope_theta=1e6),
    ],
    ids=["llama", "mistral", "mistral-whole", "qwen2-window", "qwen2", "qwen3"],
)
def test_reads_what_transformers_wrote(reference: PretrainedConfig, tmp_path: Path) -> None:
    reference.architectures = [FAMILIES[reference.model_type]]
    reference.save_pretrained(tmp_path)
    config = load_model_config(tmp_path)
    assert (config.model_type, config.vocab_size, config.hidden_size) == (reference.model_type, 101, 48)
    assert (config.num_layers, config.num_heads, config.num_kv_heads) == (4, 6, 2)
    assert config.head_dim == (getattr(reference, "head_dim", None) or 8)
    assert config.rms_norm_eps == reference.rms_norm_eps
    assert config.rope.theta == reference.rope_parameters["rope_theta"]
    assert config.tie_word_embeddings == reference.tie_word_embeddings
    layer_types = getattr(reference, "layer_types", None)
    for layer, window in enumerate(config.sliding_windows):
        is_windowed = layer_types is None or layer_types[layer] == "sliding_attention"
        assert window == (getattr(reference, "sliding_window", None) if is_windowed else None)


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_theta": 5e5, "rope_scaling": LLAMA3_SCALING},
        {"rope_theta": 5e5, "rope_scaling": {"type": "llama3"} | LLAMA3_SCALING},
        {"rope_parameters": LLAMA3_SCALING | {"rope_theta": 5e5}},
    ],
    ids=["older", "both", "newer"],
)
def test_older_and_newer_rope_fields(fields: dict[str, Any]) -> None:
    rope = parse_model_config(LLAMA | fields).rope
    assert (rope.theta, rope.rope_type) == (5e5, "llama3")
    assert {"rope_type": "llama3"} | dict(rope.parameters) == LLAMA3_SCALING


def test_oldest_rope_field_is_named_type() -> None:
    rope = parse_model_config(LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.0}}).rope
    assert (rope.theta, rope.rope_type, rope.parameters["factor"]) == (10000.0, "linear", 2.0)


def test_absent_fields_are_what_transformers_takes() -> None:
    mistral = {key: value for key, value in SMALL.items() if key != "num_key_value_heads"}
    mistral |= {"model_type": "mistral", "num_attention_heads": 16, "hidden_size": 64}
    config, reference = parse_model_config(mistral), MistralConfig(**mistral)
    assert config.num_kv_heads == reference.num_key_value_heads
    assert config.sliding_windows == (reference.sliding_window,) * 4
    llama = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
    assert parse_model_config(llama).num_kv_heads == LlamaConfig(**llama).num_key_value_heads


def test_family_follows_from_the_architecture_alone() -> None:
    values = SMALL | {"architectures": ["Qwen3ForCausalLM"]}
    assert parse_model_config(values).model_type == "qwen3"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, "Qwen3ForCausalLM"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "longrope"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor"),
        ({"partial_rotary_factor": 0.5}, "partial"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "layer"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"hidden_size": "48"}, "hidden_size"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"num_key_value_heads": 4}, "do not fit"),
    ],
)
def test_refuses_what_it_cannot_run(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        parse_model_config(LLAMA | fields)


@pytest.mark.parametrize("text", ["{", "[]"])
def test_refuses_a_broken_file(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UnsupportedModel, match=r"config\.json"):
        load_model_config(tmp_path)


@pytest.mark.parametrize(
    ("fields", "world_size", "message"),
    [
        ({}, 4, "6 attention heads"),
        ({}, 3, "2 key/value heads"),
        ({"intermediate_size": 81}, 2, "81 MLP columns"),
    ],
)
def test_refuses_uneven_shards(fields: dict[str, Any], world_size: int, message: str) -> None:
    config = parse_model_config(LLAMA | fields)
    config.check_divisible(1)
    with pytest.raises(UnsupportedModel, match=message):
        config.check_divisible(world_size)


def test_loads_without_torch() -> None:
    modules = "text_generation_shard.model_config, text_generation_shard.gguf_file"
    code = f"import sys, json, {modules}; print(json.dumps([m for m in ('torch', 'transformers') if m in sys.modules]))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert json.loads(output) == []
