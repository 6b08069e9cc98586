"""Products with a weight that oneDNN has put, once, in the order its CPU kernels read it.

A product with the plain weight reorders or strides over it every time. On a 2-core AMD EPYC 9005 with AVX-512
(weight 3072 x 576), plain against packed: bfloat16 118 and 59 us at 1 row, 226 and 168 at 32, 987 and 934 at 256;
float32 410 and 140 us at 1 row, 4739 and 1957 at 256.
"""

import torch

_CAPABILITIES = ("AVX2", "AVX512")
# Rows that the order is made for. Products of the demo model's 30 layers, bfloat16, 2 cores of a Xeon with AMX, ms,
# without that number and with it: 17.1 and 16.9 at 8 rows, 25.4 and 23.3 at 47, 33.5 and 29.7 at 128, 210 and 204 at
# 2048; float32 within 3 % of each other.
_EXPECTED_ROWS = 8


def can_pack(weight: torch.Tensor) -> bool:
    """Whether oneDNN computes in this type on this machine."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if torch.backends.cpu.get_cpu_capability() not in _CAPABILITIES:
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32


def pack(weight: torch.Tensor) -> torch.Tensor:
    """The weight for `packed_linear`, which alone can read it."""  # [N, K]
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _EXPECTED_ROWS)
    return packed


def packed_linear(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x times the transposed weight, plus the bias."""  # [M, K] -> [M, N]
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", _no_scalars(), "")
    return product


def _no_scalars() -> list[int | float | complex | None]:
    return []  # by its type TorchScript tells it from a list of tensors
