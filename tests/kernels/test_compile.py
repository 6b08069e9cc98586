"""Kernels compiled to machine code for GPUs that need not be there: do they fit, spill, use the wide instructions?"""

import importlib
import itertools
import pkgutil
import re
from dataclasses import dataclass

import pytest
import text_generation_kernels
import triton
from text_generation_kernels import (
    attention_kernels,
    gated_activation,
    green_list,
    hopper_attention,
    launch_settings,
    logit_bias,
    rms_norm,
    rotary_kv_write,
    sampling_kernels,
    sampling_search,
    skinny_matmul,
    token_exchange,
    token_masks,
    token_records,
)
from text_generation_kernels.attention_settings import HOPPER_HEAD_DIMS, merged_slots
from text_generation_kernels.benchmarks.occupancy import (
    MULTIPROCESSORS,
    Usage,
    cuobjdump,
    programs_per_multiprocessor,
    usage_of,
)
from text_generation_kernels.launch_settings import FUSED_MULTIPLY_ADDS, Settings, settings_of_class
from text_generation_kernels.skinny_matmul import settings_shape
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

# Class of GPUs in the launch table -> its compute capability.
CAPABILITIES = {"a100": 80, "ada": 89, "h100": 90, "h200": 90}


@dataclass(frozen=True)
class CompiledKernel:
    """A kernel, the types of its arguments as a launch would give them, and what its machine code must show."""

    kernel: triton.JITFunction
    settings: tuple[str, str] | Settings  # operation and shape in the table of launch settings, or the launch's own
    types: dict[str, str]  # argument -> pointer or number; the others are constants
    constants: dict[str, object]
    unaligned: tuple[str, ...] = ()  # whole numbers that no launch promises to be multiples of 16
    has_wide_loads: bool = True  # 16 bytes for each thread
    has_wgmma: bool = False  # on Hopper
    name: str = ""  # where one kernel has several rows
    is_slow: bool = False  # left to the slow tests on every GPU
    is_hopper: bool = False  # compiled for no other GPU

    @property
    def full_name(self) -> str:
        """The kernel's, and which of its rows this is."""
        return f"{self.kernel.__name__} {self.name}".rstrip()

    def entry(self, gpu_class: str) -> Settings:
        """Of the table, for a class of GPUs."""
        return (
            settings_of_class(self.settings[0], gpu_class, self.settings[1])
            if isinstance(self.settings, tuple)
            else self.settings
        )

    def options_and_constants(self, gpu_class: str) -> tuple[dict[str, object], dict[str, object]]:
        """The table's entry, parted into options of the compiler and constants of the kernel."""
        entry, capability = self.entry(gpu_class), CAPABILITIES[gpu_class]
        names = self.kernel.arg_names
        constants = {name: value for name, value in entry.items() if name in names}
        options = {name: value for name, value in entry.items() if name.islower()}
        if self.is_hopper:
            constants["STAGES"] = entry["num_stages"]
        if "MERGED_SLOTS" in names:
            group_size = self.constants["GROUP_SIZE"]
            assert isinstance(group_size, int)
            constants["MERGED_SLOTS"] = merged_slots(entry, group_size)
        if "EARLY" in names:
            constants["EARLY"] = options["launch_pdl"] = capability >= 90
        return options, self.constants | constants


def row_cases(data: str) -> list[CompiledKernel]:
    """The kernels that work on rows of hidden states, at Llama-3.1-8B's sizes."""
    norm = dict.fromkeys(("x", "residual", "weight", "normed", "total"), data)
    norm |= {"x_stride": "i32", "residual_stride": "i32", "eps": "fp32"}
    gate = {"x": data, "output": data, "x_stride": "i32", "num_blocks": "i32"}
    rotary = dict.fromkeys(("qkv", "key_cache", "value_cache", "query"), data)
    rotary |= {"positions": "*i64", "cos_sin_cache": "*fp32", "slot_mapping": "*i64", "qkv_stride": "i32"}
    rotary |= {"eps": "fp32"}
    sizes = {"NUM_HEADS": 32, "NUM_KV_HEADS": 8, "HEAD_DIM": 128, "ROTARY_DIM": 128, "BLOCK_SIZE": 16}
    no_norms = {"query_norm": None, "key_norm": None}
    rotary_kernel, rotary_settings = rotary_kv_write.rotary_kv_write_kernel, ("rotary_kv_write", "")
    return [
        CompiledKernel(rms_norm.rms_norm_kernel, ("rms_norm", ""), norm, {"HIDDEN": 4096, "BLOCK": 4096}),
        CompiledKernel(
            rms_norm.rms_norm_kernel, ("rms_norm", "few_rows"), norm, {"HIDDEN": 4096, "BLOCK": 4096}, name="few rows",
        ),
        CompiledKernel(
            gated_activation.gated_activation_kernel, ("gated_activation", ""), gate,
            {"WIDTH": 14336, "ACTIVATION": "silu"}, unaligned=("num_blocks",),
        ),
        CompiledKernel(rotary_kernel, rotary_settings, rotary, sizes | no_norms),
        CompiledKernel(
            rotary_kernel, rotary_settings, rotary | dict.fromkeys(no_norms, data), sizes, name="head norms",
        ),
    ]  # fmt: skip


