"""Arrays <-> the `bytes` columns of shard.proto: little-endian int32 and float32, and strings of bytes."""

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


def pack_strings(values: Sequence[bytes]) -> tuple[bytes, bytes]:
    """Pack strings of bytes into a column of their lengths and one of all of them, concatenated."""
    return pack_int32([len(value) for value in values]), b"".join(values)


def unpack_strings(lengths: bytes, joined: bytes) -> list[bytes]:
    """The strings of two such columns; raises ValueError for columns that do not fit each other."""
    sizes = unpack_int32(lengths)
    ends = sizes.cumsum(dtype=np.int64).tolist()
    if (len(sizes) and int(sizes.min()) < 0) or (ends[-1] if ends else 0) != len(joined):
        raise ValueError(f"the lengths of strings do not add up to {len(joined)} bytes")
    return [joined[start:end] for start, end in zip([0, *ends], ends, strict=False)]
