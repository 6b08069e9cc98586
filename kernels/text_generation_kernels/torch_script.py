"""TorchScript, which runs a loop of small operations on a CPU without Python between them.

torch deprecates it and names torch.compile and torch.export instead, which need a C++ compiler to do better. What goes
through here is Python as well: where torch has TorchScript no more, it runs as it is, slower.
"""

import warnings
from collections.abc import Callable

import torch


def scripted(code: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The function or module, run by TorchScript where torch has it."""
    if not hasattr(torch.jit, "script"):
        return code
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        compiled: Callable[..., torch.Tensor] = torch.jit.script(code)
        return compiled
