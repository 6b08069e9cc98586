"""The text of TTGIR, Triton's form of a kernel ahead of its machine code, as nested blocks of operations."""

import re
from dataclasses import dataclass, field

LOCATION = re.compile(r"\s*loc\((?:[^()]|\([^()]*\))*\)")
NAME = re.compile(r"%[\w.$-]+(?:#\d+)?")
OPERATION = re.compile(r'(?:(%[^=]*) = )?"?([\w.]+)"?(.*)')
TYPE = re.compile(r"\s*(?:!?[\w.]*<)?((?:\d+x)*)(\w+|!tt\.ptr)")


@dataclass
class Block:
    arguments: list[str] = field(default_factory=list)
    operations: list["Operation"] = field(default_factory=list)
    num_threads: int = 0  # of a warpgroup's


@dataclass
class Operation:
    name: str
    results: list[str]
    operands: list[str]  # every value named in its line behind its results
    text: str
    shape: tuple[int, ...] = ()  # of its last result
    element: str = ""
    blocks: list[Block] = field(default_factory=list)

    def attribute(self, pattern: str) -> str:
        found = re.search(pattern, self.text)
        assert found, f"{pattern} in {self.name}{self.text}"
        return found[1]


def parse(text: str) -> Operation:
    """The kernel's function: an operation `tt.func` with one block."""
    blocks = [Block()]
    num_threads = 32 * int(re.findall(r'"ttg.num-warps" = (\d+)', text)[0])
    for line in (line.strip() for line in LOCATION.sub("", text).splitlines()):
        if line.startswith("}"):
            blocks.pop()
        elif line.startswith("^"):
            blocks[-1].arguments = NAME.findall(line)
        elif line and not line.startswith(("#", "default", "partition")):
            blocks[-1].operations.append(_operation(line))
        if line.endswith("{"):
            warps = re.search(r"num_warps\((\d+)\)", line)
            block = Block(NAME.findall(line), num_threads=32 * int(warps[1]) if warps else num_threads)
            blocks[-1].operations[-1].blocks.append(block)
            blocks.append(block)
    module = blocks[0].operations[0].blocks[0]
    return module.operations[0]


def _operation(line: str) -> Operation:
    match = OPERATION.fullmatch(line)
    assert match, line
    results, name, text = match.groups()
    names = NAME.findall(results or "")
    if ":" in (results or ""):
        names = [f"{names[0]}#{index}" for index in range(int(results.rpartition(":")[2]))]
    operation = Operation(name, names, NAME.findall(text), text)
    if kind := TYPE.match(text.rpartition("->" if "->" in text else " : ")[2]):
        operation.shape = tuple(int(size) for size in kind[1].split("x")[:-1])
        operation.element = kind[2]
    return operation
