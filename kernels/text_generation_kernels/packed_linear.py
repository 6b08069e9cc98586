"""Products with a weight that oneDNN has put, once, in the order its CPU kernels read it.

A product with the plain weight reorders or strides over it every time. On a 2-core AMD EPYC 9005 with AVX-512
(weight 3072 x 576), plain against packed: bfloat16 118 and 59 us at 1 row, 226 and 168 at 32, 987 and 934 at 256;
float32 410 and 140 us at 1 row, 4739 and 1957 at 256.
"""

import torch

_CAPABILITIES = ("AVX2", "AVX512")


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
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    return packed


def packed_linear(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x times the transposed weight, plus the bias."""  # [M, K] -> [M, N]
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return product
