"""Products with packed weights against float64."""

import pytest
import torch
from text_generation_kernels.packed_linear import can_pack, pack, packed_linear

# Of the product of absolute values: the rounding of the result, and of sums in float32.
TOLERANCES = {torch.bfloat16: 2**-8, torch.float32: 2**-20}


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(16, 32), (101, 7), (960, 576)])
@pytest.mark.parametrize("num_rows", [1, 3, 5, 64, 257])
def test_product(num_rows: int, num_outputs: int, num_inputs: int, has_bias: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(shape, generator=generator).to(dtype)
        for shape in ((num_rows, num_inputs), (num_outputs, num_inputs), (num_outputs,))
    )
    if not can_pack(weight):
        pytest.skip("this processor does not compute in the type")
    product = packed_linear(x, pack(weight), bias if has_bias else None)
    assert product.dtype == dtype
    expected = x.double() @ weight.double().T + (bias.double() if has_bias else 0)
    allowed = TOLERANCES[dtype] * (x.double().abs() @ weight.double().abs().T + bias.double().abs())
    assert ((product.double() - expected).abs() <= allowed).all()


def test_what_cannot_be_packed() -> None:
    assert not can_pack(torch.empty(16, 16, dtype=torch.float64))
    assert not can_pack(torch.empty(16, 16, device="meta"))
