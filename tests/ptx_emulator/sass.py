"""The machine code that ptxas makes of a kernel: its loops, read from what nvdisasm prints."""

import re
import subprocess
from pathlib import Path
from typing import NamedTuple

from .build import find_cuda_tool

SECTION = re.compile(r"^\.text\.(\S+):", re.MULTILINE)
LABEL = re.compile(r"^(\.L\w+):")
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@\S+\s+)?([A-Z]\w*)(.*)")
REGISTER = re.compile(r"\bR(\d+)(\.64)?")
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


def innermost(loops: list[Loop]) -> list[Loop]:
    return [loop for loop in loops if not any(loop.contains(other) for other in loops)]


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
    """The innermost loop with the most mma; if no loop has any, the longest loop."""
    loops = find_loops(code)
    with_mma = [loop for loop in loops if loop.mma]
    return max(innermost(with_mma) or loops, key=lambda loop: (loop.mma, loop.length), default=None)


def loads_of_sums(code: str) -> list[int]:
    """For each of the innermost loops that add up what they load from global memory: the loads before the first use."""
    instructions = INSTRUCTION.findall(code)
    counts = []
    for loop in innermost(find_loops(code)):
        loads, pending = 0, set()
        for opcode, rest in instructions[loop.first : loop.last + 1]:
            modifiers, _, operands = rest.partition(" ")
            registers = [{int(number), int(number) + bool(pair)} for number, pair in REGISTER.findall(operands)]
            if opcode == "LDG":
                loads += 1
                words = 4 if ".128" in modifiers else 2 if ".64" in modifiers else 1
                pending |= {min(registers[0]) + word for word in range(words)}
            elif pending & set().union(*registers[operands.startswith("R") :]):
                if opcode == "FADD":
                    counts.append(loads)
                break
    return counts


def disassemble(cubin: Path) -> dict[str, str] | None:
    """The code of a cubin's kernels, by their (mangled) names; None without a disassembler."""
    disassembler = find_cuda_tool("nvdisasm")
    if not disassembler:
        return None
    text = subprocess.run([disassembler, "-c", cubin], capture_output=True, text=True, check=True).stdout
    _, *parts = SECTION.split(text)
    return dict(zip(parts[::2], parts[1::2], strict=True))
