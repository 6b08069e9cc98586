"""Model type -> the class that runs it, imported when first asked for."""

import importlib

from torch import nn

_LLAMA = ("text_generation_shard.models.llama", "LlamaModel")

REGISTRY: dict[str, tuple[str, str]] = {"llama": _LLAMA, "mistral": _LLAMA, "qwen2": _LLAMA, "qwen3": _LLAMA}


def model_class(model_type: str) -> type[nn.Module]:
    """The class of a model type that ModelConfig has let pass."""
    module, name = REGISTRY[model_type]
    found: type[nn.Module] = getattr(importlib.import_module(module), name)
    return found
