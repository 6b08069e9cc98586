"""Kernels compiled to machine code for GPUs that need not be there: do they fit, spill, use the wide instructions?"""

import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import triton
from text_generation_kernels import gated_activation, rms_norm, rotary_kv_write, sampling_kernels, sampling_search
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# Compute capability -> shared memory a program may have, in bytes.
SHARED_LIMITS = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class CompiledKernel:
    """A kernel, the types of its arguments as a launch would give them, and what its machine code must show."""

    name: str
    kernel: triton.JITFunction
    types: dict[str, str]  # argument -> pointer or number; the others are constants
    constants: dict[str, object]
    options: dict[str, object]
    unaligned: tuple[str, ...] = ()  # whole numbers that no launch promises to be multiples of 16
    has_wide_loads: bool = True  # 16 bytes for each thread
    has_wgmma: bool = False  # on Hopper
    capabilities: tuple[int, ...] = field(default=tuple(SHARED_LIMITS))


def row_cases(kind: str) -> list[CompiledKernel]:
    """The kernels that work on rows of hidden states, at Llama-3.1-8B's sizes."""
    data, one = f"*{kind}", {"num_warps": 8, "num_stages": 1}
    norm = {"x": data, "residual": data, "weight": data, "normed": data, "total": data, "x_stride": "i32"}
    norm |= {"residual_stride": "i32", "eps": "fp32"}
    gate = {"x": data, "output": data, "x_stride": "i32", "num_blocks": "i32"}
    rotary = {"qkv": data, "positions": "*i64", "cos_sin_cache": "*fp32", "key_cache": data, "value_cache": data}
    rotary |= {"slot_mapping": "*i64", "query": data, "qkv_stride": "i32", "eps": "fp32"}
    sizes = {"NUM_HEADS": 32, "NUM_KV_HEADS": 8, "HEAD_DIM": 128, "ROTARY_DIM": 128, "BLOCK_SIZE": 16, "HEADS": 8}
    norms = {"query_norm": data, "key_norm": data}
    return [
        CompiledKernel("rms_norm", rms_norm.rms_norm_kernel, norm, {"HIDDEN": 4096, "BLOCK": 4096}, one),
        CompiledKernel(
            "gated_activation", gated_activation.gated_activation_kernel, gate,
            {"WIDTH": 14336, "BLOCK": 1024, "ACTIVATION": "silu"}, {"num_warps": 4, "num_stages": 1},
            unaligned=("num_blocks",),
        ),
        CompiledKernel(
            "rotary_kv_write", rotary_kv_write.rotary_kv_write_kernel, rotary,
            sizes | {"query_norm": None, "key_norm": None}, {"num_warps": 2, "num_stages": 1},
        ),
        CompiledKernel(
            "rotary_kv_write_norm", rotary_kv_write.rotary_kv_write_kernel, rotary | norms, sizes,
            {"num_warps": 2, "num_stages": 1},
        ),
    ]  # fmt: skip


def sampling_cases(kind: str) -> list[CompiledKernel]:
    """The sampling kernels, at a vocabulary of 128 256."""
    options = {"num_warps": 8, "num_stages": 1, "enable_fp_fusion": False}
    tiles = {"NUM_TILES": 32, "PADDED_TILES": 32}
    low = {"LOW_BITS": {"bf16": 16, "fp16": 12, "fp32": 0}[kind]}
    size = {"row_stride": "i32", "vocab_size": "i32"}
    row = {"logits": f"*{kind}", "temperatures": "*fp32"}
    filters = row | {"top_k": "*i32", "top_p": "*fp32", "tile_max": "*fp32", "tile_mass": "*i64"}
    search = {"state": "*i64", "measures": "*i64"}
    limits = {"limits": "*i64", "typical": "*fp32"}
    statistics = {"logits": f"*{kind}", "tile_max": "*fp32", "tile_best": "*i32", "tile_sum": "*fp32"} | size
    settled = {name: kind for name, kind in filters.items() if name != "tile_mass"}
    settled |= {"min_p": "*fp32", "typical_p": "*fp32"} | search | limits | size
    kept = row | {"min_p": "*fp32", "tile_max": "*fp32", "tile_mass": "*i64", "tile_ties": "*i32"} | limits | size
    choice = kept | {"seeds": "*i64", "positions": "*i64", "tile_best": "*i32", "tile_sum": "*fp32"}
    choice |= {"tokens": "*i64", "logprobs": "*fp32", "is_finite": "*i8"}
    passes = filters | search | {"next_state": "*i64", "next_measures": "*i64", "shift": "i32"} | size
    first, tile = {"IS_FIRST": False, "AFTER_TOP_K": False}, {"TILE": 4096}
    kernels, searches = sampling_kernels, sampling_search
    return [
        CompiledKernel("statistics", kernels.statistics_kernel, statistics, {"NUM_TILES": 32} | tile, options),
        CompiledKernel(
            "mass", kernels.mass_kernel, filters | search | size, low | tiles | tile | {"AFTER_TOP_K": True}, options
        ),
        CompiledKernel(
            "search", searches.search_kernel, passes, first | tiles | tile, options,
            unaligned=("shift",), has_wide_loads=False,
        ),
        CompiledKernel("settle", searches.settle_kernel, settled, low | tiles, options, has_wide_loads=False),
        CompiledKernel("kept_mass", kernels.kept_mass_kernel, kept, low | tiles | tile, options),
        CompiledKernel("choice", kernels.choice_kernel, choice, low | tiles | tile | {"HAS_RANDOM": True}, options),
    ]  # fmt: skip


def all_cases() -> list[object]:
    """Every kernel in bfloat16 for Hopper in the default tests; other types and GPUs are slow tests."""
    cases = []
    for kind in TYPES.values():
        for case in row_cases(kind) + sampling_cases(kind):
            for capability in case.capabilities:
                is_default = kind == "bf16" and capability == 90
                marks = () if is_default else pytest.mark.slow
                cases.append(pytest.param(case, kind, capability, marks=marks, id=f"{case.name}-{kind}-sm{capability}"))
    return cases


def compile_case(case: CompiledKernel, capability: int):
    names = case.kernel.arg_names
    assert set(names) == set(case.types) | set(case.constants), case.name
    signature = {name: case.types.get(name, "constexpr") for name in names}
    aligned = [
        index
        for index, name in enumerate(names)
        if signature[name].startswith("*") or (signature[name] in ("i32", "i64") and name not in case.unaligned)
    ]
    attributes = {(index,): [["tt.divisibility", 16]] for index in aligned}
    source = ASTSource(case.kernel, signature, case.constants, attributes)
    return triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"enable_fp_fusion": True} | case.options
    )


def machine_code(cubin: bytes, folder: Path) -> str:
    """The disassembly."""
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, "--dump-sass", path], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(("case", "kind", "capability"), all_cases())
def test_machine_code(case, kind, capability, tmp_path):
    compiled = compile_case(case, capability)
    assert compiled.metadata.shared <= SHARED_LIMITS[capability]
    code = machine_code(compiled.asm["cubin"], tmp_path)
    if kind != "fp32":
        assert not re.search(r"\b(STL|LDL)\b", code), "registers spilled to local memory"
    if case.has_wide_loads:
        assert re.search(r"\b(LDG|LDGSTS)\.E[\w.]*\.128\b", code), "no 16-byte loads"
    assert "tf32" not in compiled.asm["ptx"], "float32 products are IEEE"
    if case.has_wgmma and capability == 90 and kind != "fp32":
        assert "HGMMA" in code
