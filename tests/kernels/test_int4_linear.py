"""4-bit products against float64 products with the weights the codes stand for."""

import numpy as np
import pytest
import torch
from text_generation_kernels.int4_linear import GROUP_SIZE, GroupedWeight, int4_linear, pack_int4

EPSILON = 2**-8  # of bfloat16: twice its largest rounding error


def grouped(num_rows: int, num_columns: int, seed: int = 0, has_minimums: bool = True) -> GroupedWeight:
    generator = torch.Generator().manual_seed(seed)
    shape = (num_rows, num_columns // GROUP_SIZE)
    return GroupedWeight(
        torch.randint(0, 16, (num_rows, num_columns), dtype=torch.uint8, generator=generator),
        torch.rand(shape, generator=generator) + 0.5,
        -8 * torch.rand(shape, generator=generator) if has_minimums else None,
    )


def exact_values(weight: GroupedWeight) -> np.ndarray:
    """The weights in float64, group by group."""
    values = np.empty(weight.codes.shape)
    for row, column in np.ndindex(values.shape):
        group = (row, column // GROUP_SIZE)
        minimum = 0.0 if weight.minimums is None else float(weight.minimums[group])
        values[row, column] = float(weight.codes[row, column]) * float(weight.scales[group]) + minimum
    return values


@pytest.mark.parametrize("has_minimums", [True, False])
def test_values(has_minimums: bool) -> None:
    weight = grouped(3, 96, has_minimums=has_minimums)
    np.testing.assert_allclose(weight.values().numpy(), exact_values(weight), atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(16, 32), (48, 96), (80, 576), (1616, 64)])
@pytest.mark.parametrize("num_rows", [1, 3, 4, 5, 16, 33])
def test_product(num_rows: int, num_outputs: int, num_inputs: int, dtype: torch.dtype) -> None:
    """Two parts, one of them without minimums; the error is that of rounding x, scales, zeros and the product."""
    parts = [grouped(num_outputs // 2, num_inputs), grouped(num_outputs // 2, num_inputs, 1, has_minimums=False)]
    packed = pack_int4(parts)
    if packed is None:
        pytest.skip("this processor has no fast 4-bit product")
    x = torch.randn(num_rows, num_inputs, generator=torch.Generator().manual_seed(2)).to(dtype)
    product = int4_linear(x, packed)
    assert product.dtype == dtype

    values = torch.cat([part.values() for part in parts]).double()
    expected = x.double() @ values.T
    scales = torch.cat([part.scales for part in parts]).double().repeat_interleave(GROUP_SIZE, dim=1)
    codes = torch.cat([part.codes for part in parts]).double()
    zeros = values - (codes - 8) * scales
    sizes = (codes - 8).abs() * scales + zeros.abs() + values.abs()
    allowed = EPSILON / 2 * (x.double().abs() @ sizes.T + expected.abs()) + 1e-4
    assert ((product.double() - expected).abs() <= allowed).all()
    # Nothing is off as a whole: errors of single weights average out.
    assert (product.double() - expected).norm() <= 2 * EPSILON * expected.norm()


def test_product_of_a_step_without_rows() -> None:
    packed = pack_int4([grouped(16, 32)])
    if packed is None:
        pytest.skip("this processor has no fast 4-bit product")
    assert int4_linear(torch.empty(0, 32, dtype=torch.bfloat16), packed).shape == (0, 16)


def test_what_cannot_be_packed() -> None:
    assert pack_int4([grouped(24, 32)]) is None, "outputs are not tiles of 16"
    weight = grouped(16, 32)
    wide = GroupedWeight(weight.codes.view(torch.int8), weight.scales, None)
    assert pack_int4([weight, wide]) is None, "not all of one kind"


def test_8_bits_are_multiplied_in_halves() -> None:
    """Every code there is, one a row. Scales are rounded, and the product; halves err by as much as they are large."""
    codes = torch.arange(-128, 128).to(torch.int8)[:, None].expand(256, 64).contiguous()
    scales = torch.rand(256, 2, generator=torch.Generator().manual_seed(4)) + 0.5
    packed = pack_int4([GroupedWeight(codes[:96], scales[:96], None), GroupedWeight(codes[96:], scales[96:], None)])
    if packed is None:
        pytest.skip("this processor has no fast 4-bit product")
    x = torch.zeros(3, 64, dtype=torch.bfloat16)
    x[0, 5], x[1, 63], x[2, 31:33] = 1.0, -2.0, 0.5
    scale = scales.double().repeat_interleave(GROUP_SIZE, dim=1)
    expected = x.double() @ (codes.double() * scale).T
    sizes = (codes.double() // 16).abs() * 16 + 15
    allowed = EPSILON * (x.double().abs() @ (sizes * scale).T + expected.abs())
    assert ((int4_linear(x, packed).double() - expected).abs() <= allowed + 1e-6).all()
