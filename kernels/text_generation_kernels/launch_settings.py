"""How each kernel is launched on each class of GPU: block sizes, warps, pipeline stages. A plain table.

Nothing tunes itself when the server starts. `python -m text_generation_kernels.benchmarks.tune OP` measures the
candidates on the machine at hand and prints entries for this table.
"""

import functools
from collections.abc import Mapping

import torch

Settings = Mapping[str, int]

# A GPU class is the first of which one word stands in the device's name.
GPU_CLASSES = {
    "h100": ("H100",),
    "h200": ("H200",),
    "a100": ("A100",),
    "ada": ("RTX 40", "L40", "L4", "Ada"),
}

# (operation, GPU class) -> keyword arguments of the launch. "default" serves every class without an entry. An
# operation may have entries for one of its shapes too, named operation/shape.
SETTINGS: dict[tuple[str, str], Settings] = {
    ("rms_norm", "default"): {"num_warps": 8, "num_stages": 1},
    ("rotary_kv_write", "default"): {"HEADS": 8, "num_warps": 2, "num_stages": 1},
    ("gated_activation", "default"): {"BLOCK": 1024, "num_warps": 4, "num_stages": 1},
    ("sampling_statistics", "default"): {"num_warps": 8, "num_stages": 1},
    ("sampling_search", "default"): {"num_warps": 8, "num_stages": 1},
    ("sampling_choice", "default"): {"num_warps": 8, "num_stages": 1},
    ("skinny_matmul", "default"): {"BLOCK_N": 32, "BLOCK_K": 128, "SPLIT_K": 1, "num_warps": 4, "num_stages": 5},
    ("skinny_matmul_gated", "default"): {
        "BLOCK_N": 16, "BLOCK_K": 128, "SPLIT_K": 1, "num_warps": 4, "num_stages": 5,
    },
}  # fmt: skip


@functools.cache
def gpu_class(device: torch.device) -> str:
    """The table's word for this GPU."""
    if device.type != "cuda":
        return "default"
    name = torch.cuda.get_device_name(device)
    return next((kind for kind, words in GPU_CLASSES.items() if any(word in name for word in words)), "default")


@functools.cache
def launch_settings(operation: str, device: torch.device, shape: str = "") -> Settings:
    """The table's entry for this operation, the closest there is."""
    kind = gpu_class(device)
    names = [f"{operation}/{shape}", operation] if shape else [operation]
    for key in [(name, of) for name in names for of in (kind, "default")]:
        if key in SETTINGS:
            return SETTINGS[key]
    raise KeyError(f"no launch settings for {operation}")
