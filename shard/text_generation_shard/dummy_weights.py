"""Random weights in a model's shape, for benchmarks on machines that do not hold the model."""

import torch
from torch import nn

# The spread that language models are commonly initialised with: activations stay finite through any depth.
STANDARD_DEVIATION = 0.02


@torch.inference_mode()
def fill_at_random(model: nn.Module, rank: int) -> None:
    """Fill matrices with normal numbers and vectors, which ranks hold in full, with ones."""
    for index, parameter in enumerate(model.parameters()):
        if parameter.dim() == 1:
            parameter.fill_(1.0)
        else:
            generator = torch.Generator(parameter.device).manual_seed(rank << 32 | index)
            parameter.normal_(0.0, STANDARD_DEVIATION, generator=generator)
