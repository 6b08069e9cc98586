"""Compiles what the warm-up of a model on this machine's GPU will launch: the process of `kernel_compilation`.

The warm-up itself is run, on tensors without memory, and its launches are noted.
"""

import argparse
import os
import sys
from dataclasses import replace
from typing import cast

import torch
from text_generation_kernels.attention_settings import AttentionShape
from text_generation_kernels.compilation import Variant, compile_variants, noted_launches
from text_generation_kernels.gpu import Gpu, gpu_of
from text_generation_kernels.sampling import SamplingParameters, choose_best, final_logprobs, sample
from text_generation_kernels.token_masks import mask_tokens, num_words

from text_generation_shard import distributed
from text_generation_shard.config import ShardConfig
from text_generation_shard.cuda_graphs import Launch
from text_generation_shard.execution import CausalModel
from text_generation_shard.gpu_execution import GpuExecution, GpuModel
from text_generation_shard.kv_cache import KvLayout, allocate_kv_caches
from text_generation_shard.layers.partition import Partition
from text_generation_shard.model_config import ModelConfig, load_model_config
from text_generation_shard.models import model_class
from text_generation_shard.parent_death import end_with_parent
from text_generation_shard.step_inputs import BatchLimits

META = torch.device("meta")
# Wrappers tell launches apart by powers of two of their rows, if at all.
SIZES = tuple(2**power for power in range(12))
CHANGED_SIZES = (1, 2, 16)
COLUMN_TYPES = (torch.float32, torch.int32, torch.int64)
MAX_NUM_SEQUENCES = 512
MAX_STEP_TOKENS = 4096


class RunOnce:
    """Stands for a recorder of graphs: launches once."""

    def record(self, launch: Launch) -> Launch:
        launch()
        return launch


def variants(config: ModelConfig, world_size: int, dtype: torch.dtype, gpu: Gpu) -> list[Variant]:
    """What a rank's warm-up and steps launch, all but what changes logits. No limit of the server matters to any."""
    # The first layer differs from those behind it, and layers of one window are alike.
    windows = (config.sliding_windows[0], *dict.fromkeys(config.sliding_windows))
    config = replace(config, num_layers=len(windows), sliding_windows=windows)
    layout = KvLayout(config.num_layers, config.num_kv_heads // world_size, config.head_dim, dtype)
    shape = AttentionShape(
        config.num_heads // world_size, layout.num_kv_heads, layout.head_dim, layout.block_size, dtype
    )
    limits = BatchLimits(
        vocab_size=config.vocab_size,
        block_size=layout.block_size,
        num_blocks=1,
        max_num_sequences=MAX_NUM_SEQUENCES,
        max_step_tokens=MAX_STEP_TOKENS,
        max_sequence_length=config.max_position_embeddings,
    )
    with noted_launches(gpu) as noted, distributed.assumed_group(world_size), torch.inference_mode():
        model = model_class(config.model_type)(config, Partition(0, world_size, dtype, META))
        gpu_model = GpuModel(cast(CausalModel, model), shape, config.hidden_size, dtype, windows)
        execution = GpuExecution(gpu_model, META, RunOnce(), SIZES)
        caches = allocate_kv_caches(layout, 1, META)
        execution.run_worst_case(limits, caches)
        execution.start(limits, caches)
        for count in CHANGED_SIZES:
            _launch_changed_head(count, config.vocab_size)
    return noted


def _launch_changed_head(count: int, vocab_size: int) -> None:
    """What samples from changed logits, which are float32: launched when the first request asks for that."""
    logits = torch.empty(count, vocab_size, dtype=torch.float32, device=META)
    floats, ints, wide = (torch.empty(count, dtype=dtype, device=META) for dtype in COLUMN_TYPES)
    mask_tokens(logits, torch.empty(count, num_words(vocab_size), dtype=torch.int32, device=META), ints)
    parameters = SamplingParameters(
        temperatures=floats, top_k=ints, top_p=floats, min_p=floats, typical_p=floats, seeds=wide, positions=wide
    )
    choose_best(logits)
    sample(logits, parameters)
    final_logprobs(logits, parameters)


def main() -> int:
    """0 when all are compiled."""
    from text_generation_shard.__main__ import config_from_json
    from text_generation_shard.serve import choose_dtype

    end_with_parent()
    parser = argparse.ArgumentParser(prog="kernel_variants", description=__doc__)
    parser.add_argument("--config-json", required=True, help="the shard's configuration")
    config: ShardConfig = config_from_json(parser.parse_args().config_json)
    model_config = load_model_config(config.model_folder)
    device = torch.device("cuda", config.rank)
    gpu = gpu_of(device)
    assert gpu is not None
    noted = variants(model_config, config.world_size, choose_dtype(config.dtype, model_config.dtype, device), gpu)
    return 1 if compile_variants(noted, gpu, len(os.sched_getaffinity(0)), end_with_parent) else 0


if __name__ == "__main__":
    sys.exit(main())
