"""Runs a compiled Gluon kernel, given as its TTGIR text, in numpy: what only a Hopper GPU runs is so tested on a CPU.

A value is a whole logical tensor; layouts are ignored. A warpgroup is a generator that pauses ahead of every operation
that another could notice; who goes on is drawn at random from a seed, so that the same seed gives the same run.
Asynchrony is as unkind as its rules allow, and what it could spoil is an error:

- A tile in shared memory is NaN from the beginning of a copy into it until the copy's arrival at its barrier, at any
  later time: the copies are a further generator, in their order of issue.
- A product takes its tiles when a wait first covers it. They must have been written ahead of the warpgroup's last
  fence, and not since the product was begun. Its result cannot be read before that wait.
- A barrier completes a phase when all its arrivals have come, and has no room for more; when nobody can go on, that is
  a deadlock. A load or store outside its array is an error too.

Left out: the threads of a warpgroup, which go on together here, and the compiler's work behind TTGIR, the barriers that
it puts between them among it; alignment; the approximations of a GPU's arithmetic.
"""

import math
import random
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from ttgir_operations import DTYPES, Fault, Pointer, result_of
from ttgir_text import Block, Operation

Steps = Generator[Callable[[], bool], None, list[Any]]  # each yields whether it can go on


class Tile(NamedTuple):
    """A tile in shared memory, or its transposed view."""

    values: np.ndarray
    written: np.ndarray  # one number: when; infinite while a copy into it is under way, and at first


@dataclass
class Barrier:
    """An mbarrier in shared memory."""

    count: int = 0
    pending: int = 0
    phase: int = 0

    def arrive(self, count: int) -> None:
        if count > self.pending:
            raise Fault(f"{count} arrivals at a barrier that expects {self.pending}")
        self.pending -= count
        if self.pending == 0:
            self.phase += 1
            self.pending = self.count


@dataclass(eq=False)
class Product:
    """A product of matrices that was begun: the value of its name until a wait has covered it."""

    left: Any
    right: Any
    total: Any  # None: it begins at 0
    begun: int
    result: np.ndarray | None = None

    def finish(self) -> None:
        for factor in (self.left, self.right):
            if isinstance(factor, Tile) and factor.written > self.begun:
                raise Fault("a tile was overwritten before a product had read it")
        factors = (factor.values if isinstance(factor, Tile) else factor for factor in (self.left, self.right))
        left, right = (np.asarray(factor, np.float32) for factor in factors)
        total = self.total.result if isinstance(self.total, Product) else self.total
        self.result = left @ right + (0 if total is None else total)


@dataclass(eq=False)
class Warpgroup:
    """What runs on its own: the kernel's first warpgroup, each partition, and the copies that are under way."""

    name: str
    num_threads: int = 0
    values: dict[str, Any] = field(default_factory=dict)
    steps: Steps | None = None
    can_go_on: Callable[[], bool] = lambda: True
    waits_at: str = ""
    fenced: int = -1
    products: deque[Product] = field(default_factory=deque)
    copies: list[tuple[Tile, np.ndarray]] = field(default_factory=list)  # that no arrival follows yet


def run_program(kernel: Operation, arguments: dict[str, Any], program: int, seed: int = 0) -> None:
    """Run one program of a kernel's grid. Arguments by name: flat arrays, which are written to, and numbers."""
    function = kernel.blocks[0]
    values = {}
    for name in function.arguments:
        value = arguments[name.removeprefix("%")]
        values[name] = Pointer(value, np.int64(0)) if isinstance(value, np.ndarray) else value
    run = _Run(program, random.Random(f"{program} {seed}"))
    run.add("default", function, values)
    # A GPU computes on with infinities and NaN, and lets whole numbers overflow.
    with np.errstate(all="ignore"):
        run.run()


