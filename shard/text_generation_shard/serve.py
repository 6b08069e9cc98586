"""One rank's life: join the group, load the weights, listen, run steps until told to stop."""

import logging
import platform
import signal
from pathlib import Path
from typing import cast

import torch

from text_generation_shard import distributed
from text_generation_shard.changed_logits import Watermark
from text_generation_shard.config import ShardConfig, graph_sizes
from text_generation_shard.execution import CausalModel, Execution
from text_generation_shard.kernel_compilation import KernelCompilation
from text_generation_shard.kv_cache import KvLayout
from text_generation_shard.layers.partition import WeightForm
from text_generation_shard.logs import Timeline
from text_generation_shard.model_config import ModelConfig, load_model_config
from text_generation_shard.model_runner import ModelInfo, ModelRunner
from text_generation_shard.progress import ProgressFile
from text_generation_shard.server import ShardServer, ShardService
from text_generation_shard.step_loop import StepLoop
from text_generation_shard.warm_up import KvBudget
from text_generation_shard.weights import load_model

logger = logging.getLogger(__name__)


def choose_device(wanted: str | None, rank: int) -> torch.device:
    """The CPU or this rank's GPU, as the launcher wants it; without a launcher, a GPU where there is one.

    Raises RuntimeError when torch cannot use that GPU.
    """
    if wanted == "cpu" or (wanted is None and not torch.cuda.is_available()):
        return torch.device("cpu")
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if rank >= num_gpus:
        build = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        raise RuntimeError(
            f"rank {rank} is to run on a GPU of its own, but torch {torch.__version__}, built {build}, can use"
            f" {num_gpus}; install a torch that fits the driver, or hide the GPUs (CUDA_VISIBLE_DEVICES=) to run on the"
            " CPU"
        )
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    return device


def choose_dtype(configured: str | None, checkpoint: str | None, device: torch.device) -> torch.dtype:
    """The configured type, else the checkpoint's on a GPU; on a CPU bfloat16 only where it computes in it."""
    if configured is None and device.type == "cuda":
        configured = checkpoint if checkpoint in ("float16", "bfloat16", "float32") else "bfloat16"
    elif configured is None:
        configured = "bfloat16" if _computes_in_bfloat16() else "float32"
    dtype = getattr(torch, configured)
    assert isinstance(dtype, torch.dtype)
    return dtype


def _computes_in_bfloat16() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return platform.machine() == "x86_64" and "avx512_bf16" in flags


def choose_form(configured_dtype: str | None, device: torch.device) -> WeightForm:
    """A CPU multiplies with 4- and 8-bit weights of a checkpoint, unless a type was asked for: then with that alone."""
    if device.type != "cpu":
        return WeightForm.PLAIN
    return WeightForm.QUANTISED if configured_dtype is None else WeightForm.PACKED


def serve(config: ShardConfig, timeline: Timeline, compilation: KernelCompilation | None = None) -> None:
    """Run the shard until SIGTERM or SIGINT; raises what ended it otherwise."""
    progress = ProgressFile(config.run_folder, config.rank)
    runner = load_runner(config, timeline, progress)
    if compilation is not None:
        compilation.wait()
    distributed.all_reduce_min(0)  # no rank launches a kernel before the first one has seen to its compilation
    timeline.phase_ends("kernels")
    loop = StepLoop(runner, config.rank, config.world_size)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: loop.stop())
    server = ShardServer(ShardService(loop), config.uds_path, config.rank)
    server.start()
    timeline.phase_ends("socket")
    timeline.total()
    try:
        loop.run()
    finally:
        server.stop()
    # Not after an error: leaving can wait for a collective that will never end.
    distributed.leave_group()
    progress.close()


def load_runner(
    config: ShardConfig, timeline: Timeline, progress: ProgressFile, runner_class: type[ModelRunner] = ModelRunner
) -> ModelRunner:
    """Join the group and load this rank's part of the model; the runner is yet to be warmed up."""
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    device = choose_device(config.device, config.rank)
    model_config = load_model_config(config.model_folder)
    model_config.check_divisible(config.world_size)
    dtype = choose_dtype(config.dtype, model_config.dtype, device)
    distributed.join_group(
        config.rank, config.world_size, config.master_addr, config.master_port, device, config.master_listen_fd
    )
    timeline.phase_ends("group")
    is_dummy = config.load_format == "dummy"
    form = WeightForm.PLAIN if is_dummy else choose_form(config.dtype, device)
    weight_files = None if is_dummy else config.weight_files
    model = load_model(model_config, weight_files, dtype, device, config.rank, config.world_size, form)
    timeline.phase_ends("weights")
    if is_dummy:
        logger.warning("The weights are random (--load-format dummy): answers mean nothing")
    logger.info("%s in %s on %s", model_config.model_type, str(dtype).removeprefix("torch."), device)
    layout = KvLayout(
        model_config.num_layers, model_config.num_kv_heads // config.world_size, model_config.head_dim, dtype,
        is_joined=device.type == "cpu",
    )  # fmt: skip
    return runner_class(
        _execution(cast(CausalModel, model), model_config, layout, config, device),
        _model_info(model_config, device),
        layout,
        KvBudget(config.cpu_kv_bytes, config.cuda_memory_fraction, len(graph_sizes(config.cuda_graphs))),
        device,
        progress,
    )


def _execution(
    model: CausalModel, model_config: ModelConfig, layout: KvLayout, config: ShardConfig, device: torch.device
) -> Execution:
    """The device's way to run steps; what only a GPU needs is imported for a GPU alone."""
    watermark = Watermark.of(config.watermark_gamma, config.watermark_delta)
    if device.type == "cpu":
        from text_generation_shard.cpu_execution import CpuExecution

        return CpuExecution(model, watermark)
    from text_generation_kernels.attention_settings import AttentionShape
    from text_generation_kernels.compilation import log_compilations

    from text_generation_shard.cuda_graphs import CudaRecorder
    from text_generation_shard.gpu_execution import GpuExecution, GpuModel

    log_compilations()
    num_heads = model_config.num_heads // config.world_size
    shape = AttentionShape(num_heads, layout.num_kv_heads, layout.head_dim, layout.block_size, layout.dtype)
    gpu_model = GpuModel(model, shape, model_config.hidden_size, layout.dtype, model_config.sliding_windows)
    return GpuExecution(gpu_model, device, CudaRecorder(device), graph_sizes(config.cuda_graphs), watermark)


def _model_info(config: ModelConfig, device: torch.device) -> ModelInfo:
    properties = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return ModelInfo(
        device_name="cpu" if properties is None else properties.name,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_position_embeddings,
        num_layer_weights=config.num_layer_weights(distributed.world_size()),
        num_context_features=config.num_context_features(distributed.world_size()),
        # As the driver's tools write it.
        device_uuid="" if properties is None else f"GPU-{properties.uuid}",
    )
