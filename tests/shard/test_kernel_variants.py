"""Kernels compiled before their launch: launches on real tensors ask for nothing else, and find it in the cache."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from text_generation_kernels import attention_settings, compilation, dispatch, launch_settings
from text_generation_kernels.attention_settings import AttentionShape
from text_generation_kernels.compilation import Variant, compile_variants, noted_launches
from text_generation_kernels.gpu import Gpu
from text_generation_kernels.sampling import SamplingParameters, choose_best, final_logprobs, sample
from text_generation_kernels.token_masks import mask_tokens, num_words
from text_generation_shard import kernel_compilation
from text_generation_shard.config import DEFAULT_GRAPH_SIZES, ShardConfig
from text_generation_shard.gpu_execution import GpuExecution, GpuModel
from text_generation_shard.kernel_compilation import KernelCompilation, compiled_mark, start_compilation
from text_generation_shard.kernel_variants import RunOnce, variants
from text_generation_shard.kv_cache import KvCaches, KvLayout
from text_generation_shard.layers.partition import Partition
from text_generation_shard.model_config import ModelConfig, parse_model_config
from text_generation_shard.models import model_class
from text_generation_shard.step_inputs import BatchLimits
from torch.nn import functional
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

H100 = Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132)
A100 = Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108)
CPU = torch.device("cpu")
# Every other one: each launch costs the test as much as compiling's first half.
GRAPH_SIZES = DEFAULT_GRAPH_SIZES[::2]
SIZES: dict[str, Any] = {
    "hidden_size": 144, "intermediate_size": 288, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 1000, "max_position_embeddings": 1024, "tie_word_embeddings": False,
    "head_dim": 64,
}  # fmt: skip
MIXED_WINDOWS = {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"], "sliding_window": 100}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "mistral": MistralConfig(**SIZES, sliding_window=128),
    "qwen2": Qwen2Config(**SIZES, use_sliding_window=True, max_window_layers=1, **MIXED_WINDOWS),
    "qwen3": Qwen3Config(**SIZES | {"head_dim": 128}),
}


def parse(name: str) -> ModelConfig:
    return parse_model_config(CONFIGS[name].to_dict())


@contextmanager
def kernels_on_cpu(monkeypatch: pytest.MonkeyPatch, gpu: Gpu) -> Iterator[None]:
    """Tensors of this machine go to the kernels as if they lay on the GPU."""
    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "INTERPRETS", True)
        for module in (attention_settings, dispatch, launch_settings):
            patch.setattr(module, "gpu_of", lambda device: gpu)
        # No kernel has written the ids of the tokens.
        patch.setattr(functional, "embedding", lambda ids, weight: weight.new_zeros(len(ids), weight.shape[1]))
        yield


@torch.inference_mode()
def launch_everything(config: ModelConfig, dtype: torch.dtype) -> None:
    """Warm-up and some unpadded steps, on tensors with memory and under limits that are multiples of nothing."""
    layout = KvLayout(config.num_layers, config.num_kv_heads, config.head_dim, dtype)
    shape = AttentionShape(config.num_heads, config.num_kv_heads, config.head_dim, layout.block_size, dtype)
    limits = BatchLimits(
        vocab_size=config.vocab_size, block_size=16, num_blocks=37, max_num_sequences=261, max_step_tokens=701,
        max_sequence_length=37 * 16,
    )  # fmt: skip
    model = model_class(config.model_type)(config, Partition(0, 1, dtype, CPU))
    gpu_model = GpuModel(model, shape, config.hidden_size, dtype, config.sliding_windows)  # type: ignore[arg-type]
    execution = GpuExecution(gpu_model, CPU, RunOnce(), GRAPH_SIZES)
    cache = torch.zeros(3, layout.num_kv_heads, layout.block_size, layout.head_dim, dtype=dtype)
    caches: KvCaches = [(cache, cache.clone()) for _ in range(layout.num_layers)]
    execution.run_worst_case(limits, caches)
    execution.start(limits, caches)
    for size in (3, 17, 259, 701):
        execution._run_layers("mixed", size)
    for size in (3, 17, 259):
        for has_random in (True, False):
            execution._run_head(size, has_random)


@torch.inference_mode()
def launch_changed_head(count: int, vocab_size: int) -> None:
    """Sampling from float32 logits, on tensors with memory."""
    logits, rows = torch.zeros(count, vocab_size), torch.zeros(count, dtype=torch.int32)
    mask_tokens(logits, torch.zeros(count, num_words(vocab_size), dtype=torch.int32), rows)
    ones, longs = torch.ones(count), torch.zeros(count, dtype=torch.int64)
    parameters = SamplingParameters(ones, rows, ones, ones, ones, longs, longs)
    sample(logits, parameters)
    choose_best(logits)
    final_logprobs(logits, parameters)


def texts(noted: list[Variant]) -> dict[str, str]:
    """Each variant's specialisation, and the kernel's name."""
    return {variant.specialization: variant.name for variant in noted}


@pytest.mark.parametrize(
    ("name", "gpu", "dtype"),
    [
        ("llama", H100, torch.bfloat16),
        ("mistral", A100, torch.bfloat16),
        ("qwen2", H100, torch.float16),
        ("qwen3", H100, torch.float32),
    ],
)
def test_launches_on_tensors_with_memory_are_foreseen(
    name: str, gpu: Gpu, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = parse(name)
    foreseen = texts(variants(config, 1, dtype, gpu))
    with kernels_on_cpu(monkeypatch, gpu), noted_launches(gpu) as noted:
        launch_everything(config, dtype)
        for count in (1, 3, 128):
            launch_changed_head(count, config.vocab_size)
    launched = texts(noted)
    assert set(launched.values()) > {"attention_items_kernel", "rms_norm_kernel", "search_kernel", "read_tokens_kernel"}
    assert sorted(launched[text] for text in launched.keys() - foreseen.keys()) == []
    # Next to nothing is compiled in vain.
    assert sorted(foreseen[text] for text in foreseen.keys() - launched.keys()) == []


def test_ranks_of_a_group_have_their_share_of_heads_and_the_whole_vocabulary() -> None:
    whole, half = (texts(variants(parse("llama"), size, torch.bfloat16, H100)) for size in (1, 2))

    def constants(found: dict[str, str], name: str) -> set[tuple[Any, ...]]:
        return {tuple(json.loads(text)["constant_vals"]) for text, kernel in found.items() if kernel == name}

    assert constants(whole, "statistics_kernel") == constants(half, "statistics_kernel")
    assert {sizes[1] for sizes in constants(whole, "attention_items_kernel")} == {2}
    assert {sizes[1] for sizes in constants(half, "attention_items_kernel")} == {1}


def test_attention_is_launched_as_the_table_says() -> None:
    found = variants(parse("llama"), 1, torch.bfloat16, A100)
    launched = [json.loads(one.specialization)["options"] for one in found if one.name == "attention_items_kernel"]
    names = ("num_warps", "num_stages", "maxnreg")
    entries = [launch_settings.settings_of_class(f"attention_{form}", "a100", "d64") for form in ("narrow", "wide")]
    wanted = {tuple(entry.get(name) for name in names) for entry in entries}
    assert {tuple(options[name] for name in names) for options in launched} == wanted


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")  # fork: the child only compiles
def test_launches_find_what_was_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through Triton's own way from arguments to files: nothing is compiled a second time."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    config = replace(parse("llama"), num_layers=2, sliding_windows=(None, None))
    names = {"rms_norm_kernel", "gated_activation_kernel", "merge_partials_kernel", "hopper_attention_kernel"}
    chosen = [one for one in variants(config, 1, torch.bfloat16, H100) if one.name in names]
    assert compile_variants(chosen, H100, 2) == 0
    hits: list[tuple[str, bool]] = []

    def note(*, src: Any, cache_hit: bool, **_: Any) -> None:
        hits.append((src.name, cache_hit))

    def skip(*, fn: Any, **_: Any) -> bool:
        return fn.jit_function.fn.__name__ not in names

    run = triton.JITFunction.run
    monkeypatch.setattr(triton.JITFunction, "run", lambda *args, warmup, **kwargs: run(*args, warmup=True, **kwargs))
    with kernels_on_cpu(monkeypatch, H100), compilation._compiling_for(H100), triton.knobs.runtime.scope():
        triton.knobs.runtime.jit_cache_hook = skip
        with triton.knobs.compilation.scope():
            triton.knobs.compilation.listener = note
            launch_everything(config, torch.bfloat16)
    assert len(hits) == len(chosen)
    assert {name for name, _ in hits} == names
    assert all(hit for _, hit in hits)


def test_what_is_compiled_at_its_launch_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    caplog.set_level("INFO")
    [first, *_] = variants(parse("llama"), 1, torch.bfloat16, H100)
    with triton.knobs.compilation.scope():
        compilation.log_compilations()
        for _ in range(2):
            with compilation._compiling_for(H100):
                first.kernel.preload(first.specialization)
    assert [record.getMessage().split(" in ")[0] for record in caplog.records] == ["Compiled read_tokens_kernel"]


class KernelWithHistory:
    """Has a key that tells which kernels had theirs before, as kernels of some versions of Triton do."""

    def __init__(self, name: str, src: str, history: list[str]) -> None:
        self.fn = SimpleNamespace(__name__=name)
        self.src = src
        self._history = history

    @cached_property
    def cache_key(self) -> str:
        self._history.append(self.fn.__name__)
        return " ".join(self._history)

    def preload(self, specialization: str) -> None:
        """Leave the key in the file of that name."""
        Path(specialization).write_text(self.cache_key)


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_keys_are_those_of_launches_in_the_noted_order(tmp_path: Path) -> None:
    """Whichever is compiled first."""
    history: list[str] = []
    sources = {"first": "short", "second": "the longest", "third": "longer"}
    kernels = [KernelWithHistory(name, src, history) for name, src in sources.items()]
    noted = [Variant(kernel, str(tmp_path / kernel.fn.__name__)) for kernel in kernels]
    assert compile_variants(noted, H100, 2) == 0
    keys = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert keys == {"first": "first", "second": "first second", "third": "first second third"}


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_variant_that_cannot_be_compiled_is_counted(capfd: pytest.CaptureFixture[str]) -> None:
    [first, *_] = variants(parse("llama"), 1, torch.bfloat16, H100)
    assert compile_variants([Variant(first.kernel, "no JSON")], H100, 2) == 1
    assert "read_tokens_kernel was not compiled" in capfd.readouterr().err


def test_a_compilation_that_fails_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Here: for want of a GPU, or of a model folder where there is one."""
    mark = tmp_path / "mark"
    compilation = KernelCompilation(ShardConfig(model_folder="/nowhere", device="cuda"), mark)
    compilation.wait()
    assert "compiled as they are used, their compilation failed" in caplog.text
    assert "Error" in caplog.text
    assert not mark.exists()
    compilation.stop()


def test_a_model_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a start has seen compiled, no later one of the same model looks at again."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "executable", "/bin/sh")
    monkeypatch.setattr(kernel_compilation, "COMMAND", ("-c", "mkdir -p $TRITON_CACHE_DIR"))
    (tmp_path / "config.json").write_text("{}")
    config = ShardConfig(model_folder=str(tmp_path))
    first = start_compilation(config)
    assert first is not None
    first.wait()
    first.stop()
    assert start_compilation(config) is None
    others = [replace(config, dtype="float16"), replace(config, world_size=2)]
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert not any(compiled_mark(other).exists() for other in [config, *others])


def test_a_compilation_that_hangs_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/sh")
    monkeypatch.setattr(kernel_compilation, "TIMEOUT_S", 0.1)
    monkeypatch.setattr(kernel_compilation, "COMMAND", ("-c", "sleep 600"))
    compilation = KernelCompilation(ShardConfig(), tmp_path / "mark")
    compilation.wait()
    assert "not compiled within" in caplog.text
    assert compilation._process.returncode is not None
