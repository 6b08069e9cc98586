"""Tensors of a safetensors file for the weight loader: mapped into memory, or streamed to a GPU."""

import json
import os
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from text_generation_shard.layers.partition import CheckpointTensor
from text_generation_shard.weight_stream import WeightStream

_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class BrokenSafetensors(ValueError):
    """The file is no safetensors file, or holds what cannot be a weight."""


def open_safetensors(
    path: Path, files: ExitStack, stream: WeightStream | None
) -> Iterator[tuple[str, CheckpointTensor]]:
    """The file's tensors, by name; without a stream they are mapped. The file stays open as long as `files`."""
    try:
        mapped = files.enter_context(safe_open(path, framework="pt"))
    except SafetensorError as error:
        raise BrokenSafetensors(f"{path} cannot be read as safetensors: {error}") from error
    names = mapped.keys()
    if stream is None:
        for name in names:
            yield name, MappedTensor(mapped, name)
        return
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    files.callback(os.close, file)
    start, header = _header(path)
    for name, entry in header.items():
        if entry["dtype"] not in _TYPES:
            raise BrokenSafetensors(f"{name} in {path} is of type {entry['dtype']}, supported are {', '.join(_TYPES)}")
        offset, shape = start + entry["data_offsets"][0], tuple(entry["shape"])
        yield name, StreamedTensor(stream, file, offset, shape, _TYPES[entry["dtype"]])


def _header(path: Path) -> tuple[int, dict[str, Any]]:
    """Where the tensors' bytes begin, and each tensor's entry; of a file that the library has checked."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return 8 + length, header


class MappedTensor:
    """A tensor that is read as it is copied; see `CheckpointTensor`."""

    def __init__(self, file: safe_open, name: str) -> None:
        self._slice = file.get_slice(name)  # type: ignore[no-untyped-call]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._slice.get_shape())

    def copy_to(self, destination: torch.Tensor, rows: slice, columns: slice | None = None) -> None:
        destination.copy_(self._slice[rows] if columns is None else self._slice[rows, columns])


class StreamedTensor:
    """A tensor that arrives when its stream is run; see `CheckpointTensor`."""

    def __init__(
        self, stream: WeightStream, file: int, offset: int, shape: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        self.shape = shape
        self._stream = stream
        self._place = (file, offset, shape, dtype)

    def copy_to(self, destination: torch.Tensor, rows: slice, columns: slice | None = None) -> None:
        self._stream.add(*self._place, rows, columns, destination)
