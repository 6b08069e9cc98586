"""Weights as products read them: which form multiplies how many rows, with the numbers of the file in all of them."""

import gguf
import numpy as np
import pytest
import torch
from text_generation_shard.gguf_file import GgufTensor
from text_generation_shard.gguf_tensor import GgufSource
from text_generation_shard.layers import cpu_linear
from text_generation_shard.layers.embedding import LanguageModelHead, VocabParallelEmbedding
from text_generation_shard.layers.linear import ColumnParallelLinear, RowParallelLinear
from text_generation_shard.layers.partition import CheckpointTensor, Partition, WeightForm

CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="nothing is packed on this processor"
)


def stored(quant: str, *shape: int, seed: int = 0, head_dim: int | None = None) -> tuple[GgufSource, torch.Tensor]:
    """A tensor of a GGUF file, and its numbers by GGUF's own library."""
    kind = gguf.GGMLQuantizationType[quant]
    values = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    data = gguf.quants.quantize(values, kind)
    exact = torch.from_numpy(gguf.quants.dequantize(data, kind)).double()
    if head_dim is not None:
        # Row 2i of a stored head is row i, row 2i + 1 is row i + head_dim / 2.
        order = torch.arange(head_dim).view(-1, 2).T.flatten()
        exact = exact.view(-1, head_dim, shape[1])[:, order].view(shape)
    return GgufSource(GgufTensor("t", shape, quant, data), head_dim), exact


def partition(form: WeightForm, rank: int = 0, world_size: int = 1, dtype: torch.dtype = torch.float32) -> Partition:
    return Partition(rank, world_size, dtype, CPU, form)


def rows_of(count: int, width: int) -> torch.Tensor:
    # Numbers that bfloat16 has as well.
    return torch.randn(count, width, generator=torch.Generator().manual_seed(9)).bfloat16().float()