class _Run:
    """One program: its warpgroups, its copies and its time, which every access of shared memory moves on."""

    def __init__(self, program: int, draw: random.Random) -> None:
        self.program, self.draw, self.time = program, draw, 0
        self.arrivals: deque[tuple[list[tuple[Tile, np.ndarray]], Barrier, int]] = deque()
        self.copies = Warpgroup("copies", steps=self._finish_copies())
        self.warpgroups = [self.copies]  # in the order in which they come to their turn

    def add(self, name: str, block: Block, values: dict[str, Any]) -> Warpgroup:
        group = Warpgroup(name, block.num_threads, values)
        group.steps = self._block(block, group)
        self.warpgroups.insert(self.draw.randrange(len(self.warpgroups) + 1), group)
        return group

    def run(self) -> None:
        while self.warpgroups != [self.copies]:
            if self.draw.random() < 1 / 16:
                self.draw.shuffle(self.warpgroups)
            group = next((group for group in self.warpgroups if group.can_go_on()), None)
            if group is None:
                places = "; ".join(f"{group.name} at {group.waits_at}" for group in self.warpgroups)
                raise Fault(f"deadlock: {places}")
            try:
                group.can_go_on = next(group.steps)
            except StopIteration:
                self.warpgroups.remove(group)
                if group.products or group.copies:
                    raise Fault(f"{group.name} ends with products or copies that nothing waits for") from None
        if self.arrivals:
            raise Fault("the kernel ends with copies under way")

    def now(self) -> int:
        self.time += 1
        return self.time

    def _finish_copies(self) -> Steps:
        while True:
            yield lambda: len(self.arrivals) > 0
            copies, barrier, count = self.arrivals.popleft()
            for tile, values in copies:
                tile.values[:] = values
                tile.written[...] = self.now()
            barrier.arrive(count)

    def _block(self, block: Block, group: Warpgroup) -> Steps:
        """Runs it and returns what its last operation gives."""
        values = group.values
        for operation in block.operations:
            name, operands = operation.name, [values.get(name) for name in operation.operands]
            results: Any = []
            if name in ("scf.yield", "tt.return", "ttg.warp_yield", "ttg.warp_return"):
                return operands
            if name == "scf.for":
                results = yield from self._loop(operation, group)
            elif name == "scf.if":
                chosen = 0 if operands[0] else 1
                if chosen < len(operation.blocks):
                    results = yield from self._block(operation.blocks[chosen], group)
            elif name == "ttg.warp_specialize":
                default, *parts = operation.blocks
                others = [
                    self.add(f"partition {index}", part, dict(zip(part.arguments, operands, strict=True)))
                    for index, part in enumerate(parts)
                ]
                yield from self._block(default, group)
                yield lambda others=others: not any(other in self.warpgroups for other in others)
            elif any(isinstance(operand, Product) for operand in operands) and "warp_group_dot" not in name:
                raise Fault(f"a product is read that nothing has waited for: {name}{operation.text}")
            elif method := getattr(self, f"do_{name.rpartition('.')[2]}", None):
                group.waits_at = name + operation.text.partition(" :")[0]
                yield partial(_has_completed, *operands) if name == "ttng.wait_barrier" else lambda: True
                results = method(operation, group, *operands)
            else:
                results = result_of(operation, operands, self.program)
            results = results if isinstance(results, list) else [results]
            values.update(zip(operation.results, results, strict=False))
        return []

    def _loop(self, operation: Operation, group: Warpgroup) -> Steps:
        names, values = operation.operands, group.values
        start, end, step = (int(values[name]) for name in names[1:4])
        carried = [values[name] for name in names[5::2]]
        for index in range(start, end, step):
            values[names[0]] = np.int32(index)
            values.update(zip(names[4::2], carried, strict=True))
            carried = yield from self._block(operation.blocks[0], group)
        return carried

    def do_local_alloc(self, operation: Operation, _group: Warpgroup) -> tuple[Tile | Barrier, ...]:
        num_tiles, *shape = operation.shape
        if operation.element == "i64":
            return tuple(Barrier() for _ in range(num_tiles))
        dtype = DTYPES[operation.element]
        return tuple(Tile(np.full(shape, math.nan, dtype), np.full((), math.inf)) for _ in range(num_tiles))

    def do_local_store(self, _operation: Operation, _group: Warpgroup, values: np.ndarray, tile: Tile) -> None:
        tile.values[:] = values
        tile.written[...] = self.now()

    def do_init_barrier(self, operation: Operation, _group: Warpgroup, barrier: Barrier) -> None:
        barrier.count = barrier.pending = int(operation.attribute(r", (\d+)"))

    def do_wait_barrier(self, _operation: Operation, _group: Warpgroup, *_: Any) -> None:
        """The turn came when the phase was complete: nothing is left to do."""

    def do_arrive_barrier(self, operation: Operation, _group: Warpgroup, barrier: Barrier, is_on: Any = True) -> None:
        if is_on:
            barrier.arrive(int(operation.attribute(r", (\d+)")))

    def do_async_copy_global_to_local(
        self, _operation: Operation, group: Warpgroup, source: Pointer, tile: Tile, mask: Any = True
    ) -> None:
        group.copies.append((tile, np.where(mask, source.memory[source.checked(mask)], 0)))
        tile.values[:] = math.nan
        tile.written[...] = math.inf

    def do_async_copy_mbarrier_arrive(self, operation: Operation, group: Warpgroup, barrier: Barrier) -> None:
        assert "noIncrement" in operation.text
        self.arrivals.append((group.copies, barrier, group.num_threads))
        group.copies = []

    def do_fence_async_shared(self, _operation: Operation, group: Warpgroup) -> None:
        group.fenced = self.now()

    def do_warp_group_dot(
        self, operation: Operation, group: Warpgroup, left: Any, right: Any, total: Any, adds: Any = True
    ) -> list[Any]:
        for factor in (left, right):
            if isinstance(factor, Tile) and factor.written > group.fenced:
                raise Fault("a product of a tile that is not there, or was written behind the last fence")
        product = Product(left, right, total if adds else None, self.now())
        group.products.append(product)
        return [product] if "isAsync = true" in operation.text else self._wait(group, 0, [product])

    def do_warp_group_dot_wait(self, operation: Operation, group: Warpgroup, *values: Any) -> list[Any]:
        return self._wait(group, int(operation.attribute(r"pendings = (\d+)")), values)

    @staticmethod
    def _wait(group: Warpgroup, num_pending: int, values: Sequence[Any]) -> list[Any]:
        while len(group.products) > num_pending:
            group.products.popleft().finish()
        return [value if not isinstance(value, Product) or value.result is None else value.result for value in values]


def _has_completed(barrier: Barrier, parity: Any, is_on: Any = True) -> bool:
    return not is_on or barrier.phase & 1 != parity
