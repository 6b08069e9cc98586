"""Reads a GGUF file: metadata, tensors with their Hugging Face names, and the config.json it stands for.

Loads without torch. Turning the raw tensors into numbers is left to gguf_tensor.py.
"""

import re
import struct
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf.constants import GGUFValueType
from gguf.gguf_reader import GGUFReader

from text_generation_shard.model_config import UnsupportedModel

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}

# Frequency factors of Llama 3 files; they become part of the config.
ROPE_FACTORS = "rope_freqs.weight"

_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_BLOCK = re.compile(r"blk\.(\d+)\.([a-z_]+)\.(weight|bias)")


class BrokenGguf(ValueError):
    """The file is not GGUF, is cut short or contradicts itself."""


@dataclass(frozen=True)
class GgufTensor:
    """One tensor as stored: quantised types keep their bytes, one row of the tensor per row of `data`."""

    name: str
    shape: tuple[int, ...]  # outermost first, as torch has it
    quant_type: str  # name in gguf.GGMLQuantizationType, such as Q4_1 or F32
    data: npt.NDArray[Any]


@dataclass(frozen=True)
class GgufFile:
    """An open file; tensor data stays on disk until it is read."""

    metadata: dict[str, Any]  # strings, numbers, booleans and lists of them
    tensors: dict[str, GgufTensor]  # by GGUF name


def open_gguf(path: str | Path) -> GgufFile:
    """Read metadata and the tensor index of the file at `path`."""
    try:
        reader = _FastReader(path)
    except (ValueError, IndexError, KeyError, struct.error) as error:
        raise BrokenGguf(f"{path} cannot be read as GGUF: {error}") from error
    tensors = {
        tensor.name: GgufTensor(
            name=tensor.name,
            shape=tuple(int(size) for size in reversed(tensor.shape.tolist())),
            quant_type=tensor.tensor_type.name,
            data=tensor.data,
        )
        for tensor in reader.tensors
    }
    return GgufFile(reader.metadata, tensors)


def hugging_face_name(name: str) -> str:
    """The checkpoint name of a GGUF tensor; a name we do not know is returned as it is."""
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    match = _BLOCK.fullmatch(name)
    if match is None or match[2] not in _BLOCK_NAMES:
        return name
    return f"model.layers.{match[1]}.{_BLOCK_NAMES[match[2]]}.{match[3]}"


def has_permuted_rows(architecture: str, name: str) -> bool:
    """Whether llama.cpp interleaved the two rotary halves of each head in this tensor (GGUF name)."""
    match = _BLOCK.fullmatch(name)
    return architecture == "llama" and match is not None and match[2] in ("attn_q", "attn_k")


