"""RMSNorm against a float64 computation."""

import pytest
import torch
from text_generation_kernels.rms_norm import add_rms_norm, rms_norm

pytestmark = pytest.mark.interpreted

TOLERANCES = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
SHAPES = [(1, 64), (3, 100), (5, 257), (2, 1024), (0, 64)]


def exact_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.double()
    return wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


def random_inputs(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
    torch.manual_seed(shape[0] * 1000 + shape[1])
    x, residual = torch.randn(2, *shape).to(dtype)
    weight = (1 + 0.3 * torch.randn(shape[1])).to(dtype)
    return [tensor.to(device) for tensor in (x, residual, weight)]


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(shape, dtype, device):
    x, _, weight = random_inputs(shape, dtype, device)
    normed = rms_norm(x, weight, 1e-5)
    assert normed.dtype == dtype
    torch.testing.assert_close(
        normed.double(), exact_norm(x, weight, 1e-5), atol=TOLERANCES[dtype], rtol=TOLERANCES[dtype]
    )


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", SHAPES)
def test_add_rms_norm(shape, dtype, device):
    x, residual, weight = random_inputs(shape, dtype, device)
    before = residual.clone()
    normed, total = add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(residual, before), "the old residual is left alone"
    torch.testing.assert_close(total.double(), x.double() + residual.double(), atol=1e-6, rtol=torch.finfo(dtype).eps)
    torch.testing.assert_close(
        normed.double(), exact_norm(total, weight, 1e-5), atol=TOLERANCES[dtype], rtol=TOLERANCES[dtype]
    )


def test_eps_counts_for_small_rows(device):
    x = torch.full((2, 64), 1e-3, device=device)
    normed = rms_norm(x, torch.ones(64, device=device), 1e-3)
    torch.testing.assert_close(normed.double(), exact_norm(x, torch.ones(64, device=device), 1e-3), atol=1e-6, rtol=0)


def test_rows_of_a_wider_tensor(device):
    torch.manual_seed(5)
    wide = torch.randn(4, 96, device=device)
    weight = torch.ones(32, device=device)
    x, residual = wide[:, 32:64], wide[:, 64:]
    normed, total = add_rms_norm(x, residual, weight, 1e-5)
    torch.testing.assert_close(total, x + residual)
    torch.testing.assert_close(normed.double(), exact_norm(total, weight, 1e-5), atol=2e-6, rtol=2e-6)
