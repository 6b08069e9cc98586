"""Arrays <-> the `bytes` columns of shard.proto: little-endian int32 and float32."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Int32Array = npt.NDArray[np.int32]
Float32Array = npt.NDArray[np.float32]

_INT32 = np.dtype("<i4")
_FLOAT32 = np.dtype("<f4")


def pack_int32(values: Sequence[int] | Int32Array) -> bytes:
    """Pack integers into an int32 column; raises OverflowError for one that does not fit."""
    return np.asarray(values, dtype=_INT32).tobytes()


def unpack_int32(column: bytes) -> Int32Array:
    """Unpack an int32 column; a read-only view of the message's memory."""
    return np.frombuffer(column, dtype=_INT32)


def pack_float32(values: Sequence[float] | Float32Array) -> bytes:
    """Pack numbers into a float32 column."""
    return np.asarray(values, dtype=_FLOAT32).tobytes()


def unpack_float32(column: bytes) -> Float32Array:
    """Unpack a float32 column; a read-only view of the message's memory."""
    return np.frombuffer(column, dtype=_FLOAT32)
