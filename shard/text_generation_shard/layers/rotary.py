"""Rotary embedding: the frequencies of each kind of scaling, and the table of cosines and sines."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from text_generation_shard.model_config import ModelConfig, RopeConfig


class RotaryEmbedding(nn.Module):
    """One table for all layers, for every position the model was made for; attention reads it."""

    cos_sin_cache: torch.Tensor  # [max_position_embeddings, head_dim] float32

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        super().__init__()
        frequencies, scale = rotary_frequencies(config.rope, config.head_dim)
        positions = torch.arange(config.max_position_embeddings, dtype=torch.float32, device=device)
        angles = positions.unsqueeze(1) * frequencies.to(device)
        table = torch.cat((angles.cos(), angles.sin()), dim=-1) * scale
        self.register_buffer("cos_sin_cache", table, persistent=False)


def rotary_frequencies(rope: RopeConfig, head_dim: int) -> tuple[torch.Tensor, float]:
    """Angle per position of each pair of dimensions, [head_dim / 2], and the factor of cosines and sines.

    `dynamic` changes frequencies only beyond max_position_embeddings, which is where our table ends.
    """
    powers: torch.Tensor = rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    match rope.rope_type:
        case "default" | "dynamic":
            return 1.0 / powers, 1.0
        case "linear":
            return 1.0 / powers / rope.parameters["factor"], 1.0
        case "frequency_factors":
            return 1.0 / powers / torch.tensor(rope.parameters["factors"], dtype=torch.float32), 1.0
        case "llama3":
            return _llama3(1.0 / powers, rope.parameters), 1.0
        case _:
            assert rope.rope_type == "yarn", "ModelConfig has refused other kinds"
            return _yarn(powers, rope.theta, head_dim, rope.parameters), _yarn_scale(rope.parameters)


def _llama3(frequencies: torch.Tensor, parameters: Mapping[str, Any]) -> torch.Tensor:
    """Long waves are stretched by `factor`, short ones kept, those between blended."""
    factor, low, high = parameters["factor"], parameters["low_freq_factor"], parameters["high_freq_factor"]
    # How often each wave repeats within the original context.
    repeats = parameters["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    blend = ((repeats - low) / (high - low)).clamp(0, 1)
    blended: torch.Tensor = (1 - blend) * frequencies / factor + blend * frequencies
    return blended


def _yarn(powers: torch.Tensor, theta: float, head_dim: int, parameters: Mapping[str, Any]) -> torch.Tensor:
    """Dimensions that rotate often keep their frequency, those that rotate rarely are stretched by `factor`."""

    def dimension(num_rotations: float) -> float:
        waves = parameters["original_max_position_embeddings"] / (num_rotations * 2 * math.pi)
        return head_dim * math.log(waves) / (2 * math.log(theta))

    first, last = dimension(parameters.get("beta_fast") or 32), dimension(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    width = last - first if last != first else 0.001
    stretched = ((torch.arange(head_dim // 2, dtype=torch.float32) - first) / width).clamp(0, 1)
    frequencies: torch.Tensor = stretched / (parameters["factor"] * powers) + (1 - stretched) / powers
    return frequencies


def _yarn_scale(parameters: Mapping[str, Any]) -> float:
    if parameters.get("attention_factor") is not None:
        return float(parameters["attention_factor"])
    factor, scale, scale_all = (parameters.get(key) for key in ("factor", "mscale", "mscale_all_dim"))
    if scale and scale_all:
        return _magnitude(factor, scale) / _magnitude(factor, scale_all)
    return _magnitude(factor, 1.0)


def _magnitude(factor: Any, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0