@pytest.fixture
def int4_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of rows of each 4-bit product."""
    rows: list[int] = []
    multiply = cpu_linear.int4_linear

    def recorded(x: torch.Tensor, weight: cpu_linear.Int4Weight) -> torch.Tensor:
        rows.append(len(x))
        return multiply(x, weight)

    monkeypatch.setattr(cpu_linear, "int4_linear", recorded)
    return rows


def assert_near(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert (actual.double() - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("quant", ["Q4_0", "Q4_1"])
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("has_bias", [False, True])
def test_column_parallel_in_4_bits(quant: str, world_size: int, has_bias: bool, int4_rows: list[int]) -> None:
    (query, query_values), (key, key_values) = stored(quant, 64, 96, head_dim=16), stored(quant, 32, 96, seed=1)
    for rank in range(world_size):
        layer = ColumnParallelLinear(96, (64, 32), has_bias, partition(WeightForm.QUANTISED, rank, world_size))
        targets = layer.targets(["q", "k"])
        targets["k.weight"].load(key)
        targets["q.weight"].load(query)
        bias = torch.zeros(1)
        if layer.bias is not None:
            bias = layer.bias.copy_(torch.arange(float(len(layer.bias))))
        assert layer.weight.numel() == 0, "no third copy is kept"
        own = [values.chunk(world_size)[rank] for values in (query_values, key_values)]
        for count, tolerance in ((1, 2**-8), (4, 2**-8), (300, 2**-20)):
            x = rows_of(count, 96)
            assert_near(layer(x) - bias, x.double() @ torch.cat(own).T, tolerance)
    assert int4_rows == [1, 4] * world_size


def test_row_parallel_in_4_bits(int4_rows: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    source, values = stored("Q4_1", 48, 128)
    monkeypatch.setattr("text_generation_shard.layers.linear.distributed.all_reduce", lambda part: part)
    total = torch.zeros(3, 48)
    x = rows_of(3, 128)
    for rank in range(2):
        layer = RowParallelLinear(128, 48, False, partition(WeightForm.QUANTISED, rank, 2))
        layer.targets("o")["o.weight"].load(source)
        total += layer(x[:, rank * 64 : rank * 64 + 64])
    assert_near(total, x.double() @ values.T, 2**-8)
    assert int4_rows == [3, 3]


def test_a_share_that_cuts_groups_is_multiplied_otherwise(
    int4_rows: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, values = stored("Q4_1", 48, 96)
    monkeypatch.setattr("text_generation_shard.layers.linear.distributed.all_reduce", lambda part: part)
    layer = RowParallelLinear(96, 48, False, partition(WeightForm.QUANTISED, 1, 2))
    layer.targets("o")["o.weight"].load(source)
    x = rows_of(1, 48)
    assert_near(layer(x), x.double() @ values[:, 48:].T, 2**-20)
    assert int4_rows == []


@pytest.mark.parametrize(("first", "second"), [("Q4_1", "Q8_0"), ("F16", "Q4_1"), ("Q8_0", "Q8_0"), ("Q5_1", "Q5_1")])
def test_other_types_are_packed_in_the_type_of_the_layer(first: str, second: str, int4_rows: list[int]) -> None:
    (gate, gate_values), (up, up_values) = stored(first, 32, 64), stored(second, 32, 64, seed=1)
    layer = ColumnParallelLinear(64, (32, 32), False, partition(WeightForm.QUANTISED))
    targets = layer.targets(["gate", "up"])
    targets["gate.weight"].load(gate)
    targets["up.weight"].load(up)
    assert layer.weight.numel() == 0
    x = rows_of(1, 64)
    assert_near(layer(x), x.double() @ torch.cat((gate_values, up_values)).T, 2**-20)
    assert int4_rows == []


@pytest.mark.parametrize("form", [WeightForm.PLAIN, WeightForm.PACKED])
def test_without_4_bits(form: WeightForm, int4_rows: list[int]) -> None:
    source, values = stored("Q4_1", 32, 64)
    layer = ColumnParallelLinear(64, (32,), False, partition(form))
    layer.targets(["a"])["a.weight"].load(source)
    assert (layer.weight.numel() == 0) == (form is WeightForm.PACKED)
    for count in (1, 50):
        x = rows_of(count, 64)
        assert_near(layer(x), x.double() @ values.T, 2**-20)
    assert int4_rows == []


def test_types_that_are_not_packed_stay_plain() -> None:
    source, values = stored("Q4_1", 32, 64)
    layer = ColumnParallelLinear(64, (32,), False, partition(WeightForm.QUANTISED, dtype=torch.float64))
    layer.targets(["a"])["a.weight"].load(source)
    x = rows_of(2, 64).double()
    assert_near(layer(x), x @ values.T, 1e-12)


@pytest.mark.parametrize("quant", ["Q4_1", "Q8_0"])
def test_tied_head_and_embedding(quant: str, int4_rows: list[int]) -> None:
    source, values = stored(quant, 48, 64)
    embedding = VocabParallelEmbedding(48, 64, partition(WeightForm.QUANTISED))
    head = LanguageModelHead(48, 64, partition(WeightForm.QUANTISED), tied_to=embedding)
    embedding.targets("e")["e.weight"].load(source)
    ids, x = torch.tensor([0, 47, 5]), rows_of(3, 64)
    assert torch.equal(embedding(ids).double(), values[ids])
    assert_near(head(x), x.double() @ values.T, 2**-8)
    assert int4_rows == ([3] if quant == "Q4_1" else [])


@pytest.mark.parametrize("least", [48, 49])
def test_8_bits_of_a_bfloat16_head(least: int, int4_rows: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Multiplied as they are where the weight has as many outputs as a head."""
    monkeypatch.setattr("text_generation_shard.layers.product_weight._MIN_INT8_OUTPUTS", least)
    source, values = stored("Q8_0", 48, 64)
    head = LanguageModelHead(48, 64, partition(WeightForm.QUANTISED, dtype=torch.bfloat16))
    head.targets("h")["h.weight"].load(source)
    if not head.product.is_packed:
        pytest.skip("this processor has no products in bfloat16")
    for count in (1, 3, 4):
        x = rows_of(count, 64)
        assert_near(head(x.bfloat16()), x.double() @ values.T, 2**-8)
    is_taken = least == 48 and torch.backends.cpu.get_cpu_capability() == "AVX512"
    assert int4_rows == ([1, 3] if is_taken else [])


