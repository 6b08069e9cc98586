"""A weight that activations are multiplied with: filled part by part, then kept in the form its partition asks for."""

import torch
import torch.nn.functional as F
from text_generation_kernels.gated_activation import silu_and_mul
from text_generation_kernels.int4_linear import GroupedWeight, Int4Weight, pack_int4
from text_generation_kernels.packed_linear import can_pack, pack
from text_generation_kernels.skinny_matmul import (
    ScaledRows,
    is_skinny,
    skinny_gated_linear,
    skinny_linear,
    skinny_linear_add_norm,
)
from torch import nn

from text_generation_shard.layers.cpu_linear import CpuLinear, cpu_linear
from text_generation_shard.layers.partition import CheckpointTensor, QuantisedTensor, WeightForm

# Up to so many rows the product in 4 bits is the faster one. With bfloat16 a whole forward pass was measured, whose
# weights come from memory each time (the demo model, 2 cores of a Xeon with AMX, ms): 4 bits 19 and bfloat16 31 at 4
# rows, 31 and 35 at 8, 45 and 43 at 12. With float32 one product (weight 3072 x 576, 2 cores of an AMD EPYC 9005, us):
# 29 and 140 at 1 row, 183 and 208 at 16, 356 and 332 at 32, and confined to AVX2 106 and 179 at 4, 192 and 164 at 5.
_MAX_INT4_ROWS = {
    ("AVX512", torch.bfloat16): 8,
    ("AVX512", torch.float32): 16,
    ("AVX2", torch.bfloat16): 4,
    ("AVX2", torch.float32): 4,
}
# The same with 8 bits: the demo model's head, 49152 x 576, right after its layers' products, ms: 1.9 and bfloat16 3.1
# at 1 row, 2.3 and 3.0 at 2, 2.7 and 3.1 at 3, 3.2 and 3.1 at 4 (2 cores of a Xeon with AMX).
_MAX_INT8_ROWS = {("AVX512", torch.bfloat16): 3}
# The halves are kept beside the bfloat16 weight, 1.25 bytes each: of heads alone, which have so many outputs.
_MIN_INT8_OUTPUTS = 16384


class ProductWeight:
    """Owns a parameter and what is made of it. Once packed, the parameter is empty unless rows of it are looked up."""

    def __init__(self, parameter: nn.Parameter, form: WeightForm, is_multiplied: bool = True) -> None:
        self.parameter = parameter
        self.is_multiplied = is_multiplied
        self.is_looked_up = False  # as well as multiplied
        self._form = form
        self._num_unfilled = len(parameter)
        self._groups: dict[int, GroupedWeight | None] = {}  # of each part, by its first row
        self._packed: torch.Tensor | None = None
        self._int4: Int4Weight | None = None
        self._max_int4_rows = 0

    def linear(self, x: torch.Tensor | ScaledRows, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x times the transposed weight, plus the bias."""  # [M, K] -> [M, N]
        if self.is_skinny(x):
            return skinny_linear(x, self.parameter, bias)
        assert isinstance(x, torch.Tensor)
        if x.device.type == "cpu":
            return cpu_linear(x, self.on_cpu(bias))
        return F.linear(x, self.parameter, bias)

    def on_cpu(self, bias: torch.Tensor | None) -> CpuLinear:
        """What products with it take on a CPU, once it is filled."""
        return CpuLinear(self._packed, self._int4, self._max_int4_rows, self.parameter, bias)

    def gated_linear(self, x: torch.Tensor | ScaledRows, bias: torch.Tensor | None = None) -> torch.Tensor:
        """silu of the product with the first half of the rows, times the product with the second half."""
        # [M, K] -> [M, N / 2]
        if bias is None and self.is_skinny(x):
            return skinny_gated_linear(x, self.parameter)
        return silu_and_mul(self.linear(x, bias))

    def linear_add_norm(
        self,
        x: torch.Tensor,  # [M, K]
        bias: torch.Tensor | None,  # [N]
        residual: torch.Tensor,  # [M, N]
        norm_weight: torch.Tensor,  # [N]
        eps: float,
    ) -> tuple[ScaledRows, torch.Tensor]:
        """The norm of product and residual, but for a division that the next product does, and their sum."""
        assert self.is_skinny(x)
        return skinny_linear_add_norm(x, self.parameter, bias, residual, norm_weight, eps)

    @property
    def is_packed(self) -> bool:
        """Whether products with it are a CPU's."""
        return self._packed is not None

    def is_skinny(self, x: torch.Tensor | ScaledRows) -> bool:
        """Whether the product is of few enough rows for the kernel that reads the weight once."""
        return isinstance(x, ScaledRows) or (not self.is_packed and is_skinny(x))

    def load(self, tensor: CheckpointTensor, own: slice, rows: slice, columns: slice | None = None) -> None:
        """Fill the rows `own` with a part of a checkpoint's tensor; the last part to come finishes the weight."""
        groups = None
        if self._form is WeightForm.QUANTISED and self.is_multiplied and isinstance(tensor, QuantisedTensor):
            groups = tensor.read_groups(rows, columns)
        if groups is None:
            tensor.copy_to(self.parameter[own], rows, columns)
        else:
            self.parameter[own].copy_(groups.values())
        self._filled(own, groups)

    def load_zeros(self, own: slice) -> None:
        """Fill the rows `own` with zeros."""
        self.parameter[own].zero_()
        self._filled(own, None)

    def _filled(self, own: slice, groups: GroupedWeight | None) -> None:
        self._groups[own.start] = groups
        self._num_unfilled -= own.stop - own.start
        assert self._num_unfilled >= 0, "every row is filled once"
        if self._num_unfilled == 0:
            if self.is_multiplied and self._form is not WeightForm.PLAIN and can_pack(self.parameter):
                self._pack()
            self._groups.clear()

    def _pack(self) -> None:
        parts = [groups for _, groups in sorted(self._groups.items()) if groups is not None]
        is_int8 = any(part.codes.dtype == torch.int8 for part in parts)
        if len(parts) == len(self._groups) and (not is_int8 or len(self.parameter) >= _MIN_INT8_OUTPUTS):
            max_rows = _MAX_INT8_ROWS if is_int8 else _MAX_INT4_ROWS
            capability = torch.backends.cpu.get_cpu_capability()
            self._max_int4_rows = max_rows.get((capability, self.parameter.dtype), 0)
            self._int4 = pack_int4(parts) if self._max_int4_rows else None
        self._packed = pack(self.parameter)
        if not self.is_looked_up:
            self.parameter.data = self.parameter.new_empty(0)
