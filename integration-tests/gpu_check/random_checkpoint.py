"""A checkpoint of random weights in a model's shape, as safetensors: what start-up with real files is measured on."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

Tensors = dict[str, tuple[int, ...]]

FILE_BYTES = 5 * 10**9  # as checkpoints are commonly cut
_BLOCK_VALUES = 1 << 23
_STANDARD_DEVIATION = 0.02


def write_checkpoint(model: Path, folder: Path) -> int:
    """Write the model's config, tokenizer and random bfloat16 weights to `folder`; answers the weights' bytes."""
    for path in model.iterdir():
        if path.is_file() and path.suffix not in (".safetensors", ".gguf") and not path.name.endswith(".index.json"):
            shutil.copy(path, folder)
    parts = list(_files(tensors_of(json.loads((model / "config.json").read_text()))))
    normal = np.random.default_rng(0).standard_normal(_BLOCK_VALUES, dtype=np.float32) * _STANDARD_DEVIATION
    block = (normal.view(np.uint32) >> 16).astype(np.uint16)
    places, num_bytes = {}, 0
    for number, part in enumerate(parts, 1):
        name = f"model-{number:05}-of-{len(parts):05}.safetensors"
        places |= dict.fromkeys(part, name)
        with (folder / name).open("wb") as file:
            num_bytes += _write(file, part, block)
    index = {"metadata": {"total_size": num_bytes}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return num_bytes


def tensors_of(config: dict[str, Any]) -> Tensors:
    """Names and shapes of a Llama, Mistral, Qwen2 or Qwen3, from its config.json."""
    hidden, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads = config["num_attention_heads"]
    kv_heads, head = config.get("num_key_value_heads") or heads, config.get("head_dim") or hidden // heads
    kind = config["model_type"]
    layer: Tensors = {
        "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
        "self_attn.q_proj": (heads * head, hidden), "self_attn.k_proj": (kv_heads * head, hidden),
        "self_attn.v_proj": (kv_heads * head, hidden), "self_attn.o_proj": (hidden, heads * head),
        "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner),
    }  # fmt: skip
    if kind == "qwen3":
        layer |= {"self_attn.q_norm": (head,), "self_attn.k_norm": (head,)}
    tensors = {"model.embed_tokens.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)}
    for index in range(config["num_hidden_layers"]):
        tensors |= {f"model.layers.{index}.{name}.weight": shape for name, shape in layer.items()}
        if kind == "qwen2" or config.get("attention_bias"):
            names = ["q_proj", "k_proj", "v_proj", *(["o_proj"] if kind == "llama" else [])]
            biases = {f"self_attn.{name}": layer[f"self_attn.{name}"][:1] for name in names}
            tensors |= {f"model.layers.{index}.{name}.bias": shape for name, shape in biases.items()}
    if not config.get("tie_word_embeddings", False):
        tensors["lm_head.weight"] = (vocabulary, hidden)
    return tensors


def _files(tensors: Tensors) -> Iterator[Tensors]:
    """The tensors of each file."""
    part: Tensors = {}
    for name, shape in tensors.items():
        if part and sum(map(_num_bytes, part.values())) + _num_bytes(shape) > FILE_BYTES:
            yield part
            part = {}
        part[name] = shape
    yield part


def _write(file: BinaryIO, tensors: Tensors, block: "np.ndarray[Any, Any]") -> int:
    header, offset = {}, 0
    for name, shape in tensors.items():
        end = offset + _num_bytes(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": (offset, end)}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for shape in tensors.values():
        left = _num_bytes(shape) // 2
        while left:
            count = min(left, len(block))
            file.write(block[:count].data)
            left -= count
    return offset


def _num_bytes(shape: tuple[int, ...]) -> int:
    return 2 * int(np.prod(shape))
