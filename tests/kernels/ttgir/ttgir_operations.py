"""What each operation of TTGIR gives that no other warpgroup can tell, in numpy; memory of the GPU is flat arrays.

bfloat16 is float32 rounded to it. Operations other than those in use here are unknown.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from ttgir_text import Operation

DTYPES = {"i1": np.bool_, "i32": np.int32, "i64": np.int64, "f16": np.float16, "bf16": np.float32, "f32": np.float32}
PREDICATES: dict[str, np.ufunc] = {
    "eq": np.equal, "ne": np.not_equal, "slt": np.less, "sle": np.less_equal, "sgt": np.greater,
    "sge": np.greater_equal, "oeq": np.equal, "une": np.not_equal, "olt": np.less, "ole": np.less_equal,
    "ogt": np.greater, "oge": np.greater_equal,
}  # fmt: skip
RESHAPES: dict[str, Callable[..., Any]] = {
    "tt.splat": np.broadcast_to, "tt.broadcast": np.broadcast_to, "tt.expand_dims": np.reshape,
    "tt.reshape": np.reshape,
}  # fmt: skip


class Fault(Exception):
    """The kernel does what it must not: a race, a deadlock, an access outside an array."""


class Pointer(NamedTuple):
    """Elements of a flat array, by their places in it."""

    memory: np.ndarray
    places: Any

    def checked(self, mask: Any) -> np.ndarray:
        """The places, 0 for those that are masked."""
        places = np.where(mask, self.places, 0)
        if np.any((places < 0) | (places >= len(self.memory))):
            raise Fault(f"an access outside an array of {len(self.memory)}: {places.min()} to {places.max()}")
        return places


def _load(source: Pointer, mask: Any = True, other: Any = 0) -> np.ndarray:
    return np.where(mask, source.memory[source.checked(mask)], other)


def _store(target: Pointer, values: np.ndarray, mask: Any = True) -> None:
    mask = np.broadcast_to(mask, np.shape(target.places))
    target.memory[target.checked(mask)[mask]] = values[mask]


OF_VALUES: dict[str, Callable[..., Any]] = {
    "arith.addi": np.add, "arith.subi": np.subtract, "arith.muli": np.multiply, "arith.andi": np.bitwise_and,
    "arith.divsi": lambda left, right: (left - np.fmod(left, right)) // right, "arith.remsi": np.fmod,
    "arith.maxsi": np.maximum, "arith.minsi": np.minimum, "arith.addf": np.add, "arith.subf": np.subtract,
    "arith.mulf": np.multiply, "arith.divf": np.divide, "arith.maxnumf": np.fmax, "arith.select": np.where,
    "math.exp2": np.exp2, "math.log2": np.log2, "ttg.convert_layout": lambda value: value,
    "tt.load": _load, "tt.store": _store, "tt.split": lambda value: [value[..., 0], value[..., 1]],
}  # fmt: skip


def result_of(operation: Operation, operands: list[Any], program: int) -> Any:
    """One value, a list of several, or None."""
    name, shape, element = operation.name, operation.shape, operation.element
    if name in OF_VALUES:
        return OF_VALUES[name](*operands)
    if name in RESHAPES:
        value = operands[0]
        if isinstance(value, Pointer):
            return value._replace(places=RESHAPES[name](value.places, shape))
        return RESHAPES[name](value, shape)
    match name:
        case "arith.constant":
            return _constant(operation)
        case "arith.cmpi" | "arith.cmpf":
            return PREDICATES[operation.attribute(r"(\w+)")](*operands)
        case "arith.extsi":
            return operands[0].astype(DTYPES[element])
        case "arith.truncf":
            wide = torch.from_numpy(operands[0])
            return (wide.bfloat16().float() if element == "bf16" else wide.half()).numpy()
        case "tt.elementwise_inline_asm":
            if "griddepcontrol" not in operation.text:  # one program has no others to wait for
                raise NotImplementedError(operation.text)
            return np.int32(0)
        case "tt.addptr":
            return operands[0]._replace(places=operands[0].places + operands[1])
        case "tt.get_program_id":
            return np.int32(program)
        case "tt.make_range":
            start, end = (int(operation.attribute(rf"{name} = (\d+)")) for name in ("start", "end"))
            return np.arange(start, end, dtype=np.int32)
        case "tt.reduce":
            ufunc = OF_VALUES[operation.blocks[0].operations[0].name]
            return ufunc.reduce(operands[0], axis=int(operation.attribute(r"axis = (\d+)")))
        case "ttg.memdesc_index":
            tiles, index = operands
            if not 0 <= index < len(tiles):
                raise Fault(f"tile {index} of {len(tiles)}")
            return tiles[index]
        case "ttg.memdesc_trans":
            return operands[0]._replace(values=operands[0].values.T)
    raise NotImplementedError(f"{name}{operation.text}")


def _constant(operation: Operation) -> np.ndarray:
    text = operation.attribute(r"^ (?:dense<)?([\w.+-]+)")
    if text in ("true", "false"):
        return np.full(operation.shape, text == "true")
    dtype = DTYPES[operation.element]
    if not text.startswith("0x"):
        return np.full(operation.shape, dtype(text))
    bits = int(text, 16) << (16 if operation.element == "bf16" else 0)
    return np.full(operation.shape, np.array(bits, np.uint16 if dtype is np.float16 else np.uint32).view(dtype))