def test_untied_head_and_embedding(int4_rows: list[int]) -> None:
    source, values = stored("Q4_1", 48, 64)
    embedding = VocabParallelEmbedding(48, 64, partition(WeightForm.QUANTISED))
    head = LanguageModelHead(48, 64, partition(WeightForm.QUANTISED))
    embedding.targets("e")["e.weight"].load(source)
    head.targets("h")["h.weight"].load(source)
    ids, x = torch.tensor([0, 47, 5]), rows_of(3, 64)
    assert torch.equal(embedding(ids).double(), values[ids])
    assert_near(head(x), x.double() @ values.T, 2**-8)
    assert int4_rows == [3]
    assert head.weight.numel() == 0


def test_a_padded_share_of_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """31 tokens over 2 ranks: the second has a row of zeros, and is multiplied in the layer's own type."""
    source, values = stored("Q4_1", 31, 64)
    parts: list[torch.Tensor] = []
    monkeypatch.setattr(
        "text_generation_shard.layers.embedding.distributed.all_gather", lambda part: parts.append(part) or part
    )
    x = rows_of(2, 64)
    for rank in range(2):
        head = LanguageModelHead(31, 64, partition(WeightForm.QUANTISED, rank, 2))
        head.targets("h")["h.weight"].load(source)
        head(x)
    logits = torch.cat(parts, dim=1)
    assert_near(logits[:, :31], x.double() @ values.T, 2**-8)
    assert (logits[:, 31:] == 0).all()


@pytest.mark.parametrize("quant", ["Q4_0", "Q4_1", "Q8_0"])
@pytest.mark.parametrize("head_dim", [None, 16])
def test_groups_are_the_numbers_of_the_file(quant: str, head_dim: int | None) -> None:
    source, values = stored(quant, 64, 128, head_dim=head_dim)
    groups = source.read_groups(slice(16, 48), slice(32, 96))
    assert groups is not None
    assert int(groups.codes.max()) == (127 if quant == "Q8_0" else 15)
    assert torch.equal(groups.values().double(), values[16:48, 32:96])
    assert source.read_groups(slice(16, 48), slice(16, 96)) is None
    assert source.read_groups(slice(16, 48), slice(32, 80)) is None


def test_other_checkpoints_have_no_groups(int4_rows: list[int]) -> None:
    class Tensor:
        shape = (32, 64)

        def copy_to(self, destination: torch.Tensor, rows: slice, columns: slice | None = None) -> None:
            destination.fill_(1.0)

    tensor: CheckpointTensor = Tensor()
    layer = ColumnParallelLinear(64, (32,), False, partition(WeightForm.QUANTISED))
    layer.targets(["a"])["a.weight"].load(tensor)
    assert layer(torch.ones(1, 64)).tolist() == [[64.0] * 32]
    assert int4_rows == []


def test_the_best_logits_of_a_tied_bfloat16_head_are_exact() -> None:
    source, exact = stored("Q8_0", 4096, 64)
    embedding = VocabParallelEmbedding(4096, 64, partition(WeightForm.QUANTISED, dtype=torch.bfloat16))
    head = LanguageModelHead(4096, 64, partition(WeightForm.QUANTISED, dtype=torch.bfloat16), tied_to=embedding)
    embedding.targets("e")["e.weight"].load(source)
    if not head.product.is_packed:
        pytest.skip("this processor has no products in bfloat16")
    x = rows_of(9, 64)
    expected = x.double() @ exact.bfloat16().double().T
    logits = head(x.bfloat16())
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))
    best = expected.topk(8).indices
    assert (logits.gather(1, best) - expected.gather(1, best)).abs().max() < 1e-4
    assert (logits - expected).abs().max() <= 2**-8 * expected.abs().max()