def token_cases(data: str) -> list[CompiledKernel]:
    """The kernels that keep tokens on the device; they move a few bytes for each row."""
    settings, sizes = {"num_warps": 4, "enable_fp_fusion": True}, {"BLOCK": 256}
    read = {"input_ids": "*i32", "last_tokens": "*i64", "token_ids": "*i64", "num_tokens": "i32"}
    publish = {"tokens": "*i64", "logprobs": "*fp32", "is_finite": "*i1", "rows": "*i32", "last_tokens": "*i64"}
    publish |= {"output": "*i32", "output_stride": "i32", "num_samples": "i32"}
    kernels = token_exchange
    return [
        CompiledKernel(
            kernels.read_tokens_kernel, settings, read, sizes, unaligned=("num_tokens",), has_wide_loads=False
        ),
        CompiledKernel(
            kernels.publish_tokens_kernel, settings, publish, sizes, unaligned=("num_samples", "output_stride"),
            has_wide_loads=False,
        ),
    ]  # fmt: skip


def skinny_cases(data: str) -> list[CompiledKernel]:
    """The products of a decode step of Llama-3.1-8B: into queries, keys and values; the MLP's; out of it; the head.

    The table's tiles are for 16 bits. In float32, where models multiply by other means, smaller ones.
    """
    types = dict.fromkeys(("x", "weight", "output"), data) | {"num_rows": "i32", "x_stride": "i32"}
    types |= {"residual_stride": "i32", "eps": "fp32"}
    normed, plain = {"row_sums": "*fp32"}, {"bias": data}
    adding = {"bias": data, "residual": data, "norm_weight": data, "scaled": data, "square_sums": "*fp32"}
    cases = []
    products = ((6144, 4096, normed | plain), (28672, 4096, normed), (4096, 14336, adding), (128256, 4096, {}))
    for (width, depth, added), rows in itertools.product(products, (16, 32, 64)):
        is_gated = width == 28672
        output = width // 2 if is_gated else width
        operation = ("skinny_matmul_gated" if is_gated else "skinny_matmul", settings_shape(rows, output))
        small = FUSED_MULTIPLY_ADDS | {"BLOCK_N": 16, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
        constants: dict[str, object] = {"WIDTH": output, "DEPTH": depth, "ROWS": rows, "SUMS_BLOCK": 32}
        constants |= {"NUM_SUMS": 128 if "row_sums" in added else 0, "IS_GATED": is_gated, "WIDEN": False}
        constants |= dict.fromkeys(name for name in (*normed, *adding) if name not in added)
        cases.append(
            CompiledKernel(
                skinny_matmul.skinny_matmul_kernel, small if data == "*fp32" else operation, types | added, constants,
                unaligned=("num_rows",),
                name=f"{rows} x {depth} x {width}", is_slow=rows != 32 or width in (6144, 128256),
            )
        )  # fmt: skip
    return cases


def sampling_cases(data: str) -> list[CompiledKernel]:
    """The sampling kernels, at a vocabulary of 128 256."""
    tiles: dict[str, object] = {"NUM_TILES": 32, "PADDED_TILES": 32}
    low: dict[str, object] = {"LOW_BITS": {"*bf16": 16, "*fp16": 12, "*fp32": 0}[data]}
    tile: dict[str, object] = {"TILE": 4096}
    size = {"row_stride": "i32", "vocab_size": "i32"}
    row = {"logits": data, "temperatures": "*fp32", "tile_max": "*fp32"}
    filters = row | {"top_k": "*i32", "top_p": "*fp32"} | size
    searched = {"state": "*i64", "measures": "*i64"}
    limits = {"limits": "*i64", "typical": "*fp32"}
    statistics = {"logits": data, "tile_max": "*fp32", "tile_best": "*i32", "tile_sum": "*fp32"} | size
    mass = filters | searched | {"tile_mass": "*i64"}
    passes = mass | {"next_state": "*i64", "next_measures": "*i64", "shift": "i32"}
    settled = filters | {"min_p": "*fp32", "typical_p": "*fp32"} | searched | limits
    kept = row | {"min_p": "*fp32", "tile_mass": "*i64", "tile_ties": "*i32"} | limits | size
    choice = kept | {"seeds": "*i64", "positions": "*i64", "tile_best": "*i32", "tile_sum": "*fp32"}
    choice |= {"tokens": "*i64", "logprobs": "*fp32", "is_finite": "*i1"}
    distribution = kept | {"tile_sum": "*fp32", "result": "*fp32"}
    masks = {"logits": data, "masks": "*i32", "mask_rows": "*i32", "num_words": "i32"} | size
    search, chosen = ("sampling_search", ""), ("sampling_choice", "")
    flags = {"IS_FIRST": False, "AFTER_TOP_K": False}
    kernels, searches = sampling_kernels, sampling_search
    return [
        CompiledKernel(kernels.statistics_kernel, ("sampling_statistics", ""), statistics, {"NUM_TILES": 32} | tile),
        CompiledKernel(kernels.mass_kernel, search, mass, low | tiles | tile | {"AFTER_TOP_K": True}),
        CompiledKernel(searches.search_kernel, search, passes, flags | tiles | tile, unaligned=("shift",)),
        CompiledKernel(
            searches.settle_kernel, ("sampling_settle", ""), settled, low | tiles, has_wide_loads=False
        ),
        CompiledKernel(kernels.kept_mass_kernel, search, kept, low | tiles | tile),
        CompiledKernel(kernels.choice_kernel, chosen, choice, low | tiles | tile | {"HAS_RANDOM": True}),
        CompiledKernel(kernels.distribution_kernel, search, distribution, low | tiles | tile),
        CompiledKernel(  # it writes; of each mask it reads a bit a token
            token_masks.mask_tokens_kernel, FUSED_MULTIPLY_ADDS | {"num_warps": 8}, masks, {"TILE": token_masks._TILE},
            unaligned=("num_words",), has_wide_loads=False,
        ),
    ]  # fmt: skip


def logits_cases(data: str) -> list[CompiledKernel]:
    """What changes logits: they are float32 then whatever the model's type, so these come once."""
    if data != "*bf16":
        return []
    sample = {"logits": "*fp32", "rows": "*i32", "positions": "*i64", "row_stride": "i32"}
    records = {"penalties": "*fp32", "records": "*i16", "vocab_size": "i32"}
    entries = {"token_ids": "*i32", "values": "*fp32", "bounds": "*i32"}
    counted = {"tokens": "*i64", "rows": "*i32", "num_samples": "i32"} | records
    swaps = {"previous": "*i64", "state": "*i32", "keys": "*i64", "vocab_size": "i32", "num_green": "i32"}
    green = {"logits": "*fp32", "samples": "*i64", "keys": "*i64", "ordered": "*i64", "row_stride": "i32"}
    green |= {"num_green": "i32", "delta": "fp32", "num_halvings": "i32"}
    bits: dict[str, object] = {"STEP_BITS": 22}
    twister = bits | {"HASH_KEY": green_list.HASH_KEY, "STATE_SIZE": 624}
    four, eight = ({"num_warps": count, "enable_fp_fusion": False} for count in (4, 8))
    return [
        CompiledKernel(token_records.penalize_kernel, four, sample | records, {"BLOCK": 2048}),
        CompiledKernel(
            token_records.count_kernel, four, counted, {"BLOCK": 256, "MAX_COUNT": token_records.MAX_COUNT},
            unaligned=("num_samples",), has_wide_loads=False,
        ),
        CompiledKernel(
            logit_bias.logit_bias_kernel, four, sample | entries,
            {"BLOCK": 256, "MAX_ENTRIES": logit_bias.MAX_ENTRIES}, has_wide_loads=False,
        ),
        CompiledKernel(
            green_list.swaps_kernel, eight, swaps, twister, unaligned=("num_green",), has_wide_loads=False
        ),
        CompiledKernel(
            green_list.green_kernel, four, green, bits | {"BLOCK": 512}, unaligned=("num_green", "num_halvings"),
            has_wide_loads=False,
        ),
    ]  # fmt: skip


def attention_cases(data: str) -> list[CompiledKernel]:
    """Paged attention: few rows and many, each head size, with and without a window, groups of one, four and eight."""
    data_names, lists = ("query", "key_cache", "value_cache", "output"), ("row_tokens", "row_positions", "row_slots")
    items = dict.fromkeys(data_names, data) | dict.fromkeys((*lists, "block_tables", "worker_starts", "items"), "*i32")
    items |= {"partial_output": "*fp32", "partial_weight": "*fp32", "table_stride": "i32", "scale": "fp32"}
    items |= {"soft_cap": "fp32", "sliding_window": "i32", "arrivals": "*i32"}
    merge = {"num_merged": "*i32", "merged": "*i32", "partial_output": "*fp32", "partial_weight": "*fp32"}
    cases = [
        CompiledKernel(
            attention_kernels.merge_partials_kernel, {"num_warps": 2, "enable_fp_fusion": True},
            merge | {"output": data}, {"NUM_HEADS": 32, "HEAD_DIM": 128, "PADDED_DIM": 128, "SLOTS": 8},
        )
    ]  # fmt: skip
    shapes = [(64, 4, False), (80, 4, False), (128, 4, False), (128, 4, True), (256, 4, False)]
    for head_dim, group_size, has_window in [*shapes, (128, 1, False), (128, 8, False)]:
        is_slow = (head_dim, group_size, has_window) != (128, 4, False)
        shape_name = f"d{head_dim}{'' if group_size == 4 else f' group {group_size}'}{' window' if has_window else ''}"
        padded = triton.next_power_of_2(head_dim)
        sizes: dict[str, object] = {
            "GROUP_SIZE": group_size,
            "NUM_KV_HEADS": 8,
            "HEAD_DIM": head_dim,
            "PADDED_DIM": padded,
        }
        sizes |= {"BLOCK_SIZE": 16, "HAS_WINDOW": has_window, "HAS_SOFT_CAP": False, "WIDEN": False}
        shape = "float32" if data == "*fp32" else f"d{padded}"
        for form in ("narrow", "narrow beside", "wide"):
            is_wide, is_beside = form == "wide", form == "narrow beside"
            rows: dict[str, object] = {"IS_WIDE": is_wide, "BESIDE": is_beside}
            rows |= {} if is_wide else {"ROWS": 16}
            cases.append(
                CompiledKernel(
                    attention_kernels.attention_items_kernel, (f"attention_{form.split()[0]}", shape), items,
                    sizes | rows, unaligned=("sliding_window", "table_stride"), has_wgmma=is_wide,
                    name=f"{form} {shape_name}", is_slow=is_slow,
                )
            )  # fmt: skip
        if data != "*fp32" and head_dim in HOPPER_HEAD_DIMS:
            del sizes["PADDED_DIM"], sizes["WIDEN"]
            cases.append(
                CompiledKernel(
                    hopper_attention.hopper_attention_kernel, ("attention_hopper", shape),
                    {name: kind for name, kind in items.items() if name != "arrivals"}, sizes,
                    unaligned=("sliding_window", "table_stride"), has_wgmma=True, is_hopper=True,
                    name=shape_name, is_slow=is_slow,
                )
            )  # fmt: skip
    return cases


TABLES = [row_cases, token_cases, skinny_cases, sampling_cases, logits_cases, attention_cases]


def cases_of(kind: str) -> list[tuple[CompiledKernel, str]]:
    """Every kernel for every class of GPUs, for one type of data; classes of one capability differ by their entries."""
    found, seen = [], []
    for case in [case for table in TABLES for case in table(f"*{kind}")]:
        for gpu_class, capability in CAPABILITIES.items():
            if case.is_hopper and capability != 90:
                continue
            key = case.full_name, case.entry(gpu_class), capability
            if key not in seen:
                seen.append(key)
                found.append((case, gpu_class))
    return found


def all_cases() -> list[object]:
    """Every kernel in bfloat16 for Hopper in the default tests; other types, sizes and GPUs are slow tests."""
    cases = []
    for kind in ("bf16", "fp16", "fp32"):
        for case, gpu_class in cases_of(kind):
            marks = () if kind == "bf16" and gpu_class == "h100" and not case.is_slow else pytest.mark.slow
            cases.append(pytest.param(case, kind, gpu_class, marks=marks, id=f"{case.full_name}-{kind}-{gpu_class}"))
    return cases


def compile_case(case: CompiledKernel, gpu_class: str):
    names = case.kernel.arg_names
    options, constants = case.options_and_constants(gpu_class)
    assert set(names) == set(case.types) | set(constants), case.kernel.__name__
    signature = {name: case.types.get(name, "constexpr") for name in names}
    aligned = [
        index
        for index, name in enumerate(names)
        if signature[name].startswith("*") or (signature[name] in ("i32", "i64") and name not in case.unaligned)
    ]
    attributes = {(index,): [["tt.divisibility", 16]] for index in aligned}
    source_of = GluonASTSource if case.kernel.is_gluon() else ASTSource
    source = source_of(case.kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", CAPABILITIES[gpu_class], 32), options=options)


@pytest.mark.parametrize(("case", "kind", "gpu_class"), all_cases())
def test_machine_code(case, kind, gpu_class):
    compiled, capability = compile_case(case, gpu_class), CAPABILITIES[gpu_class]
    usage, limits = usage_of(compiled), MULTIPROCESSORS[capability]
    assert usage.shared_bytes <= limits.shared_bytes_per_program
    # Attention gives each multiprocessor as many programs as the table says: they must all run at once.
    assert programs_per_multiprocessor(usage, limits) >= case.entry(gpu_class).get("CTAS_PER_SM", 1)
    code = cuobjdump("--dump-sass", compiled.asm["cubin"])
    if kind != "fp32":
        assert usage.num_spilled_bytes == 0
        assert not re.search(r"\b(STL|LDL)\b", code), "registers spilled to local memory"
    if case.has_wide_loads:
        assert re.search(r"\b(LDG|LDGSTS)\.E[\w.]*\.128\b", code), "no 16-byte loads"
    ptx = compiled.asm["ptx"]
    assert "tf32" not in ptx, "float32 products are IEEE"
    if "griddepcontrol.wait" in ptx and not case.is_hopper:
        wait, start_next = ptx.index("griddepcontrol.wait"), ptx.index("griddepcontrol.launch_dependents")
        accesses = [found.start() for found in re.finditer(r"\b(ld|st|atom)\S*\.global|\bcp\.async\.c", ptx)]
        if case.constants.get("BESIDE"):
            assert start_next < accesses[0] < accesses[-1] < wait
        else:
            assert wait < accesses[0]
    assert ("griddepcontrol.wait" in ptx) == (capability == 90 and "EARLY" in case.kernel.arg_names)
    if case.has_wgmma and capability == 90 and kind != "fp32":
        assert "HGMMA" in code


def test_every_entry_of_the_launch_table_is_compiled(monkeypatch):
    used = set()

    class Noted(dict):
        def __getitem__(self, key):
            used.add(key)
            return super().__getitem__(key)

    monkeypatch.setattr(launch_settings, "SETTINGS", Noted(launch_settings.SETTINGS))
    for kind in ("bf16", "fp32"):
        for case, gpu_class in itertools.product(
            [case for table in TABLES for case in table(f"*{kind}")], CAPABILITIES
        ):
            case.entry(gpu_class)
    assert used == set(launch_settings.SETTINGS)


def test_every_kernel_is_compiled():
    names = [
        module.name for module in pkgutil.iter_modules(text_generation_kernels.__path__, "text_generation_kernels.")
    ]
    values = [value for name in names for value in vars(importlib.import_module(name)).values()]
    # Those that a host launches are called so; other functions are parts of them.
    kernels = {str(value.__name__) for value in values if isinstance(value, triton.JITFunction)}
    kernels = {name for name in kernels if name.endswith("_kernel")}
    assert kernels == {case.kernel.__name__ for table in TABLES for case in table("*bf16")}


@pytest.mark.parametrize(
    ("usage", "capability", "programs"),
    [
        # The examples of NVIDIA's occupancy calculator: by registers, by shared memory, by warps, by programs.
        (Usage(128, 0, 0, 8), 80, 2),
        (Usage(255, 0, 0, 4), 80, 2),
        (Usage(32, 0, 0, 8), 89, 6),
        (Usage(32, 0, 48 * 1024, 4), 80, 3),
        (Usage(32, 0, 99 * 1024, 4), 89, 1),
        (Usage(32, 0, 100 * 1024, 4), 89, 0),
        (Usage(16, 0, 0, 1), 90, 32),
        (Usage(33, 0, 0, 32), 90, 1),
    ],
)
def test_occupancy(usage, capability, programs):
    assert programs_per_multiprocessor(usage, MULTIPROCESSORS[capability]) == programs
