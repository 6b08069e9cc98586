"""Runs the router and samples its Python stack: `profiled_router.py FILE ROUTER_ARGUMENTS`.

One sample for each millisecond of CPU time of the process (or each tick of the kernel's clock, if that is longer),
taken by a signal handler: waiting is not seen, and nothing is slowed down but by the handler itself. Python looks for
signals at calls and loops alone, so what C code and the kernel take shows in the function that runs next, most often
the caller. SIGUSR2 forgets all samples; at the end FILE gets one line for each distinct stack: the functions from
outermost to innermost, those of the router with `router/` before them, and the number of samples.
"""

import signal
import sys
from collections import Counter
from pathlib import Path
from types import CodeType, FrameType

from text_generation_router.__main__ import main

INTERVAL_S = 0.001


class Sampler:
    """Counts stacks."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[CodeType, ...]] = Counter()
        signal.signal(signal.SIGPROF, self._sample)
        signal.signal(signal.SIGUSR2, lambda *_: self._counts.clear())
        signal.setitimer(signal.ITIMER_PROF, INTERVAL_S, INTERVAL_S)

    def _sample(self, number: int, frame: FrameType | None) -> None:
        stack = []
        while frame is not None:
            stack.append(frame.f_code)
            frame = frame.f_back
        self._counts[tuple(stack)] += 1

    def write(self, path: Path) -> None:
        """Stop, and write what was seen."""
        signal.setitimer(signal.ITIMER_PROF, 0)
        with path.open("w") as file:
            for stack, count in self._counts.most_common():
                file.write(f"{';'.join(map(_name, reversed(stack)))} {count}\n")


def _name(code: CodeType) -> str:
    path = Path(code.co_filename)
    is_own = "text_generation_router" in path.parts
    return f"{'router/' if is_own else ''}{path.stem}:{code.co_qualname}".replace(" ", "")


if __name__ == "__main__":
    path = Path(sys.argv.pop(1))
    sampler = Sampler()
    try:
        main()
    finally:
        sampler.write(path)
