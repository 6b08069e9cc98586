"""How each kernel is launched on each class of GPU: block sizes, warps, pipeline stages. A plain table.

Nothing tunes itself when the server starts. `python -m text_generation_kernels.benchmarks.tune OP` measures the
candidates on the machine at hand and prints entries for this table.
"""

import functools

import torch

from text_generation_kernels.gpu import Gpu, gpu_of

Settings = dict[str, int]

# Said outright, because Triton's default changes between versions; an entry of the table may say otherwise.
FUSED_MULTIPLY_ADDS: Settings = {"enable_fp_fusion": True}

# A GPU class is the first of which one word stands in the device's name.
GPU_CLASSES = {
    "h100": ("H100",),
    "h200": ("H200",),
    "a100": ("A100",),
    "ada": ("RTX 40", "L40", "L4", "Ada"),
}

SMALL_PRODUCT: Settings = {"BLOCK_N": 32, "BLOCK_K": 128, "num_warps": 4, "num_stages": 6}
LARGE_PRODUCT: Settings = {"BLOCK_N": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 4}

# (operation, GPU class) -> keyword arguments of the launch. "default" serves every class without an entry. An
# operation may have entries for one of its shapes too, named operation/shape.
SETTINGS: dict[tuple[str, str], Settings] = {
    ("rms_norm/few_rows", "default"): {"num_warps": 16, "num_stages": 1},
    ("rms_norm", "default"): {"num_warps": 8, "num_stages": 1},
    ("rotary_kv_write", "default"): {"HEADS": 8, "num_warps": 2, "num_stages": 1},
    ("gated_activation", "default"): {"BLOCK": 1024, "num_warps": 4, "num_stages": 1},
    ("sampling_statistics", "default"): {"num_warps": 8, "num_stages": 1},
    # Fused multiply-adds off: every one of these kernels must find the very same weight for a token.
    ("sampling_search", "default"): {"num_warps": 8, "num_stages": 1, "enable_fp_fusion": False},
    ("sampling_settle", "default"): {"num_warps": 16, "num_stages": 1, "enable_fp_fusion": False},
    ("sampling_settle", "a100"): {"num_warps": 32, "num_stages": 1, "enable_fp_fusion": False},
    ("sampling_choice", "default"): {"num_warps": 8, "num_stages": 1, "enable_fp_fusion": False},
    # Products of few rows: small and large are widths of the output, the number is that of the padded rows.
    ("skinny_matmul", "default"): {"BLOCK_N": 32, "BLOCK_K": 128, "num_warps": 4, "num_stages": 4},
    ("skinny_matmul/small16", "h100"): SMALL_PRODUCT,
    ("skinny_matmul/small32", "h100"): SMALL_PRODUCT,
    ("skinny_matmul/small64", "h100"): SMALL_PRODUCT,
    ("skinny_matmul/small16", "h200"): SMALL_PRODUCT,
    ("skinny_matmul/small32", "h200"): SMALL_PRODUCT,
    ("skinny_matmul/small64", "h200"): SMALL_PRODUCT,
    ("skinny_matmul", "h100"): LARGE_PRODUCT,
    ("skinny_matmul", "h200"): LARGE_PRODUCT,
    ("skinny_matmul_gated", "default"): {
        "BLOCK_N": 16, "BLOCK_K": 64, "num_warps": 4, "num_stages": 4,
    },
    ("skinny_matmul_gated/large32", "h100"): LARGE_PRODUCT | {"num_warps": 8},
    ("skinny_matmul_gated/large16", "h100"): {
        "BLOCK_N": 32, "BLOCK_K": 128, "num_warps": 4, "num_stages": 5,
    },
    ("skinny_matmul_gated/large32", "h200"): LARGE_PRODUCT | {"num_warps": 8},
    ("skinny_matmul_gated/large16", "h200"): {
        "BLOCK_N": 32, "BLOCK_K": 128, "num_warps": 4, "num_stages": 5,
    },
    ("skinny_matmul_gated", "h100"): LARGE_PRODUCT,
    ("skinny_matmul_gated", "h200"): LARGE_PRODUCT,
    # CTAS_PER_SM says how many programs of the kernel fit on a multiprocessor, by registers and shared memory. d64,
    # d128, d256: the head size, rounded up to a power of two. Loads go through block ids, so that of n stages n // 2
    # hold keys and values in flight. maxnreg: the registers that so many programs leave each thread. Without it the
    # compiler aims for more programs on some GPUs and puts a few registers into memory for them. MERGED_SLOTS: partial
    # results that are read at a time where more than four are merged: of four heads, in 4 registers each; of more heads
    # fewer. Without it, four.
    ("attention_narrow/d64", "default"): {
        "KEYS": 64, "CTAS_PER_SM": 2, "MIN_KEY_TILES": 1, "num_warps": 4, "num_stages": 5, "maxnreg": 255,
    },
    ("attention_narrow/d128", "default"): {
        "KEYS": 32, "CTAS_PER_SM": 2, "MIN_KEY_TILES": 2, "num_warps": 4, "num_stages": 5, "maxnreg": 255,
    },
    ("attention_narrow/d256", "default"): {
        "KEYS": 32, "CTAS_PER_SM": 1, "MIN_KEY_TILES": 2, "num_warps": 4, "num_stages": 5, "maxnreg": 255,
    },
    ("attention_narrow/d64", "a100"): {
        "KEYS": 64, "CTAS_PER_SM": 4, "MIN_KEY_TILES": 1, "num_warps": 4, "num_stages": 5, "maxnreg": 128,
    },
    ("attention_narrow/d128", "a100"): {
        "KEYS": 32, "CTAS_PER_SM": 4, "MIN_KEY_TILES": 2, "num_warps": 4, "num_stages": 5, "maxnreg": 128,
    },
    ("attention_narrow/d256", "a100"): {
        "KEYS": 32, "CTAS_PER_SM": 2, "MIN_KEY_TILES": 2, "num_warps": 4, "num_stages": 5, "maxnreg": 255,
    },
    ("attention_narrow/d64", "h100"): {
        "KEYS": 64, "CTAS_PER_SM": 4, "MIN_KEY_TILES": 1, "num_warps": 4, "num_stages": 5,
    },
    ("attention_narrow/d128", "h100"): {
        "KEYS": 64, "CTAS_PER_SM": 2, "MIN_KEY_TILES": 1, "MERGED_SLOTS": 32, "num_warps": 4, "num_stages": 5,
    },
    ("attention_narrow/d256", "h100"): {
        "KEYS": 32, "CTAS_PER_SM": 2, "MIN_KEY_TILES": 2, "num_warps": 4, "num_stages": 5,
    },
    ("attention_narrow/d64", "h200"): {
        "KEYS": 64, "CTAS_PER_SM": 4, "MIN_KEY_TILES": 1, "num_warps": 4, "num_stages": 5,
    },
    ("attention_narrow/d128", "h200"): {
        "KEYS": 64, "CTAS_PER_SM": 2, "MIN_KEY_TILES": 1, "MERGED_SLOTS": 32, "num_warps": 4, "num_stages": 5,
    },
    ("attention_narrow/d256", "h200"): {
        "KEYS": 32, "CTAS_PER_SM": 2, "MIN_KEY_TILES": 2, "num_warps": 4, "num_stages": 5,
    },
    ("attention_narrow/float32", "default"): {
        "KEYS": 16, "CTAS_PER_SM": 1, "MIN_KEY_TILES": 4, "num_warps": 4, "num_stages": 3,
    },
    ("attention_wide/d64", "default"): {
        "ROWS": 128, "KEYS": 64, "CTAS_PER_SM": 1, "MIN_KEY_TILES": 4, "num_warps": 8, "num_stages": 5,
    },
    ("attention_wide/d128", "default"): {
        "ROWS": 64, "KEYS": 32, "CTAS_PER_SM": 2, "MIN_KEY_TILES": 8, "num_warps": 4, "num_stages": 3, "maxnreg": 255,
    },
    ("attention_wide/d128", "h100"): {
        "ROWS": 128, "KEYS": 64, "CTAS_PER_SM": 1, "MIN_KEY_TILES": 8, "num_warps": 8, "num_stages": 5,
    },
    ("attention_wide/d128", "h200"): {
        "ROWS": 128, "KEYS": 64, "CTAS_PER_SM": 1, "MIN_KEY_TILES": 8, "num_warps": 8, "num_stages": 5,
    },
    ("attention_wide/d128", "a100"): {
        "ROWS": 128, "KEYS": 64, "CTAS_PER_SM": 1, "MIN_KEY_TILES": 4, "num_warps": 8, "num_stages": 3, "maxnreg": 255,
    },
    ("attention_wide/d256", "default"): {
        "ROWS": 64, "KEYS": 32, "CTAS_PER_SM": 1, "MIN_KEY_TILES": 8, "num_warps": 8, "num_stages": 3,
    },
    # Hopper's own kernel of prompts: num_stages tiles of keys and values in shared memory, num_warps of a warpgroup.
    ("attention_hopper/d64", "default"): {
        "ROWS": 128, "KEYS": 64, "CTAS_PER_SM": 1, "MIN_KEY_TILES": 8, "num_warps": 4, "num_stages": 4,
    },
    ("attention_hopper/d128", "default"): {
        "ROWS": 128, "KEYS": 64, "CTAS_PER_SM": 1, "MIN_KEY_TILES": 8, "num_warps": 4, "num_stages": 3,
    },
    ("attention_wide/float32", "default"): {
        "ROWS": 32, "KEYS": 16, "CTAS_PER_SM": 1, "MIN_KEY_TILES": 8, "num_warps": 4, "num_stages": 3,
    },
}  # fmt: skip


@functools.cache
def gpu_class(gpu: Gpu | None) -> str:
    """The table's word for this GPU."""
    name = "" if gpu is None else gpu.name
    return next((kind for kind, words in GPU_CLASSES.items() if any(word in name for word in words)), "default")


def launch_settings(operation: str, device: torch.device, shape: str = "") -> Settings:
    """The table's entry for this operation on this device, the closest there is."""
    return settings_of_gpu(operation, gpu_of(device), shape)


@functools.cache
def settings_of_gpu(operation: str, gpu: Gpu | None, shape: str) -> Settings:
    """The table's entry for this operation on a GPU; None: where Triton interprets."""
    return settings_of_class(operation, gpu_class(gpu), shape)


def settings_of_class(operation: str, kind: str, shape: str = "") -> Settings:
    """The table's entry for this operation on a class of GPUs: its shape's before its own, the class's first."""
    names = [f"{operation}/{shape}", operation] if shape else [operation]
    for key in [(name, of) for name in names for of in (kind, "default")]:
        if key in SETTINGS:
            return FUSED_MULTIPLY_ADDS | SETTINGS[key]
    raise KeyError(f"no launch settings for {operation}")
