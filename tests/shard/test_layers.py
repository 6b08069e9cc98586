"""Rotary frequencies against transformers; a rank's share of each weight against plain slicing."""

from collections.abc import Callable

import pytest
import torch
from text_generation_shard.layers.embedding import LanguageModelHead, VocabParallelEmbedding
from text_generation_shard.layers.linear import ColumnParallelLinear, RowParallelLinear
from text_generation_shard.layers.partition import Partition
from text_generation_shard.layers.rotary import rotary_frequencies
from text_generation_shard.model_config import RopeConfig
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

LLAMA31 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    ("rope_type", "parameters"),
    [
        ("linear", {"factor": 4.0}),
        ("llama3", LLAMA31),
        ("llama3", LLAMA31 | {"factor": 32.0, "high_freq_factor": 2.0}),
        ("yarn", {"factor": 4.0, "original_max_position_embeddings": 32768}),
        ("yarn", {"factor": 8.0, "original_max_position_embeddings": 4096, "truncate": False, "beta_fast": 16.0}),
        ("yarn", {"factor": 8.0, "original_max_position_embeddings": 4096, "mscale": 0.7, "mscale_all_dim": 1.0}),
        ("yarn", {"factor": 8.0, "original_max_position_embeddings": 4096, "attention_factor": 1.25}),
    ],
)
def test_rotary_frequencies(rope_type: str, parameters: dict[str, float]) -> None:
    reference = LlamaConfig(
        hidden_size=512,
        num_attention_heads=4,
        max_position_embeddings=131072,
        rope_parameters={"rope_type": rope_type, "rope_theta": 5e5} | parameters,
    )
    expected, expected_scale = ROPE_INIT_FUNCTIONS[rope_type](reference)
    actual, scale = rotary_frequencies(RopeConfig(5e5, rope_type, parameters), 128)
    torch.testing.assert_close(actual, expected, atol=0, rtol=2e-6)
    assert scale == pytest.approx(expected_scale)


def test_frequency_factors_divide() -> None:
    plain, _ = rotary_frequencies(RopeConfig(1e4), 8)
    factors = [1.0, 1.0, 2.5, 8.0]
    divided, scale = rotary_frequencies(RopeConfig(1e4, "frequency_factors", {"factors": factors}), 8)
    assert scale == 1.0
    torch.testing.assert_close(divided, plain / torch.tensor(factors))


class Tensor:
    """A checkpoint tensor in memory."""

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    def copy_to(self, destination: torch.Tensor, rows: slice, columns: slice | None = None) -> None:
        destination.copy_(self.values[rows] if columns is None else self.values[rows, columns])


def partition(rank: int, world_size: int) -> Partition:
    return Partition(rank, world_size, torch.float64, torch.device("cpu"))


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_column_parallel_parts_concatenate(world_size: int) -> None:
    matrices, biases = [random(12, 5), random(6, 5, seed=1)], [random(12, seed=2), random(6, seed=3)]
    x = random(4, 5, seed=4)
    parts: list[list[torch.Tensor]] = [[], []]
    for rank in range(world_size):
        layer = ColumnParallelLinear(5, (12, 6), True, partition(rank, world_size))
        targets = layer.targets(["a", "b"])
        for name, matrix, bias in zip("ab", matrices, biases, strict=True):
            targets[f"{name}.weight"].load(Tensor(matrix))
            targets[f"{name}.bias"].load(Tensor(bias))
        first, second = layer(x).split((12 // world_size, 6 // world_size), dim=1)
        parts[0].append(first)
        parts[1].append(second)
    for outputs, matrix, bias in zip(parts, matrices, biases, strict=True):
        torch.testing.assert_close(torch.cat(outputs, dim=1), x @ matrix.T + bias)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_row_parallel_adds_up_with_one_bias(world_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, bias, x = random(5, 12), random(5, seed=1), random(4, 12, seed=2)
    share = 12 // world_size
    pieces = [x[:, rank * share : (rank + 1) * share] for rank in range(world_size)]
    total = x @ matrix.T
    # What the group's sum would make of this rank's partial product.
    partial: list[torch.Tensor] = []
    reduce: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: partial.append(tensor) or total  # noqa: E731
    monkeypatch.setattr("text_generation_shard.layers.linear.distributed.all_reduce", reduce)
    for rank in range(world_size):
        layer = RowParallelLinear(12, 5, True, partition(rank, world_size))
        targets = layer.targets("a")
        targets["a.weight"].load(Tensor(matrix))
        targets["a.bias"].load(Tensor(bias))
        torch.testing.assert_close(layer(pieces[rank]), total + bias)
    if world_size > 1:
        torch.testing.assert_close(torch.stack(partial).sum(0), total)


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_vocabulary_is_padded_and_covered_once(world_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """11 tokens over 5 ranks of 3: the last rank holds padding alone."""
    table = random(11, 4)
    ids, hidden = torch.tensor([0, 10, 3, 5, 5]), random(2, 4, seed=1)
    summed = torch.zeros(5, 4, dtype=torch.float64)
    logits = []
    monkeypatch.setattr("text_generation_shard.layers.embedding.distributed.all_reduce", lambda tensor: tensor)
    monkeypatch.setattr(
        "text_generation_shard.layers.embedding.distributed.all_gather", lambda part: logits.append(part) or part
    )
    for rank in range(world_size):
        embedding = VocabParallelEmbedding(11, 4, partition(rank, world_size))
        head = LanguageModelHead(11, 4, partition(rank, world_size), tied_to=embedding)
        embedding.targets("e")["e.weight"].load(Tensor(table))
        summed += embedding(ids)
        head(hidden)
    torch.testing.assert_close(summed, table[ids])
    gathered = torch.cat(logits, dim=1)
    torch.testing.assert_close(gathered[:, :11], hidden @ table.T)
    assert gathered.shape[1] == -(-11 // world_size) * world_size
    assert (gathered[:, 11:] == 0).all()
