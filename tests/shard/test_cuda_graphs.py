"""Which recording serves which size, and the buffer that steps are sent in; nothing here needs a GPU."""

import numpy as np
import pytest
import torch
from text_generation_shard.config import graph_sizes
from text_generation_shard.cuda_graphs import Launch, Recordings
from text_generation_shard.step_buffers import NUM_HOST_BUFFERS, StepBuffers


class Recorder:
    """Runs a launch when it is recorded and each time it is replayed."""

    def record(self, launch: Launch) -> Launch:
        launch()
        return launch


@pytest.mark.parametrize(
    ("size", "limit", "padded"),
    [(1, 9, 1), (2, 9, 4), (4, 9, 4), (5, 9, 8), (8, 9, 8), (9, 9, 9), (9, 12, 9), (9, 16, 16), (3, 3, 3), (0, 9, 1)],
)
def test_a_step_is_padded_to_the_next_recorded_size(size: int, limit: int, padded: int) -> None:
    assert Recordings(Recorder(), (8, 1, 4, 16)).padded_size(size, limit) == padded


def test_sizes_below_the_least_are_not_used() -> None:
    recordings = Recordings(Recorder(), (8, 1, 4, 16))
    assert [recordings.padded_size(size, 16, least=3) for size in (1, 2, 5)] == [4, 4, 8]
    assert recordings.padded_size(2, 16, least=17) == 2
    assert recordings.sizes_within(8, least=2) == [8, 4]


def test_without_sizes_nothing_is_padded() -> None:
    recordings = Recordings(Recorder(), ())
    assert recordings.padded_size(5, 100) == 5
    assert recordings.sizes_within(100) == []
    assert recordings.find("decode", 5) is None


def test_recordings_are_kept_apart_by_key_and_size() -> None:
    recordings, ran = Recordings(Recorder(), (1, 4)), []
    for key in ("decode", "mixed"):
        for size in recordings.sizes_within(4):
            recordings.record(key, size, lambda key=key, size=size: ran.append((key, size)))
    assert ran == [("decode", 4), ("decode", 1), ("mixed", 4), ("mixed", 1)]
    replay = recordings.find("mixed", 1)
    assert replay is not None
    replay()
    assert ran[-1] == ("mixed", 1)
    assert (recordings.find("mixed", 2), len(recordings)) == (None, 4)


def test_sizes_of_the_flag() -> None:
    assert graph_sizes("0") == ()
    assert graph_sizes("4, 8,1") == (4, 8, 1)
    assert max(graph_sizes(None)) == 2048
    for text in ("", "a", "4,0", "-1", "1.5", "4,,5"):
        with pytest.raises(ValueError, match="--cuda-graphs"):
            graph_sizes(text)


def test_a_buffer_arrives_as_it_was_filled() -> None:
    columns = {"ids": (np.int32, 3), "seeds": (np.int64, 2), "weights": (np.float32, 5)}
    buffers = StepBuffers(columns, torch.device("cpu"))
    sent = []
    for number in range(2 * NUM_HOST_BUFFERS):
        turn, host = buffers.next_host()
        host["ids"][:] = [number, -number, 7]
        host["seeds"][:] = [2**62 + number, -1]
        host["weights"][:] = number / 2
        sent.append(turn)
        before = buffers.device["weights"].clone()
        buffers.send(turn, until="weights")
        assert buffers.device["ids"].tolist() == [number, -number, 7]
        assert buffers.device["seeds"].tolist() == [2**62 + number, -1]
        assert buffers.device["weights"].equal(before)
        buffers.send(turn)
        assert buffers.device["weights"].tolist() == [number / 2] * 5
    assert all(len(set(sent[i : i + NUM_HOST_BUFFERS])) == NUM_HOST_BUFFERS for i in range(NUM_HOST_BUFFERS))
    assert all(column.data_ptr() % 64 == 0 for column in buffers.device.values())
