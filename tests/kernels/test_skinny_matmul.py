"""Products of few rows against float64."""

import pytest
import torch
from text_generation_kernels import launch_settings, skinny_matmul
from text_generation_kernels.skinny_matmul import (
    ScaledRows,
    skinny_gated_linear,
    skinny_linear,
    skinny_linear_add_norm,
)

pytestmark = pytest.mark.interpreted

TOLERANCES = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
# rows, output width, depth
SHAPES = [(1, 32, 64), (3, 70, 100), (16, 33, 130), (2, 16, 16), (0, 32, 64)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """So that tiny products have several of them."""
    small = {"BLOCK_N": 16, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
    monkeypatch.setattr(
        skinny_matmul, "launch_settings", lambda *_: launch_settings.FUSED_MULTIPLY_ADDS | small, raising=True
    )


def random_inputs(rows, width, depth, dtype, device):
    torch.manual_seed(rows * 1000 + depth)
    x, weight = torch.randn(rows, depth), torch.randn(width, depth) / depth**0.5
    bias, residual = torch.randn(width), torch.randn(rows, width)
    return [tensor.to(dtype).to(device) for tensor in (x, weight, bias, residual)]


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", SHAPES)
def test_skinny_linear(shape, dtype, device):
    x, weight, bias, _ = random_inputs(*shape, dtype, device)
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
    x, weight, _, _ = random_inputs(rows, 2 * width, depth, dtype, device)
    gate, up = (x.double() @ weight.double().T).chunk(2, dim=1)
    tolerance = {"atol": TOLERANCES[dtype], "rtol": TOLERANCES[dtype]}
    torch.testing.assert_close(skinny_gated_linear(x, weight).double(), gate / (1 + (-gate).exp()) * up, **tolerance)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", [*SHAPES, (5, 600, 40)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_norm_between_two_products(shape, has_bias, dtype, device):
    """The first adds the residual and its bias; both next products divide by the root mean square of the sum."""
    x, weight, bias, residual = random_inputs(*shape, dtype, device)
    norm_weight = (0.5 + torch.rand(shape[1])).to(dtype).to(device)
    scaled, total = skinny_linear_add_norm(x, weight, bias if has_bias else None, residual, norm_weight, 1e-3)
    exact = x.double() @ weight.double().T + residual.double() + (bias.double() if has_bias else 0)
    tolerance = {"atol": TOLERANCES[dtype], "rtol": TOLERANCES[dtype]}
    torch.testing.assert_close(total.double(), exact, **tolerance)
    normed = torch.nn.functional.rms_norm(exact, exact.shape[1:], norm_weight.double(), 1e-3)
    following, bias, *_ = random_inputs(1, 2 * shape[2], shape[1], dtype, device)[1:]
    product = normed @ following.double().T
    tolerance = {"atol": 2 * TOLERANCES[dtype], "rtol": 2 * TOLERANCES[dtype]}
    torch.testing.assert_close(skinny_linear(scaled, following, bias).double(), product + bias.double(), **tolerance)
    gate, up = product.chunk(2, dim=1)
    active = gate / (1 + (-gate).exp()) * up
    torch.testing.assert_close(skinny_gated_linear(scaled, following).double(), active, **tolerance)


def test_rows_of_a_wider_tensor(device):
    x, weight, _, residual = random_inputs(3, 40, 96, torch.float32, device)
    wide, wide_residual = torch.randn(3, 128, device=device), torch.randn(3, 50, device=device)
    wide[:, :96], wide_residual[:, :40] = x, residual
    _, total = skinny_linear_add_norm(
        wide[:, :96], weight, None, wide_residual[:, :40], torch.ones(40, device=device), 1e-5
    )
    torch.testing.assert_close(total.double(), x.double() @ weight.double().T + residual.double(), atol=2e-5, rtol=2e-5)


def test_a_row_does_not_depend_on_its_neighbours(device):
    x, weight, _, _ = random_inputs(5, 48, 128, torch.float32, device)
    together = skinny_linear(x, weight)
    assert torch.equal(skinny_linear(x[2:3], weight)[0], together[2])
    sums = x.square().sum(1, keepdim=True).repeat(1, 3)
    together = skinny_linear(ScaledRows(x, sums, 1e-5), weight)
    assert torch.equal(skinny_linear(ScaledRows(x[2:3], sums[2:3], 1e-5), weight)[0], together[2])
