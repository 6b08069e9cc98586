"""TorchScript, which runs a loop of small operations on a CPU without Python between them.

torch deprecates it and names torch.compile and torch.export instead, which need a C++ compiler to do better. What goes
through here is Python as well: where torch has TorchScript no more, or does not support it, it runs as it is, slower.
"""

import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch


def scripted(code: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The function or module, run by TorchScript where torch has it."""
    script = _find("script")
    if script is None or sys.version_info >= (3, 14):
        return code
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        compiled: Callable[..., torch.Tensor] = script(code)
        return compiled


def outside_script(method: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A method that TorchScript calls as Python."""
    ignore = _find("ignore")
    marked: Callable[..., torch.Tensor] = method if ignore is None else ignore(method)
    return marked


def _find(name: str) -> Any:
    return getattr(getattr(torch, "jit", None), name, None)
