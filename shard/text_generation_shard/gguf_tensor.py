"""GGUF tensors as numbers: dequantising, or as groups of codes, and undoing llama.cpp's order of rows."""

from collections.abc import Callable

import gguf.quants
import torch
from gguf.constants import GGMLQuantizationType
from text_generation_kernels.int4_linear import GROUP_SIZE, GroupedWeight

from text_generation_shard.gguf_file import BrokenGguf, GgufTensor
from text_generation_shard.model_config import UnsupportedModel

_ROW_TYPES = ("F32", "F16")


class GgufSource:
    """A tensor of a GGUF file for the weight loader; see `QuantisedTensor`."""

    def __init__(self, tensor: GgufTensor, permuted_head_dim: int | None = None) -> None:
        self._tensor = tensor
        self._head_dim = permuted_head_dim

    @property
    def shape(self) -> tuple[int, ...]:
        return self._tensor.shape

    def read(self, rows: slice, columns: slice | None = None) -> torch.Tensor:
        """Those rows as numbers; of quantised rows all columns are computed before some are taken."""
        values = self._in_order(dequantise(self._tensor, rows))
        return values if columns is None else values[:, columns]

    def copy_to(self, destination: torch.Tensor, rows: slice, columns: slice | None = None) -> None:
        """Bring those rows there at once."""
        destination.copy_(self.read(rows, columns))

    def read_groups(self, rows: slice, columns: slice | None = None) -> GroupedWeight | None:
        """Those rows as groups of codes; None where the type has none, or the columns cut a group."""
        first, end = (0, self.shape[-1]) if columns is None else (columns.start, columns.stop)
        if self._tensor.quant_type not in _GROUPED or first % GROUP_SIZE or end % GROUP_SIZE:
            return None
        stored = grouped(self._tensor, rows)
        groups = slice(first // GROUP_SIZE, end // GROUP_SIZE)
        minimums = stored.minimums
        return GroupedWeight(
            self._in_order(stored.codes)[:, first:end],
            self._in_order(stored.scales)[:, groups],
            None if minimums is None else self._in_order(minimums)[:, groups],
        )

    def _in_order(self, rows: torch.Tensor) -> torch.Tensor:
        return rows if self._head_dim is None else _restore_halves(rows, self._head_dim)


def _restore_halves(values: torch.Tensor, head_dim: int) -> torch.Tensor:
    """llama.cpp stores dimension i of the first rotary half beside dimension i of the second."""
    assert values.shape[0] % head_dim == 0, "heads are read whole"
    pairs = values.reshape(-1, head_dim // 2, 2, *values.shape[1:])
    return pairs.transpose(1, 2).reshape(values.shape)


def dequantise(tensor: GgufTensor, rows: slice) -> torch.Tensor:
    """Rows `rows` of the tensor in float32, or in the type they are stored in if that is not quantised."""
    if tensor.quant_type in _GROUPED:
        return grouped(tensor, rows).values()
    data = tensor.data[rows]
    if tensor.quant_type in _ROW_TYPES:
        return torch.from_numpy(data.copy())
    if tensor.quant_type == "BF16":
        return torch.from_numpy(data.copy()).view(torch.bfloat16)  # [rows, bytes] uint8
    try:
        values = torch.from_numpy(gguf.quants.dequantize(data, GGMLQuantizationType[tensor.quant_type]))
    except NotImplementedError as error:
        raise UnsupportedModel(f"GGUF type {tensor.quant_type} of {tensor.name} is not supported") from error
    shape = (len(data), *tensor.shape[1:])
    if values.numel() != torch.Size(shape).numel():
        raise BrokenGguf(f"GGUF tensor {tensor.name} does not hold {shape} numbers")
    return values.reshape(shape)


def grouped(tensor: GgufTensor, rows: slice) -> GroupedWeight:
    """Rows `rows` of a tensor of one of the types whose blocks are groups."""
    stored = torch.from_numpy(tensor.data[rows].copy())  # [rows, bytes] uint8
    block_bytes, split = _GROUPED[tensor.quant_type]
    num_groups = stored.shape[1] // block_bytes
    if (num_groups * block_bytes, num_groups * GROUP_SIZE) != (stored.shape[1], tensor.shape[1]):
        raise BrokenGguf(f"GGUF tensor {tensor.name} does not hold rows of {tensor.shape[1]} numbers")
    codes, scales, minimums = split(stored.view(-1, block_bytes))
    shape = (len(stored), num_groups)
    return GroupedWeight(
        codes.view(len(stored), tensor.shape[1]),
        scales.view(shape),
        None if minimums is None else minimums.view(shape),
    )


# Codes [n, 32], scales [n, 1] and minimums [n, 1] of blocks.
_Groups = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


def _halves(blocks: torch.Tensor, offset: int) -> torch.Tensor:
    """The block's 4-bit numbers: lower halves of its 16 bytes first, then upper halves."""  # [n, 32] uint8
    packed = blocks[:, offset : offset + GROUP_SIZE // 2]
    return torch.cat((packed & 0x0F, packed >> 4), dim=1)


def _half_precision(blocks: torch.Tensor, offset: int) -> torch.Tensor:
    return blocks[:, offset : offset + 2].contiguous().view(torch.float16).float()  # [n, 1]


def _q4_0(blocks: torch.Tensor) -> _Groups:
    scales = _half_precision(blocks, 0)
    return _halves(blocks, 2), scales, scales * -8


def _q4_1(blocks: torch.Tensor) -> _Groups:
    return _halves(blocks, 4), _half_precision(blocks, 0), _half_precision(blocks, 2)


def _q8_0(blocks: torch.Tensor) -> _Groups:
    return blocks[:, 2:].contiguous().view(torch.int8), _half_precision(blocks, 0), None


# Types whose blocks are groups: bytes of a block, and how it is split.
_GROUPED: dict[str, tuple[int, Callable[[torch.Tensor], _Groups]]] = {
    "Q4_0": (18, _q4_0),
    "Q4_1": (20, _q4_1),
    "Q8_0": (34, _q8_0),
}