def llama_config(file: GgufFile) -> dict[str, Any]:
    """The config.json this file stands for (architectures llama, which includes Mistral, qwen2 and qwen3)."""
    metadata = file.metadata
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise UnsupportedModel(
            f"GGUF architecture {architecture!r} is not supported; supported: {', '.join(ARCHITECTURES)}"
        )
    if metadata.get(f"{architecture}.expert_count", 0):
        raise UnsupportedModel("GGUF files with experts (mixture of experts) are not supported")
    number = partial(_required_number, metadata, architecture)
    num_heads = number("attention.head_count")
    config = {
        "architectures": [ARCHITECTURES[architecture]],
        "model_type": architecture,
        "hidden_act": "silu",
        "hidden_size": number("embedding_length"),
        "intermediate_size": number("feed_forward_length"),
        "num_hidden_layers": number("block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": number("attention.head_count_kv", num_heads),
        "max_position_embeddings": number("context_length"),
        "rms_norm_eps": number("attention.layer_norm_rms_epsilon"),
        "vocab_size": _vocab_size(file),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "rope_parameters": _rope_parameters(file, architecture),
    }
    if num_heads:
        config["head_dim"] = number("attention.key_length", config["hidden_size"] // num_heads)
    if number("rope.dimension_count", config.get("head_dim", 0)) != config.get("head_dim", 0):
        raise UnsupportedModel("GGUF files whose rotary embedding covers only part of a head are not supported")
    return config | _variant(file, architecture) | _special_tokens(metadata)


def _required_number(metadata: dict[str, Any], architecture: str, key: str, default: Any = None) -> Any:
    value = metadata.get(f"{architecture}.{key}", default)
    if value is None:
        raise BrokenGguf(f"GGUF metadata lacks {architecture}.{key}")
    if not isinstance(value, int | float):
        raise UnsupportedModel(f"GGUF metadata {architecture}.{key} is not one number: layers differ")
    return value


def _vocab_size(file: GgufFile) -> int:
    if "token_embd.weight" not in file.tensors:
        raise BrokenGguf("GGUF file lacks token_embd.weight")
    return file.tensors["token_embd.weight"].shape[0]


def _variant(file: GgufFile, architecture: str) -> dict[str, Any]:
    """Fields that only some families have."""
    if architecture != "llama":
        return {}
    window = file.metadata.get("llama.attention.sliding_window")
    if window:
        return {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": window}
    return {
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
    }


def _rope_parameters(file: GgufFile, architecture: str) -> dict[str, Any]:
    metadata, prefix = file.metadata, f"{architecture}.rope"
    parameters: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": metadata.get(f"{prefix}.freq_base", 10000.0),
    }
    factor = metadata.get(f"{prefix}.scaling.factor", metadata.get(f"{prefix}.scale_linear", 1.0))
    scaling = metadata.get(f"{prefix}.scaling.type", "linear" if factor != 1.0 else "none")
    if ROPE_FACTORS in file.tensors:
        factors = file.tensors[ROPE_FACTORS].data.astype(np.float64).reshape(-1).tolist()
        return parameters | {"rope_type": "frequency_factors", "factors": factors}
    if scaling == "none" or factor in (0.0, 1.0):
        return parameters
    original = metadata.get(f"{prefix}.scaling.original_context_length")
    if scaling == "yarn" and not original:
        raise BrokenGguf(f"GGUF metadata lacks {prefix}.scaling.original_context_length")
    extra = {"original_max_position_embeddings": original} if scaling == "yarn" else {}
    return parameters | {"rope_type": scaling, "factor": factor} | extra


def _special_tokens(metadata: dict[str, Any]) -> dict[str, Any]:
    """Ids that end or begin a text; several ends of text become a list, as in config.json."""
    tokens: dict[str, Any] = {}
    ends = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    ends = list(dict.fromkeys(end for end in ends if end is not None))
    if ends:
        tokens["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    for name, key in (("bos_token_id", "bos"), ("pad_token_id", "padding")):
        if (value := metadata.get(f"tokenizer.ggml.{key}_token_id")) is not None:
            tokens[name] = value
    return tokens


class _FastReader(GGUFReader):  # type: ignore[misc]
    """GGUFReader without a numpy view per array element: 0.1 s instead of 5 s for a vocabulary of 49 152."""

    def __init__(self, path: str | Path) -> None:
        self._strings: dict[str, list[str]] = {}
        self._latest_strings: list[str] | None = None
        super().__init__(path)

    @property
    def metadata(self) -> dict[str, Any]:
        """All fields of the file but its own header."""
        return {
            name: self._strings[name] if name in self._strings else field.contents()
            for name, field in self.fields.items()
            if not name.startswith("GGUF.")
        }

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[Any]]:
        if GGUFValueType(raw_type) != GGUFValueType.ARRAY:
            parts: tuple[int, list[Any], list[int], list[Any]] = super()._get_field_parts(orig_offs, raw_type)
            return parts
        item_type, length = self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)
        kind = GGUFValueType(int(item_type[0]))
        types = [GGUFValueType.ARRAY, kind]
        if kind == GGUFValueType.STRING:
            self._latest_strings, num_bytes = self._read_strings(orig_offs + 12, int(length[0]))
            return 12 + num_bytes, [item_type, length], [], types
        if kind not in self.gguf_scalar_to_np:
            raise ValueError(f"arrays of {kind.name} are not supported")
        values = self._get(orig_offs + 12, self.gguf_scalar_to_np[kind], int(length[0]))
        if len(values) != length[0]:
            raise ValueError("the file ends within an array")
        return 12 + int(values.nbytes), [item_type, length, values], [2], types

    def _push_field(self, field: Any, skip_sum: bool = False) -> int:
        if self._latest_strings is not None:
            self._strings[field.name] = self._latest_strings
            self._latest_strings = None
        size: int = super()._push_field(field, skip_sum)
        return size

    def _read_strings(self, offset: int, count: int) -> tuple[list[str], int]:
        """`count` length-prefixed strings from `offset`, and how many bytes they take."""
        buffer = memoryview(self.data)
        unpack = struct.Struct(">Q" if self.byte_order == "S" else "<Q").unpack_from
        strings, position = [], offset
        for _ in range(count):
            (length,) = unpack(buffer, position)
            end = position + 8 + length
            if end > len(buffer):
                raise ValueError("the file ends within a string")
            # Tokens are bytes, not always whole characters; surrogates keep such bytes.
            strings.append(str(buffer[position + 8 : end], "utf-8", "surrogateescape"))
            position = end
        return strings, position - offset
