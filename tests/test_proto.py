"""The generated stubs are those of shard.proto, and columns survive the wire."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from text_generation_proto import columns

PACKAGE = Path(__file__).resolve().parent.parent / "proto" / "text_generation_proto"


def test_stubs_are_generated_from_the_proto_file(tmp_path):
    command = [sys.executable, "-m", "text_generation_proto.generate", str(tmp_path)]
    subprocess.run(command, check=True)
    names = ["shard_pb2.py", "shard_pb2.pyi", "shard_pb2_grpc.py"]
    for name in names:
        generated = (tmp_path / "text_generation_proto" / name).read_text()
        assert generated == (PACKAGE / name).read_text(), f"{name} is stale: run `make stubs`"


def test_columns_are_little_endian():
    assert columns.pack_int32([1, -1]) == bytes([1, 0, 0, 0, 255, 255, 255, 255])
    assert columns.pack_float32([1.0]) == bytes([0, 0, 128, 63])
    assert columns.unpack_int32(b"\x02\x01\x00\x00").tolist() == [258]
    assert columns.unpack_float32(bytes([0, 0, 0, 192])).tolist() == [-2.0]


def test_a_number_too_large_for_its_column_is_refused():
    with pytest.raises(OverflowError):
        columns.pack_int32([2**31])


def test_columns_take_arrays():
    values = np.array([3, 4], dtype=np.int32)
    assert columns.unpack_int32(columns.pack_int32(values)).tolist() == [3, 4]
