"""Products of few rows against float64."""

import pytest
import torch
from text_generation_kernels import launch_settings, skinny_matmul
from text_generation_kernels.skinny_matmul import skinny_gated_linear, skinny_linear

pytestmark = pytest.mark.interpreted

TOLERANCES = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
# rows, output width, depth
SHAPES = [(1, 32, 64), (3, 70, 100), (16, 33, 130), (2, 16, 16), (0, 32, 64)]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """So that tiny products have several of them."""
    small = {"BLOCK_N": 16, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
    monkeypatch.setattr(
        skinny_matmul, "launch_settings", lambda *_: launch_settings.FUSED_MULTIPLY_ADDS | small, raising=True
    )


def random_inputs(rows, width, depth, dtype, device):
    torch.manual_seed(rows * 1000 + depth)
    x, weight = torch.randn(rows, depth), torch.randn(width, depth) / depth**0.5
    return [tensor.to(dtype).to(device) for tensor in (x, weight, torch.randn(width))]


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", SHAPES)
def test_skinny_linear(shape, dtype, device):
    x, weight, bias = random_inputs(*shape, dtype, device)
    product = x.double() @ weight.double().T
    tolerance = {"atol": TOLERANCES[dtype], "rtol": TOLERANCES[dtype]}
    torch.testing.assert_close(skinny_linear(x, weight).double(), product, **tolerance)
    with_bias = skinny_linear(x, weight, bias)
    assert with_bias.dtype == dtype
    torch.testing.assert_close(with_bias.double(), product + bias.double(), **tolerance)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", SHAPES)
def test_skinny_gated_linear(shape, dtype, device):
    rows, width, depth = shape
    x, weight, _ = random_inputs(rows, 2 * width, depth, dtype, device)
    gate, up = (x.double() @ weight.double().T).chunk(2, dim=1)
    tolerance = {"atol": TOLERANCES[dtype], "rtol": TOLERANCES[dtype]}
    torch.testing.assert_close(skinny_gated_linear(x, weight).double(), gate / (1 + (-gate).exp()) * up, **tolerance)


def test_rows_of_a_wider_tensor(device):
    x, weight, _ = random_inputs(3, 40, 96, torch.float32, device)
    wide = torch.randn(3, 128, device=device)
    wide[:, :96] = x
    output = skinny_linear(wide[:, :96], weight)
    torch.testing.assert_close(output.double(), x.double() @ weight.double().T, atol=2e-5, rtol=2e-5)


def test_a_row_does_not_depend_on_its_neighbours(device):
    x, weight, _ = random_inputs(5, 48, 128, torch.float32, device)
    together = skinny_linear(x, weight)
    assert torch.equal(skinny_linear(x[2:3], weight)[0], together[2])
