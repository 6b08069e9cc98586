"""Weights streamed by several threads: the same parameters as those read through the memory map, on every rank."""

import itertools
import os
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from text_generation_shard.layers.partition import Partition, WeightTarget
from text_generation_shard.model_config import ModelConfig, load_model_config
from text_generation_shard.models import model_class
from text_generation_shard.safetensors_file import BrokenSafetensors, open_safetensors
from text_generation_shard.weight_stream import StreamError, WeightStream, read_fully
from text_generation_shard.weights import WeightError, load_model
from torch import nn
from transformers import AutoModelForCausalLM, Qwen2Config

CPU = torch.device("cpu")
# Qwen2 has vectors that are cut, and 53 is no multiple of two: the last rank's embedding has rows of zeros.
CONFIG = Qwen2Config(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=53, max_position_embeddings=32, tie_word_embeddings=False,
)  # fmt: skip


class LateLane:
    """Copies as late as it may: when a buffer is asked for again, or at the end."""

    def __init__(self, num_bytes: int) -> None:
        self._buffers = [torch.zeros(num_bytes, dtype=torch.uint8) for _ in range(2)]
        self._due: list[tuple[torch.Tensor, slice | None, torch.Tensor]] = []
        self.thread = threading.current_thread()

    def next_buffer(self) -> torch.Tensor:
        if len(self._due) == len(self._buffers):
            self._copy_first()
        self._buffers.reverse()
        return self._buffers[0]

    def copy(self, rows: torch.Tensor, columns: slice | None, destination: torch.Tensor) -> None:
        assert threading.current_thread() is self.thread
        time.sleep(0.001)  # the other threads' turn
        self._due.append((rows, columns, destination))

    def finish(self) -> None:
        while self._due:
            self._copy_first()

    def _copy_first(self) -> None:
        rows, columns, destination = self._due.pop(0)
        destination.copy_(rows if columns is None else rows[:, columns])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG)
    for parameter in model.parameters():
        parameter.data.normal_()
    model.save_pretrained(folder)
    return folder


def build(config: ModelConfig, partition: Partition) -> tuple[nn.Module, dict[str, WeightTarget]]:
    model = model_class(config.model_type)(config, partition)
    for parameter in model.parameters():
        parameter.fill_(torch.nan)
    return model, model.targets()  # type: ignore[operator]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (0, 2), (1, 2)])
def test_streamed_weights_are_the_mapped_ones(checkpoint: Path, rank: int, world_size: int, dtype: torch.dtype) -> None:
    config, partition = load_model_config(str(checkpoint)), Partition(rank, world_size, dtype, CPU)
    lanes: list[LateLane] = []

    def make_lane(num_bytes: int) -> LateLane:
        lanes.append(LateLane(num_bytes))
        return lanes[-1]

    # Pieces of 1000 bytes cut every matrix, some of them at a row that is not whole.
    streams = (None, WeightStream(make_lane, num_threads=3, piece_bytes=1000))
    models = []
    for stream in streams:
        model, targets = build(config, partition)
        with torch.inference_mode(), ExitStack() as files:
            for name, tensor in open_safetensors(checkpoint / "model.safetensors", files, stream):
                assert tensor.shape == targets[name].shape
                targets[name].load(tensor)
            if stream is not None:
                assert model.get_parameter("norm.weight").isnan().all()  # nothing is read before all names are known
                stream.run()
        models.append(model)
    for (name, mapped), (_, streamed) in zip(models[0].named_parameters(), models[1].named_parameters(), strict=True):
        assert torch.equal(mapped, streamed), name
    assert len({lane.thread for lane in lanes}) == 3


def test_an_error_in_one_thread_ends_all(checkpoint: Path) -> None:
    copied, numbers = [], itertools.count(1)

    class Failing(LateLane):
        def copy(self, rows: torch.Tensor, columns: slice | None, destination: torch.Tensor) -> None:
            copied.append(destination)
            number = next(numbers)
            if number == 5:
                raise torch.OutOfMemoryError("no room")
            if number > 5:
                time.sleep(0.02)  # so that the error is known before the other threads have gone far
            super().copy(rows, columns, destination)

    stream = WeightStream(Failing, num_threads=3, piece_bytes=256)
    _, targets = build(load_model_config(str(checkpoint)), Partition(0, 1, torch.float32, CPU))
    with ExitStack() as files:
        for name, tensor in open_safetensors(checkpoint / "model.safetensors", files, stream):
            targets[name].load(tensor)
        with pytest.raises(torch.OutOfMemoryError, match="no room"):
            stream.run()
    assert len(copied) < 20  # of more than a thousand


def test_reads_go_on_where_they_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, whole = tmp_path / "file", os.urandom(100)
    path.write_bytes(whole)
    read = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, buffers, offset: read(file, [buffers[0][:7]], offset))
    with path.open("rb") as file:
        buffer = bytearray(60)
        read_fully(file.fileno(), memoryview(buffer), 33)
        assert bytes(buffer) == whole[33:93]
        with pytest.raises(StreamError, match="ends before"):
            read_fully(file.fileno(), memoryview(buffer), 50)


def test_types_that_are_no_weights_are_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(4, dtype=torch.int8)}, tmp_path / "model.safetensors")
    stream = WeightStream(LateLane, num_threads=1)
    with ExitStack() as files, pytest.raises(BrokenSafetensors, match=r"a in .* is of type I8, supported are F64"):
        list(open_safetensors(tmp_path / "model.safetensors", files, stream))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(checkpoint: Path, dtype: torch.dtype) -> None:
    """The last one: threads that stayed on the first would be noticed."""
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    config, files = load_model_config(str(checkpoint)), [checkpoint / "model.safetensors"]
    host, gpu = (load_model(config, files, dtype, place) for place in (CPU, device))
    for (name, expected), (_, actual) in zip(host.named_parameters(), gpu.named_parameters(), strict=True):
        assert actual.device == device
        assert torch.equal(actual.cpu(), expected), name
    with pytest.raises(WeightError, match="lacks"):
        load_model(config, files[:0], dtype, device)
