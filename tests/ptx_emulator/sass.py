"""The machine code that ptxas makes of a kernel, read from what nvdisasm prints: its loops, how long its loads from
global memory are under way before they are waited for, and what decoding costs the ALU pipe."""

import re
import subprocess
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from .build import find_cuda_tool

SECTION = re.compile(r"^\.text\.(\S+):", re.MULTILINE)
LABEL = re.compile(r"^(\.L\w+):")
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@(\S+)\s+)?([A-Z]\w*)([^\s;]*)([^;]*)")
REGISTER = re.compile(r"\bR(\d+)(\.64)?")
TARGET = re.compile(r"`\((\.L\w+)\)")
MMA = re.compile(r"[A-Z]G?MMA")  # HMMA, IMMA, DMMA, HGMMA; HFMA2.MMA is an fma of another unit
LOADS = ("LDG", "LDGSTS")

# What the ALU pipe executes on sm_80 to sm_90, which takes a warp every second clock: integers and bits other than
# multiplications (those go to the FMA pipe, as moves and shifts by IMAD do), comparisons and selections of both kinds,
# moves, and conversions between fp32 and two 16-bit numbers. From "Pipelines" in the Kernel Profiling Guide of Nsight
# Compute, and, for the rate, from the table of arithmetic throughput in the CUDA C++ Programming Guide: 64 results a
# clock of a multiprocessor.
ALU = re.compile(
    "BMSK|F2FP|FMNMX|FSEL|FSET|FSETP|HMNMX2|I2FP|I2IP|IABS|IADD3|IMNMX|ISETP|LEA|LOP3|MOV|P2R|PLOP3|PRMT|R2P|SEL|SGXT|"
    "SHF|VABSDIFF4?|VIADD|VIADDMNMX|VIMNMX"
)
# The last step of nf4_decode.cuh's decode() by planes is one of these for each two weights; nothing else has such a
# selector. By a table it is F2FP, of which making planes has two for each PRMT with the other selector.
DECODED_PAIR, SPLIT_PAIRS = re.compile(r", 0x(4051|6273),"), re.compile(r", 0x7531,")


class Instruction(NamedTuple):
    """One line. `registers` are those that it reads or writes, so that it waits for a load of any of them; `target` is
    the number of the instruction that a branch goes to."""

    predicate: str | None
    opcode: str
    modifiers: str
    operands: str
    registers: frozenset[int]
    target: int | None

    @property
    def is_mma(self) -> bool:
        return MMA.fullmatch(self.opcode) is not None

    @property
    def size(self) -> int:
        """Of an access to memory, in bytes."""
        return access_size(self.modifiers)

    def next(self, at: int) -> tuple[int, ...]:
        """The instructions that may follow this one, which is number `at`."""
        if self.target is not None and self.opcode in ("BRA", "CALL"):  # ptxas leaves loops by CALL.REL.NOINC, too
            always = self.predicate is None and self.operands.startswith("`")
            return (self.target,) if always else (at + 1, self.target)
        return () if self.opcode in ("EXIT", "RET") and self.predicate is None else (at + 1,)


def access_size(modifiers: str) -> int:
    width = re.search(r"\.[US]?(8|16|64|128)\b", modifiers)
    return int(width[1]) // 8 if width else 4


def find_registers(opcode: str, modifiers: str, operands: str) -> frozenset[int]:
    """An operand of several registers is named by its first."""
    found = set()
    for place, operand in enumerate(operands.split(", ")):
        if "[" in operand:
            words = 1
        elif MMA.fullmatch(opcode):
            words = 2 if place == 2 else 4
        elif opcode.startswith(("LD", "ST")):
            words = (access_size(modifiers) + 3) // 4
        else:
            words = 2 if opcode.startswith("D") or (".WIDE" in modifiers and place in (0, 3)) else 1
        for number, pair in REGISTER.findall(operand):
            found |= set(range(int(number), int(number) + max(words, 1 + bool(pair))))
    return frozenset(found)


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


def parse(code: str) -> list[Instruction]:
    lines, labels = [], {}
    for line in code.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(lines)
        elif instruction := INSTRUCTION.search(line):
            lines.append((*instruction.groups()[:3], instruction[4].strip()))
    targets = [TARGET.search(operands) for *_, operands in lines]
    return [
        Instruction(*line, find_registers(*line[1:]), labels.get(target[1]) if target else None)
        for line, target in zip(lines, targets, strict=True)
    ]


def innermost(loops: list[Loop]) -> list[Loop]:
    return [loop for loop in loops if not any(loop.contains(other) for other in loops)]


