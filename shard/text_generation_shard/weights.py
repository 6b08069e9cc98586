"""Brings a checkpoint's tensors into the parameters this rank holds; nothing may be missing or left over."""

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import nn

from text_generation_shard import distributed
from text_generation_shard.dummy_weights import fill_at_random
from text_generation_shard.gguf_file import ROPE_FACTORS, has_permuted_rows, hugging_face_name, open_gguf
from text_generation_shard.gguf_tensor import GgufSource
from text_generation_shard.layers.partition import CheckpointTensor, Partition, WeightForm, WeightTarget
from text_generation_shard.model_config import ModelConfig
from text_generation_shard.models import model_class
from text_generation_shard.safetensors_file import open_safetensors
from text_generation_shard.weight_stream import WeightStream

# Tensors that some checkpoints carry although they follow from the config.
_DERIVED = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
_MAX_NAMES = 10


class WeightError(ValueError):
    """The checkpoint does not hold exactly the tensors its config promises."""


def load_model(
    config: ModelConfig,
    weight_files: Sequence[str | Path] | None,
    dtype: torch.dtype,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    form: WeightForm = WeightForm.PLAIN,
) -> nn.Module:
    """Build the model and fill this rank's part of it, at random where `weight_files` is None.

    The group must have been joined before.
    """
    assert distributed.world_size() == world_size, "join_group comes first"
    config.check_divisible(world_size)
    model = model_class(config.model_type)(config, Partition(rank, world_size, dtype, device, form))
    targets: dict[str, WeightTarget] = model.targets()  # type: ignore[operator]
    unfilled = {id(parameter) for parameter in model.parameters()}
    assert unfilled == {id(target.parameter) for target in targets.values()}, "a parameter no tensor goes to"
    if weight_files is None:
        fill_at_random(model, rank)
        return model.eval()
    stream = WeightStream.to_gpu(device) if device.type == "cuda" else None
    with torch.inference_mode(), ExitStack() as files:
        _fill(targets, _checkpoint_tensors(config, weight_files, files, stream), config.tie_word_embeddings)
        if stream is not None:
            stream.run()
    return model.eval()


def _fill(targets: dict[str, WeightTarget], tensors: Iterator[tuple[str, CheckpointTensor]], is_tied: bool) -> None:
    missing, left_over = dict(targets), []
    for name, tensor in tensors:
        target = missing.pop(name, None)
        if target is not None:
            if tensor.shape != target.shape:
                raise WeightError(f"{name} has shape {tensor.shape}, the config asks for {target.shape}")
            target.load(tensor)
        elif name in targets:
            raise WeightError(f"the checkpoint holds {name} twice")
        elif not (_DERIVED.fullmatch(name) or (is_tied and name == "lm_head.weight")):
            left_over.append(name)
    if missing:
        raise WeightError(f"the checkpoint lacks {_listed(list(missing))}")
    if left_over:
        raise WeightError(f"the model has no use for these tensors of the checkpoint: {_listed(left_over)}")


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return ", ".join(names[:_MAX_NAMES]) + more


def _checkpoint_tensors(
    config: ModelConfig, weight_files: Sequence[str | Path], files: ExitStack, stream: WeightStream | None
) -> Iterator[tuple[str, CheckpointTensor]]:
    for path in map(Path, weight_files):
        if path.suffix == ".gguf":
            yield from _gguf_tensors(config, path)
        else:
            yield from open_safetensors(path, files, stream)


def _gguf_tensors(config: ModelConfig, path: Path) -> Iterator[tuple[str, CheckpointTensor]]:
    file = open_gguf(path)
    architecture = file.metadata.get("general.architecture", "")
    for name, tensor in file.tensors.items():
        if name != ROPE_FACTORS:
            head_dim = config.head_dim if has_permuted_rows(architecture, name) else None
            yield hugging_face_name(name), GgufSource(tensor, head_dim)
