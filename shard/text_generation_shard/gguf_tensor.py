"""GGUF tensors as numbers: dequantising, and undoing llama.cpp's order of rows."""

from collections.abc import Callable

import gguf.quants
import torch
from gguf.constants import GGMLQuantizationType

from text_generation_shard.gguf_file import BrokenGguf, GgufTensor
from text_generation_shard.model_config import UnsupportedModel

_BLOCK_SIZE = 32
_ROW_TYPES = ("F32", "F16")


class GgufSource:
    """A tensor of a GGUF file for the weight loader; see `CheckpointTensor`."""

    def __init__(self, tensor: GgufTensor, permuted_head_dim: int | None = None) -> None:
        self._tensor = tensor
        self._head_dim = permuted_head_dim

    @property
    def shape(self) -> tuple[int, ...]:
        return self._tensor.shape

    def read(self, rows: slice, columns: slice | None = None) -> torch.Tensor:
        """Those rows as numbers; of quantised rows all columns are computed before some are taken."""
        values = dequantise(self._tensor, rows)
        if self._head_dim is not None:
            values = _restore_halves(values, self._head_dim)
        return values if columns is None else values[:, columns]


def _restore_halves(values: torch.Tensor, head_dim: int) -> torch.Tensor:
    """llama.cpp stores dimension i of the first rotary half beside dimension i of the second."""
    assert values.shape[0] % head_dim == 0, "heads are read whole"
    pairs = values.reshape(-1, head_dim // 2, 2, *values.shape[1:])
    return pairs.transpose(1, 2).reshape(values.shape)


def dequantise(tensor: GgufTensor, rows: slice) -> torch.Tensor:
    """Rows `rows` of the tensor in float32, or in the type they are stored in if that is not quantised."""
    data = tensor.data[rows]
    if tensor.quant_type in _ROW_TYPES:
        return torch.from_numpy(data.copy())
    stored = torch.from_numpy(data.copy())  # [rows, bytes] uint8
    if tensor.quant_type == "BF16":
        return stored.view(torch.bfloat16)
    if tensor.quant_type in _FAST:
        block_bytes, expand = _FAST[tensor.quant_type]
        values = expand(stored.view(-1, block_bytes))
    else:
        try:
            values = torch.from_numpy(gguf.quants.dequantize(data, GGMLQuantizationType[tensor.quant_type]))
        except NotImplementedError as error:
            raise UnsupportedModel(f"GGUF type {tensor.quant_type} of {tensor.name} is not supported") from error
    shape = (len(data), *tensor.shape[1:])
    if values.numel() != torch.Size(shape).numel():
        raise BrokenGguf(f"GGUF tensor {tensor.name} does not hold {shape} numbers")
    return values.reshape(shape)


def _halves(blocks: torch.Tensor, offset: int) -> torch.Tensor:
    """The block's 4-bit numbers: lower halves of its 16 bytes first, then upper halves."""  # [n, 32] uint8
    packed = blocks[:, offset : offset + _BLOCK_SIZE // 2]
    return torch.cat((packed & 0x0F, packed >> 4), dim=1)


def _half_precision(blocks: torch.Tensor, offset: int) -> torch.Tensor:
    return blocks[:, offset : offset + 2].contiguous().view(torch.float16).float()  # [n, 1]


def _q4_0(blocks: torch.Tensor) -> torch.Tensor:
    return _halves(blocks, 2).float().sub_(8).mul_(_half_precision(blocks, 0))


def _q4_1(blocks: torch.Tensor) -> torch.Tensor:
    return _halves(blocks, 4).float().mul_(_half_precision(blocks, 0)).add_(_half_precision(blocks, 2))


def _q8_0(blocks: torch.Tensor) -> torch.Tensor:
    return blocks[:, 2:].view(torch.int8).float().mul_(_half_precision(blocks, 0))


# Types worth more than the gguf library's numpy: bytes of a block, and its 32 numbers.
_FAST: dict[str, tuple[int, Callable[[torch.Tensor], torch.Tensor]]] = {
    "Q4_0": (18, _q4_0),
    "Q4_1": (20, _q4_1),
    "Q8_0": (34, _q8_0),
}
