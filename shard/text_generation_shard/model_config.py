"""config.json -> ModelConfig: what the layers need to know of a checkpoint. Standard library only."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# model_type -> the architecture a checkpoint of it names.
FAMILIES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "frequency_factors")
ACTIVATIONS = ("silu", "swish")


class UnsupportedModel(ValueError):
    """The checkpoint is of a kind this server cannot run, or cannot be split as asked."""


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: base, kind of scaling and the numbers of that kind."""

    theta: float
    rope_type: str = "default"
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelConfig:
    """A decoder of the Llama family, its variants as flags."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeConfig
    has_qkv_bias: bool
    has_output_bias: bool
    has_mlp_bias: bool
    has_qk_norm: bool
    tie_word_embeddings: bool
    # Per layer: how many positions back it attends to, its own included; None: all of them.
    sliding_windows: tuple[int | None, ...]
    # The checkpoint's own type, if its config names one.
    dtype: str | None = None

    def num_layer_weights(self, world_size: int) -> int:
        """Of one of so many ranks: what the layers multiply each token with."""
        attention = self.hidden_size * self.head_dim * 2 * (self.num_heads + self.num_kv_heads)
        return self.num_layers * (attention + 3 * self.hidden_size * self.intermediate_size) // world_size

    def num_context_features(self, world_size: int) -> int:
        """Of one of so many ranks: the features of a token's queries, in all layers without a sliding window."""
        return self.sliding_windows.count(None) * self.num_heads * self.head_dim // world_size

    def check_divisible(self, world_size: int) -> None:
        """Refuse a number of shards that the heads or the MLP cannot be split among."""
        for name, count in (
            ("attention heads", self.num_heads),
            ("key/value heads", self.num_kv_heads),
            ("MLP columns", self.intermediate_size),
        ):
            if count % world_size:
                raise UnsupportedModel(f"{count} {name} cannot be split evenly among {world_size} shards")


def load_model_config(folder: str | Path) -> ModelConfig:
    """Read `config.json` in a model folder."""
    path = Path(folder) / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UnsupportedModel(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise UnsupportedModel(f"{path} does not hold an object")
    return parse_model_config(values)


def parse_model_config(values: Mapping[str, Any]) -> ModelConfig:
    """A ModelConfig from the content of config.json, older and newer spellings alike."""
    model_type = _family(values)
    hidden_size = _positive(values, "hidden_size")
    num_heads = _positive(values, "num_attention_heads")
    num_layers = _positive(values, "num_hidden_layers")
    absent_kv_heads = 8 if model_type == "mistral" and "num_key_value_heads" not in values else num_heads
    num_kv_heads = _positive(values, "num_key_value_heads", absent_kv_heads)
    default_head_dim = 128 if model_type == "qwen3" else hidden_size // num_heads
    head_dim = _positive(values, "head_dim", default_head_dim)
    max_position_embeddings = _positive(values, "max_position_embeddings")
    attention_bias = bool(values.get("attention_bias", False)) and model_type in ("llama", "qwen3")
    activation = values.get("hidden_act", "silu")
    if activation not in ACTIVATIONS:
        raise UnsupportedModel(f"hidden_act {activation!r} is not supported; supported: {', '.join(ACTIVATIONS)}")
    if num_heads % num_kv_heads or head_dim % 2:
        raise UnsupportedModel(
            f"{num_heads} heads, {num_kv_heads} key/value heads of size {head_dim} do not fit together"
        )
    return ModelConfig(
        model_type=model_type,
        vocab_size=_positive(values, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_positive(values, "intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=max_position_embeddings,
        rms_norm_eps=float(values.get("rms_norm_eps", 1e-6)),
        rope=_rope(values, max_position_embeddings),
        has_qkv_bias=model_type == "qwen2" or attention_bias,
        has_output_bias=attention_bias,
        has_mlp_bias=model_type == "llama" and bool(values.get("mlp_bias", False)),
        has_qk_norm=model_type == "qwen3",
        tie_word_embeddings=bool(values.get("tie_word_embeddings", False)),
        sliding_windows=_sliding_windows(values, model_type, num_layers),
        dtype=values.get("dtype") or values.get("torch_dtype"),
    )


def _family(values: Mapping[str, Any]) -> str:
    """The model type, which must agree with the architecture where one is named."""
    model_type = values.get("model_type")
    architectures = values.get("architectures") or []
    if model_type is None and architectures:
        known = {architecture: name for name, architecture in FAMILIES.items()}
        model_type = known.get(architectures[0])
    if model_type not in FAMILIES or (architectures and FAMILIES[model_type] not in architectures):
        raise UnsupportedModel(
            f"model type {values.get('model_type')!r} (architectures {list(architectures)}) is unsupported; "
            f"supported: {', '.join(FAMILIES.values())}"
        )
    if values.get("quantization_config"):
        method = values["quantization_config"].get("quant_method", "unknown")
        raise UnsupportedModel(f"checkpoints quantised with {method!r} are not supported")
    return str(model_type)


def _positive(values: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = values.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise UnsupportedModel(f"config.json: {key} must be a positive whole number, not {value!r}")
    return value


def _rope(values: Mapping[str, Any], max_position_embeddings: int) -> RopeConfig:
    """Both `rope_theta` beside `rope_scaling` and the newer `rope_parameters`."""
    parameters = dict(values.get("rope_parameters") or values.get("rope_scaling") or {})
    rope_type = parameters.pop("rope_type", None) or parameters.pop("type", None) or "default"
    parameters.pop("type", None)
    theta = parameters.pop("rope_theta", None) or values.get("rope_theta") or 10000.0
    partial = parameters.pop("partial_rotary_factor", None) or values.get("partial_rotary_factor") or 1.0
    if rope_type not in ROPE_TYPES or partial != 1.0:
        kind = rope_type if partial == 1.0 else "partial"
        raise UnsupportedModel(f"rope type {kind!r} is not supported; supported: {', '.join(ROPE_TYPES)}")
    if any(isinstance(value, Mapping) for value in parameters.values()):
        raise UnsupportedModel("config.json: rotary embeddings that differ by layer are not supported")
    if rope_type in ("llama3", "yarn"):
        # As transformers has it: the field outside the rope parameters wins, then theirs, then the model's length.
        own = parameters.get("original_max_position_embeddings") or max_position_embeddings
        parameters["original_max_position_embeddings"] = values.get("original_max_position_embeddings") or own
    for key in _REQUIRED[rope_type]:
        if parameters.get(key) is None:
            raise UnsupportedModel(f"config.json: rope type {rope_type!r} lacks {key}")
    return RopeConfig(float(theta), rope_type, parameters)


_REQUIRED: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
    "frequency_factors": ("factors",),
}


def _sliding_windows(values: Mapping[str, Any], model_type: str, num_layers: int) -> tuple[int | None, ...]:
    """Mistral: every layer; Qwen, where switched on: as layer_types tells, else from max_window_layers on."""
    window = values.get("sliding_window", 4096)
    if model_type == "llama" or not window:
        return (None,) * num_layers
    if model_type == "mistral":
        return (int(window),) * num_layers
    if not values.get("use_sliding_window", False):
        return (None,) * num_layers
    layer_types = values.get("layer_types")
    if layer_types is None:
        first = values.get("max_window_layers", 28)
        layer_types = ["sliding_attention" if layer >= first else "full_attention" for layer in range(num_layers)]
    if len(layer_types) != num_layers or set(layer_types) - {"sliding_attention", "full_attention"}:
        raise UnsupportedModel(f"config.json: layer_types {layer_types} are not supported")
    return tuple(int(window) if kind == "sliding_attention" else None for kind in layer_types)
