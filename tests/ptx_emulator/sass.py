"""The machine code that ptxas makes of a kernel: its main loop, read from what nvdisasm prints."""

import re
import subprocess
from pathlib import Path
from typing import NamedTuple

from .build import find_cuda_tool

SECTION = re.compile(r"^\.text\.(\S+):", re.MULTILINE)
LABEL = re.compile(r"^(\.L\w+):")
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@\S+\s+)?([A-Z]\w*)(.*)")
TARGET = re.compile(r"`\((\.L\w+)\)")
MMA = re.compile(r"[A-Z]G?MMA")  # HMMA, IMMA, DMMA, HGMMA; HFMA2.MMA is an fma of another unit


class Loop(NamedTuple):
    """From the target of a branch backwards to the branch."""

    first: int
    last: int
    mma: int

    @property
    def length(self) -> int:
        return self.last - self.first + 1

    @property
    def mma_share(self) -> float:
        return self.mma / self.length

    def contains(self, other: "Loop") -> bool:
        return self != other and self.first <= other.first and other.last <= self.last


def find_loops(code: str) -> list[Loop]:
    """The loops of one kernel, by the numbers of its instructions."""
    opcodes: list[str] = []
    labels: dict[str, int] = {}
    branches: list[tuple[int, int]] = []
    for line in code.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(opcodes)
        elif instruction := INSTRUCTION.search(line):
            target = TARGET.search(instruction[2])
            if instruction[1] == "BRA" and target and labels.get(target[1], len(opcodes)) < len(opcodes):
                branches.append((labels[target[1]], len(opcodes)))
            opcodes.append(instruction[1])
    is_mma = [MMA.fullmatch(opcode) is not None for opcode in opcodes]
    return [Loop(first, last, sum(is_mma[first : last + 1])) for first, last in branches]


def main_loop(code: str) -> Loop | None:
    """Of the innermost loops with mma the one with most; where none has any, the longest loop."""
    loops = find_loops(code)
    with_mma = [loop for loop in loops if loop.mma]
    innermost = [loop for loop in with_mma if not any(loop.contains(other) for other in with_mma)]
    return max(innermost or loops, key=lambda loop: (loop.mma, loop.length), default=None)


def main_loops(cubin: Path) -> dict[str, Loop | None] | None:
    """The main loops of a cubin's kernels, by their (mangled) names; None without a disassembler."""
    disassembler = find_cuda_tool("nvdisasm")
    if not disassembler:
        return None
    text = subprocess.run([disassembler, "-c", cubin], capture_output=True, text=True, check=True).stdout
    _, *parts = SECTION.split(text)
    return {name: main_loop(code) for name, code in zip(parts[::2], parts[1::2], strict=True)}
