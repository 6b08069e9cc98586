"""Real groups of processes: a split model answers like transformers' whole one, on every rank."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from text_generation_shard import distributed
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

TOKENS = [5, 99, 0, 100, 41, 7, 7, 63, 12]
RANK = Path(__file__).with_name("tensor_parallel_rank.py")
SIZES = {
    "hidden_size": 48,
    "intermediate_size": 84,
    "num_hidden_layers": 2,
    "num_attention_heads": 12,
    "num_key_value_heads": 6,
    "vocab_size": 101,
    "max_position_embeddings": 16,
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize(
    ("world_size", "config"),
    [
        (2, LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)),
        (3, Qwen2Config(**SIZES, tie_word_embeddings=True)),
    ],
    ids=["llama-2", "qwen2-tied-3"],
)
def test_split_model_equals_transformers(world_size: int, config: LlamaConfig | Qwen2Config, tmp_path: Path) -> None:
    torch.manual_seed(0)
    reference = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.normal_(0.0, 0.5 if parameter.dim() == 1 else parameter.shape[1] ** -0.5)
        expected = reference(torch.tensor([TOKENS])).logits[0]
    reference.save_pretrained(tmp_path)
    port = free_port()
    ranks = [
        subprocess.Popen(
            [sys.executable, RANK, tmp_path, str(rank), str(world_size), str(port)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    assert [process.returncode for process in ranks] == [0] * world_size, "\n".join(errors)
    results = [load_file(tmp_path / f"rank-{rank}.safetensors") for rank in range(world_size)]
    whole = sum(parameter.numel() for parameter in reference.parameters())
    for result in results:
        torch.testing.assert_close(result["logits"], expected, atol=1e-4, rtol=1e-4)
        assert torch.equal(result["logits"], results[0]["logits"])
        assert result["num_parameters"] < whole / world_size * 1.1


def test_alone_there_is_no_group() -> None:
    distributed.join_group(0, 1, "localhost", 1, torch.device("cpu"))
    assert not torch.distributed.is_initialized()
    assert (distributed.rank(), distributed.world_size(), distributed.all_reduce_min(7)) == (0, 1, 7)
    tensor = torch.arange(6.0).view(2, 3)
    for collective in (distributed.all_reduce, distributed.all_gather, distributed.broadcast):
        assert collective(tensor) is tensor
    distributed.leave_group()
