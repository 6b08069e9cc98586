"""Kernels compiled ahead of their first launch, into Triton's cache on disk, by several processes at once.

The launches themselves say what there is to compile: they are made on tensors without memory ("meta"), noted, and
compiled under the very keys that launches on a GPU look for.
"""

import itertools
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from text_generation_kernels.gpu import Gpu, assumed_gpu

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Variant:
    """A kernel with the types, constants and options of some of its launches: what is compiled once."""

    kernel: Any  # triton.JITFunction
    specialization: str  # as Triton writes it for others to compile

    @property
    def name(self) -> str:
        """The kernel's."""
        return str(self.kernel.fn.__name__)


class _CompilingDriver:
    """Stands for Triton's driver of CUDA, of which compiling asks nothing but the target."""

    _devices = itertools.count(-1, -1)

    def __init__(self, gpu: Gpu) -> None:
        self._capability = gpu.capability[0] * 10 + gpu.capability[1]
        self._device = next(self._devices)  # kernels keep what they have compiled by device

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        return self._device

    def get_current_stream(self, device: int) -> int:
        return 0


def log_compilations() -> None:
    """From now on log each kernel that this process itself compiles: none, where all were compiled ahead."""

    def note(*, src: Any, times: Any, cache_hit: bool, **_: Any) -> None:
        if not cache_hit:
            logger.info("Compiled %s in %.1f s, as it was launched", src.name, times.total / 1e6)

    triton.knobs.compilation.listener = note


@contextmanager
def _compiling_for(gpu: Gpu) -> Iterator[None]:
    before = driver._active  # asking for it would look for a GPU
    driver.set_active(_CompilingDriver(gpu))
    try:
        yield
    finally:
        driver._active = before


@contextmanager
def noted_launches(gpu: Gpu) -> Iterator[list[Variant]]:
    """Inside, launches on tensors without memory are noted, each variant once, and nothing is compiled or run."""
    variants: list[Variant] = []
    seen: set[tuple[int, str]] = set()

    def note(*, key: str, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        if (id(fn.jit_function), key) not in seen:
            seen.add((id(fn.jit_function), key))
            variants.append(Variant(fn.jit_function, compile["specialization_data"]))
        return True  # Triton goes no further

    with _compiling_for(gpu), triton.knobs.runtime.scope(), assumed_gpu(gpu):
        triton.knobs.runtime.jit_cache_hook = note
        yield variants


def compile_variants(
    variants: Sequence[Variant], gpu: Gpu, num_processes: int, begin: Callable[[], None] = lambda: None
) -> int:
    """Compile what Triton's cache lacks, each variant in a process of its own; answers how many could not be.

    `variants` come in the order of their launches. Each process calls `begin` first.

    For a process that has one thread and that runs nothing on a GPU.
    """
    # Up to Triton 3.6 at least, a kernel's key depends on which kernels that call the same functions had theirs before.
    for variant in variants:
        _ = variant.kernel.cache_key
    running: dict[int, str] = {}
    num_failed = 0
    # The longest kernels take longest: they begin first.
    left = sorted(variants, key=lambda variant: len(variant.kernel.src))
    while left or running:
        if left and len(running) < num_processes:
            variant = left.pop()
            running[_compile_beside(variant, gpu, begin)] = variant.name
        else:
            pid, status = os.wait()
            name = running.pop(pid)
            if status != 0:
                num_failed += 1
                print(f"{name} was not compiled: its process ended with status {status}", file=sys.stderr)
    return num_failed


def _compile_beside(variant: Variant, gpu: Gpu, begin: Callable[[], None]) -> int:
    """The id of a new process that compiles the variant, and ends."""
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        begin()
        with _compiling_for(gpu):
            variant.kernel.preload(variant.specialization)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)