def find_loops(instructions: list[Instruction]) -> list[Loop]:
    """The loops of one kernel, by the numbers of its instructions."""
    return [
        Loop(each.target, last, sum(inside.is_mma for inside in instructions[each.target : last + 1]))
        for last, each in enumerate(instructions)
        if each.opcode == "BRA" and each.target is not None and each.target < last
    ]


def main_loop(instructions: list[Instruction]) -> Loop | None:
    """The innermost loop with the most mma; if no loop has any, the longest loop."""
    loops = find_loops(instructions)
    with_mma = [loop for loop in loops if loop.mma]
    return max(innermost(with_mma) or loops, key=lambda loop: (loop.mma, loop.length), default=None)


# ---- loads from global memory ---------------------------------------------------------------------------------------


class Load(NamedTuple):
    """One that is under way. A copy to shared memory (LDGSTS) fills no registers; `groups` of copies were closed since.
    A load is hidden once the matrix unit has work, or once another one, which was under way with it, was waited for."""

    opcode: str
    size: int
    registers: frozenset[int]
    predicate: str | None = None
    groups: int = 0
    hidden: bool = False

    @classmethod
    def of(cls, instruction: Instruction) -> "Load":
        first = REGISTER.match(instruction.operands) if instruction.opcode == "LDG" else None
        words = range((instruction.size + 3) // 4)
        filled = frozenset(int(first[1]) + word for word in words) if first else frozenset()
        return cls(instruction.opcode, instruction.size, filled, instruction.predicate)

    def joined(self, others: list["Load"]) -> "Load":
        """One load for several of which only one is executed."""
        if not others:
            return self
        size = max(load.size for load in (self, *others))
        return self._replace(
            size=size, registers=self.registers.union(*(each.registers for each in others)), predicate=None
        )

    def ends_at(self, instruction: Instruction) -> bool:
        """Whether an instruction waits for it."""
        if self.opcode == "LDG":
            return bool(self.registers & instruction.registers) and not self.excludes(instruction)
        bound = re.match(r"SB0, 0x(\w+)", instruction.operands) if instruction.opcode == "DEPBAR" else None
        return bound is not None and self.groups > int(bound[1], 16)

    def excludes(self, instruction: Instruction) -> bool:
        """Whether only one of the two is executed, as of two loads to one register."""
        own, other = self.predicate or "", instruction.predicate or ""
        return own != other and own.strip("!") == other.strip("!") != ""

    def beside(self, instruction: Instruction, hidden: bool) -> "Load":
        """It after an instruction that does not wait for it. One that may change its predicate ends all exclusions."""
        own = (self.predicate or "").strip("!")
        return self._replace(
            predicate=None if own in instruction.operands.split(", ")[:2] else self.predicate,
            groups=self.groups + (instruction.opcode == "LDGDEPBAR"),
            hidden=self.hidden or hidden,
        )


class Flight(NamedTuple):
    """The loads under way at some instruction, and how often loads have been waited for, one after another."""

    loads: tuple[Load, ...] = ()
    waits: int = 0
    looped: int = 0  # of the waits, those in loops: they come again in each iteration

    def after(self, instruction: Instruction, in_loop: bool = False) -> "Flight":
        arrived = [load for load in self.loads if load.ends_at(instruction)]
        is_wait = any(not load.hidden for load in arrived)
        hidden = is_wait or instruction.is_mma
        loads = [load.beside(instruction, hidden) for load in self.loads if load not in arrived]
        if instruction.opcode in LOADS:
            load = Load.of(instruction)
            others = [other for other in loads if other.excludes(instruction) and other.registers & load.registers]
            loads = [*(other for other in loads if other not in others), load.joined(others)]
        return Flight(tuple(loads), self.waits + is_wait, self.looped + (is_wait and in_loop))

    @property
    def size(self) -> int:
        return sum(load.size for load in self.loads)


def follow(
    instructions: list[Instruction], first: int, last: int, start: Flight, best: Callable[[Flight], object]
) -> dict[int, Flight]:
    """The state before each instruction of a stretch. Where paths meet, the best one goes on; branches backwards are
    not taken."""
    inside = [loop for loop in find_loops(instructions) if first <= loop.first and loop.last < last]
    looped = {at for loop in inside for at in range(loop.first, loop.last + 1)}
    states = {first: start}
    for at in range(first, last + 1):
        if at not in states:
            continue
        after = states[at].after(instructions[at], at in looped)
        for following in instructions[at].next(at):
            if at < following <= last:
                states[following] = max(states.get(following, after), after, key=best)
    return states


def distance(instructions: list[Instruction], at: int) -> int | None:
    """From a load to the first instruction that waits for it, on the shortest way, which may go around a loop."""
    ways = deque([(at, Load.of(instructions[at]), 0)])
    seen = set()
    while ways:
        at, load, length = ways.popleft()
        for following in instructions[at].next(at):
            if following >= len(instructions) or (following, load.groups) in seen:
                continue
            if load.ends_at(instructions[following]):
                return length + 1
            seen.add((following, load.groups))
            ways.append((following, load.beside(instructions[following], False), length + 1))
    return None


class Stretch(NamedTuple):
    """The loads of a stretch of code, on the paths where they are most."""

    waits: int  # one after another, each for loads that nothing had hidden
    looped: int  # of these, those in loops
    loads: int  # under way at once, without a wait for any of them
    size: int  # of these, in bytes of a thread


class Latency(NamedTuple):
    """How well a kernel keeps the latency of global memory and the ALU pipe from its way."""

    prologue: Stretch  # up to the first mma, the main loop's first iteration included
    step: Stretch  # of a later iteration of the main loop, up to its first mma
    load_distance: int | None  # fewest instructions from an LDG of the main loop to its first use
    copy_distance: int | None  # and from an LDGSTS to the DEPBAR that waits for it
    alu_per_weight: float | None  # of the main loop, instructions of the ALU pipe for each 4-bit weight it decodes


def find_latency(instructions: list[Instruction]) -> Latency | None:
    """Of a kernel with a main loop; where that has no mma, the whole of it counts."""
    loop = main_loop(instructions)
    if not loop:
        return None
    inside = range(loop.first, loop.last + 1)
    end = next((at for at in inside if instructions[at].is_mma), loop.last)

    def measure(first: int, start: Callable[[Callable], Flight]) -> Stretch:
        most_waits, most_loads = (lambda state: state.waits), (lambda state: (len(state.loads), state.size))
        slowest = follow(instructions, first, end, start(most_waits), most_waits)
        fullest = max(follow(instructions, first, end, start(most_loads), most_loads).values(), key=most_loads)
        waits = max(slowest.values(), key=most_waits)
        return Stretch(waits.waits, waits.looped, *most_loads(fullest))

    def iteration(best: Callable) -> Flight:
        before = follow(instructions, loop.first, loop.last, Flight(), best).get(loop.last)
        if before is None:  # only code behind the loop leads to its branch back
            return Flight()
        return before.after(instructions[loop.last])._replace(waits=0, looped=0)

    distances = {
        opcode: [distance(instructions, at) for at in inside if instructions[at].opcode == opcode] for opcode in LOADS
    }
    shortest = [min((each for each in distances[opcode] if each), default=None) for opcode in LOADS]
    weights = count_decoded(instructions[loop.first : loop.last + 1])
    alu = sum(ALU.fullmatch(instructions[at].opcode) is not None for at in inside)
    return Latency(
        measure(0, lambda best: Flight()), measure(loop.first, iteration), *shortest, alu / weights if weights else None
    )


def count_decoded(instructions: list[Instruction]) -> int:
    """The 4-bit weights that a stretch of code decodes by planes or, some of them, by a table."""
    by_planes, made = (sum(which.search(each.operands) is not None for each in instructions)
                       for which in (DECODED_PAIR, SPLIT_PAIRS))  # fmt: skip
    by_table = sum(each.opcode == "F2FP" for each in instructions) - 2 * made
    return 2 * (by_planes + by_table) if by_planes else 0


def loads_of_sums(instructions: list[Instruction]) -> list[int]:
    """For each of the innermost loops that add up what they load from global memory: the loads before the first use."""
    counts = []
    for loop in innermost(find_loops(instructions)):
        under_way = Flight()
        for instruction in instructions[loop.first : loop.last + 1]:
            if any(load.ends_at(instruction) for load in under_way.loads):
                if instruction.opcode == "FADD":
                    counts.append(len(under_way.loads))
                break
            under_way = under_way.after(instruction)
    return counts


def disassemble(cubin: Path) -> dict[str, list[Instruction]] | None:
    """The code of a cubin's kernels, by their (mangled) names; None without a disassembler."""
    disassembler = find_cuda_tool("nvdisasm")
    if not disassembler:
        return None
    text = subprocess.run([disassembler, "-c", cubin], capture_output=True, text=True, check=True).stdout
    _, *parts = SECTION.split(text)
    return {name: parse(code) for name, code in zip(parts[::2], parts[1::2], strict=True)}
