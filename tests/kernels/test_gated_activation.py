"""Gated activations against a float64 computation."""

import math

import pytest
import torch
from text_generation_kernels.gated_activation import gated_activation, silu_and_mul

pytestmark = pytest.mark.interpreted

TOLERANCES = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def exact(x: torch.Tensor, activation: str) -> torch.Tensor:
    gate, up = x.double().chunk(2, dim=-1)
    if activation == "silu":
        return gate / (1 + (-gate).exp()) * up
    if activation == "gelu":
        return 0.5 * gate * (1 + torch.erf(gate / math.sqrt(2))) * up
    return 0.5 * gate * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))) * up


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize(("num_rows", "width"), [(1, 8), (3, 1500), (2, 1024), (0, 8), (5, 33)])
def test_gated_activation(num_rows, width, activation, dtype, device):
    torch.manual_seed(width)
    x = (2 * torch.randn(num_rows, 2 * width)).to(dtype).to(device)
    output = gated_activation(x, activation)
    assert output.shape == (num_rows, width)
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(output.double(), exact(x, activation), atol=tolerance, rtol=tolerance)


def test_large_values_stay_finite(device):
    x = torch.tensor([[-500.0, 500.0, -90.0, 90.0, 1.0, 1.0, 1.0, 1.0]], device=device)
    torch.testing.assert_close(silu_and_mul(x), torch.tensor([[0.0, 500.0, 0.0, 90.0]], device=device))
