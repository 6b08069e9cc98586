"""One rank of a group, started by test_distributed.py: loads a model, prefills, decodes, saves its logits."""

import sys
from pathlib import Path

import numpy as np
import psutil
import torch
from safetensors.torch import save_file
from text_generation_kernels.cpu_attention_plan import CpuAttentionPlan
from text_generation_shard import distributed
from text_generation_shard.forward_context import ForwardContext, forward_context
from text_generation_shard.kv_cache import KvCaches
from text_generation_shard.model_config import load_model_config
from text_generation_shard.weights import load_model

TOKENS = [5, 99, 0, 100, 41, 7, 7, 63, 12]


def context(position: int, count: int, caches: KvCaches) -> ForwardContext:
    positions = np.arange(position, position + count)
    plan = CpuAttentionPlan(
        block_tables=np.arange(3, dtype=np.int32)[None],
        query_starts=np.array([0, count], np.int32),
        sequence_lengths=np.array([position + count], np.int32),
        positions=positions,
        slot_mapping=positions,
        cache=caches[0][0],
    )
    return ForwardContext(caches, plan)


def main(folder: Path, rank: int, world_size: int, port: int) -> None:
    torch.set_num_threads(1)
    device = torch.device("cpu")
    distributed.join_group(rank, world_size, "localhost", port, device)
    assert (distributed.rank(), distributed.world_size()) == (rank, world_size)
    assert distributed.all_reduce_min(10 - rank) == 11 - world_size
    assert distributed.broadcast(torch.tensor([rank + 3])).tolist() == [3]
    config = load_model_config(folder)
    model = load_model(config, [folder / "model.safetensors"], torch.float32, device, rank, world_size)
    shape = (3, 4, 2 * config.num_kv_heads // world_size, config.head_dim)
    caches: KvCaches = [(torch.zeros(shape),) for _ in range(config.num_layers)]
    logits = []
    with torch.inference_mode():
        for position, count in ((0, 7), (7, 1), (8, 1)):
            ids = torch.tensor(TOKENS[position : position + count])
            with forward_context(context(position, count, caches)):
                hidden = model(ids, torch.arange(position, position + count))
            logits.append(model.compute_logits(hidden))
    listening = [c.laddr.ip for c in psutil.Process().net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert set(listening) <= {"127.0.0.1"}, listening
    num_parameters = torch.tensor(sum(parameter.numel() for parameter in model.parameters()))
    save_file({"logits": torch.cat(logits), "num_parameters": num_parameters}, folder / f"rank-{rank}.safetensors")
    distributed.leave_group()


main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
