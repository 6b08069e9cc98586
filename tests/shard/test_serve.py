"""Which device a rank runs on, on machines that only torch's answers describe."""

import pytest
import torch
from text_generation_shard.serve import choose_device


@pytest.fixture
def num_gpus(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """As many GPUs as the test says; answers the devices that were made current."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: request.param > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: request.param)
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    return chosen


@pytest.mark.parametrize(
    ("num_gpus", "wanted", "rank", "device"),
    [
        (0, None, 1, "cpu"),
        (0, "cpu", 1, "cpu"),
        (2, "cpu", 1, "cpu"),
        (2, None, 1, "cuda:1"),
        (2, "cuda", 0, "cuda:0"),
    ],
    indirect=["num_gpus"],
)
def test_a_rank_runs_where_it_is_told(num_gpus: list[torch.device], wanted: str | None, rank: int, device: str) -> None:
    assert choose_device(wanted, rank) == torch.device(device)
    assert num_gpus == ([] if device == "cpu" else [torch.device(device)])


@pytest.mark.parametrize(
    ("num_gpus", "wanted", "rank"), [(0, "cuda", 0), (1, "cuda", 1), (2, None, 2)], indirect=["num_gpus"]
)
def test_a_gpu_that_torch_does_not_have_is_refused(num_gpus: list[torch.device], wanted: str | None, rank: int) -> None:
    with pytest.raises(RuntimeError, match=f"rank {rank} .*CUDA_VISIBLE_DEVICES="):
        choose_device(wanted, rank)
    assert num_gpus == []
