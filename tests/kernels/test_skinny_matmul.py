"""Products of few rows against float64."""

import pytest
import torch
from text_generation_kernels import launch_settings, skinny_matmul
from text_generation_kernels.skinny_matmul import skinny_gated_linear, skinny_linear

pytestmark = pytest.mark.interpreted

TOLERANCES = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
# rows, output width, depth
SHAPES = [(1, 32, 64), (3, 70, 100), (16, 33, 130), (2, 16, 16), (0, 32, 64)]


@pytest.fixture(params=[1, 3])
def split_k(request, monkeypatch):
    """Small blocks, so that tiny products have several of them; K whole, or in more parts than may have work."""
    small = {"BLOCK_N": 16, "BLOCK_K": 32, "SPLIT_K": request.param, "num_warps": 4, "num_stages": 2}
    monkeypatch.setattr(
        skinny_matmul, "launch_settings", lambda *_: launch_settings.FUSED_MULTIPLY_ADDS | small, raising=True
    )
    return request.param


def random_inputs(rows, width, depth, dtype, device):
    torch.manual_seed(rows * 1000 + depth)
    x, weight = torch.randn(rows, depth), torch.randn(width, depth) / depth**0.5
    bias, residual = torch.randn(width), torch.randn(rows, width)
    return [tensor.to(dtype).to(device) for tensor in (x, weight, bias, residual)]


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", SHAPES)
def test_skinny_linear(shape, dtype, split_k, device):
    x, weight, bias, residual = random_inputs(*shape, dtype, device)
    product = x.double() @ weight.double().T
    tolerance = {"atol": TOLERANCES[dtype], "rtol": TOLERANCES[dtype]}
    for _ in range(2):  # counters are back at zero after each product
        torch.testing.assert_close(skinny_linear(x, weight).double(), product, **tolerance)
    torch.testing.assert_close(skinny_linear(x, weight, bias).double(), product + bias.double(), **tolerance)
    both = skinny_linear(x, weight, bias, residual)
    assert both.dtype == dtype
    torch.testing.assert_close(both.double(), product + bias.double() + residual.double(), **tolerance)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", SHAPES)
def test_skinny_gated_linear(shape, dtype, split_k, device):
    rows, width, depth = shape
    x, weight, _, _ = random_inputs(rows, 2 * width, depth, dtype, device)
    gate, up = (x.double() @ weight.double().T).chunk(2, dim=1)
    tolerance = {"atol": TOLERANCES[dtype], "rtol": TOLERANCES[dtype]}
    torch.testing.assert_close(skinny_gated_linear(x, weight).double(), gate / (1 + (-gate).exp()) * up, **tolerance)


def test_rows_of_a_wider_tensor(split_k, device):
    x, weight, _, residual = random_inputs(3, 40, 96, torch.float32, device)
    wide, wide_residual = torch.randn(3, 128, device=device), torch.randn(3, 50, device=device)
    wide[:, :96], wide_residual[:, :40] = x, residual
    output = skinny_linear(wide[:, :96], weight, residual=wide_residual[:, :40])
    torch.testing.assert_close(
        output.double(), x.double() @ weight.double().T + residual.double(), atol=2e-5, rtol=2e-5
    )


def test_a_row_does_not_depend_on_its_neighbours(split_k, device):
    x, weight, _, _ = random_inputs(5, 48, 128, torch.float32, device)
    together = skinny_linear(x, weight)
    assert torch.equal(skinny_linear(x[2:3], weight)[0], together[2])
