"""Loops, loads and the ALU pipe, from machine code as nvdisasm prints it."""

import re

import pytest

from ptx_emulator import sass
from ptx_emulator.sass import Stretch

# As nvdisasm prints it. The loop over tiles has more mma than either loop inside; HFMA2.MMA is none.
CODE = """
.text.kernel:
        /*0000*/                   HFMA2.MMA R5, -RZ, RZ, 0, 2.3 ;
.L_x_1:
        /*0010*/              @!P0 BRA `(.L_x_3) ;
.L_x_2:
        /*0020*/                   LDSM.16.M88.4 R4, [R2] ;
        /*0030*/                   HMMA.16816.F32 R28, R48, R40.reuse, R28 ;
        /*0040*/                   HMMA.16816.F32 R24, R36, R40, R24 ;
        /*0050*/               @P1 BRA `(.L_x_2) ;
.L_x_3:
        /*0060*/                   HMMA.16816.F32 R24, R36, R40, R24 ;
        /*0070*/              @!P2 BRA `(.L_x_3) ;
        /*0080*/              @!P3 BRA `(.L_x_1) ;
        /*0090*/                   EXIT ;
.L_x_4:
        /*00a0*/                   BRA `(.L_x_4);
"""


def test_main_loop():
    assert sass.main_loop(sass.parse(CODE)) == sass.Loop(2, 5, mma=2)
    without = re.sub(r"HMMA\S*", "FFMA", CODE)
    assert sass.main_loop(sass.parse(without)) == sass.Loop(1, 8, mma=0)
    assert sass.main_loop(sass.parse("/*0000*/ EXIT ;\n.L_x_1:\n/*0010*/ BRA `(.L_x_1);")) is None


# Sums of what is loaded: one load after the other; three together, the last a pair; and no sum.
SUMS = """
.text.kernel:
.L_x_1:
        /*0000*/               @!P0 LDG.E R4, [R2.64] ;
        /*0010*/                   FADD R5, R4, R5 ;
        /*0020*/                   LDG.E R4, desc[UR4][R2.64+0x4] ;
        /*0030*/                   FADD R5, R4, R5 ;
        /*0040*/              @!P0 BRA `(.L_x_1) ;
.L_x_2:
        /*0050*/                   LDG.E R4, [R2.64] ;
        /*0060*/                   LDG.E.CONSTANT R6, [R2.64+0x4] ;
        /*0070*/                   LDG.E.64 R8, desc[UR4][R2.64+0x8] ;
        /*0080*/                   IMAD.WIDE R2, R10, 0x4, R2 ;
        /*0090*/                   FADD R5, R5, R9 ;
        /*00a0*/              @!P0 BRA `(.L_x_2) ;
.L_x_3:
        /*00b0*/                   LDG.E R4, [R2.64] ;
        /*00c0*/                   STG.E [R6.64], R4 ;
        /*00d0*/              @!P0 BRA `(.L_x_3) ;
        /*00e0*/                   EXIT ;
"""


def test_loads_of_sums():
    assert sass.loads_of_sums(sass.parse(SUMS)) == [1, 3]


def parse(*lines):
    """Instructions of lines, of which labels end with a colon."""
    return sass.parse("\n".join(line if line.endswith(":") else f"/*0000*/ {line} ;" for line in lines))


@pytest.mark.parametrize(
    ("line", "registers"),
    [
        ("@!P0 LDG.E.128.CONSTANT R4, [R2.64+0x10]", [2, 3, 4, 5, 6, 7]),
        ("LDG.E.64 R8, desc[UR4][R2.64]", [2, 3, 8, 9]),
        ("@P1 LDG.E.U8.CONSTANT R17, [R2.64]", [2, 3, 17]),
        ("STG.E.64 [R2.64], R6", [2, 3, 6, 7]),
        ("STS.128 [R3.X16+UR4+0x800], R12", [3, 12, 13, 14, 15]),
        ("LDGSTS.E.BYPASS.LTC128B.128 [R15+0x200], [R8.64], !P4", [8, 9, 15]),
        ("HMMA.16816.F32.BF16 R28, R32.reuse, R24, R28", [*range(24, 26), *range(28, 36)]),
        ("IMAD.WIDE.U32 R2, R10, 0x4, R6", [2, 3, 6, 7, 10]),
        ("DADD R2, R4, -R6", [2, 3, 4, 5, 6, 7]),
        ("PRMT R17, R64, R20.reuse, RZ", [17, 20, 64]),
        ("ISETP.GE.AND P0, PT, R28, UR4, PT", [28]),
    ],
)
def test_registers_of_an_instruction(line, registers):
    (instruction,) = parse(line)
    assert sorted(instruction.registers) == registers


def test_registers_of_an_instruction_in_predicated_code():
    (instruction,) = parse("@!P0 LDG.E.128.CONSTANT R4, [R2.64+0x10]")
    assert instruction.predicate == "!P0" and instruction.opcode == "LDG" and instruction.size == 16


DISTANCES = {
    "straight on, any register of four": (
        ["LDG.E.128 R4, [R2.64]", "IADD3 R2, R2, 0x10, RZ", "MOV R8, R9", "FADD R8, R7, R8"],
        3,
    ),
    "overwritten": (["LDG.E R4, [R2.64]", "NOP", "MOV R4, RZ"], 2),
    "by a predicated instruction": (["@P0 LDG.E R4, [R2.64]", "NOP", "@P1 STS [R9], R4"], 2),
    "never": (["LDG.E R4, [R2.64]", "NOP", "EXIT", "STS [R9], R4"], None),
    "the shorter of two ways": (
        ["LDG.E R4, [R2.64]", "@P0 BRA `(.L_x_2)", "NOP", "NOP", "NOP", ".L_x_2:", "NOP", "STS [R9], R4"],
        3,
    ),
    "not past an unconditional branch": (
        ["LDG.E R4, [R2.64]", "BRA `(.L_x_2)", "STS [R9], R4", ".L_x_2:", "NOP", "NOP", "STS [R9], R4"],
        4,
    ),
    "past a branch with a second predicate": (["LDG.E R4, [R2.64]", "BRA P4, `(.L_x_2)", "MOV R5, R4", ".L_x_2:"], 2),
    "by a call that leaves a loop": (
        ["LDG.E R4, [R2.64]", "@P0 CALL.REL.NOINC `(.L_x_2)", "NOP", "NOP", "EXIT", ".L_x_2:", "MOV R5, R4"],
        2,
    ),
    "in the next iteration": (
        [".L_x_1:", "NOP", "MOV R5, R4", "LDG.E R4, [R2.64]", "NOP", "@P0 BRA `(.L_x_1)", "EXIT"],
        4,
    ),
    "a copy, by its group": (["LDGSTS.E.128 [R4], [R2.64]", "NOP", "LDGDEPBAR", "MOV R5, R4", "DEPBAR.LE SB0, 0x0"], 4),
    "a copy, not by a wait for the groups before": (
        ["LDGSTS.E.128 [R4], [R2.64]", "LDGDEPBAR", "DEPBAR.LE SB0, 0x1", "NOP", "LDGDEPBAR", "DEPBAR.LE SB0, 0x1"],
        5,
    ),
    "a copy, not in an open group": (["LDGSTS.E [R4], [R2.64]", "DEPBAR.LE SB0, 0x0", "NOP"], None),
    "a copy, in the next iteration": (
        [".L_x_1:", "DEPBAR.LE SB0, 0x0", "LDGSTS.E [R4], [R2.64]", "NOP", "LDGDEPBAR", "@P0 BRA `(.L_x_1)"],
        4,
    ),
}


@pytest.mark.parametrize("case", list(DISTANCES))
def test_distance_from_a_load_to_its_use(case):
    lines, wanted = DISTANCES[case]
    instructions = parse(*lines)
    (at,) = (at for at, each in enumerate(instructions) if each.opcode in sass.LOADS)
    assert sass.distance(instructions, at) == wanted


def latency(prologue, step):
    """Of a kernel with a loop of these instructions and an mma at its end."""
    mma = "HMMA.16816.F32 R28, R32, R24, R28"
    return sass.find_latency(parse(*prologue, ".L_x_9:", *step, mma, "@P0 BRA `(.L_x_9)", "EXIT"))


def test_waits_of_loads_one_after_another():
    def load(i):
        return f"LDG.E R{i}, [R2.64]"

    def use(i):
        return f"STS [R3], R{i}"

    chained = latency([load(4), use(4), load(5), use(5), load(6), use(6)], [])
    assert chained.prologue == Stretch(waits=3, looped=0, loads=1, size=4)
    together = latency([load(4), load(5), load(6), use(4), use(5), use(6)], [])
    assert together.prologue == Stretch(waits=1, looped=0, loads=3, size=12)
    # The second load of a pair waits for the first one's result.
    assert latency([load(4), "LDG.E R5, [R4.64]", use(5)], []).prologue.waits == 2
    # Of two ways the one with more waits counts.
    branch = [load(4), "@P0 BRA `(.L_x_1)", use(4), load(5), use(5), ".L_x_1:", use(4)]
    assert latency(branch, []).prologue.waits == 2
    # A loop is gone through once, but is told.
    loop = [".L_x_1:", load(4), use(4), "@P1 BRA `(.L_x_1)", load(5), use(5)]
    assert latency(loop, []).prologue[:2] == (2, 1)


def test_loads_of_a_step():
    copies = ["LDGSTS.E.BYPASS.128 [R9], [R2.64]", "@P5 LDGSTS.E.BYPASS.128 [R9+0x800], [R2.64], P2", "LDGDEPBAR"]
    wait = "DEPBAR.LE SB0, 0x0"
    ahead = latency([*copies], [wait, *copies])
    assert ahead.prologue == Stretch(waits=1, looped=0, loads=2, size=32)
    assert ahead.step == Stretch(waits=0, looped=0, loads=2, size=32)  # the mma hides what is under way
    assert ahead.copy_distance == 4 and ahead.load_distance is None
    at_once = latency([], [*copies, wait])
    assert at_once.step.waits == 1 and at_once.copy_distance == 2
    # A load that its own step uses, and one that the next step uses.
    dependent = latency([], ["LDG.E R4, [R2.64]", "NOP", "STS [R9], R4"])
    assert dependent.step.waits == 1 and dependent.load_distance == 2
    pipelined = latency(["LDG.E R4, [R2.64]"], ["STS [R9], R4", "LDG.E R4, [R2.64]"])
    assert pipelined.prologue.waits == 1 and pipelined.step.waits == 0 and pipelined.load_distance == 3


def test_loads_of_a_loop_without_mma():
    step = [
        ".L_x_1:",
        "LDG.E R4, [R2.64]",
        "STG.E [R2.64], R4",
        "LDG.E.64 R6, [R2.64]",
        "MOV R8, R7",
        "@P0 BRA `(.L_x_1)",
    ]
    assert sass.find_latency(parse(*step)).step == Stretch(waits=2, looped=0, loads=1, size=8)
    assert sass.find_latency(parse("LDG.E R4, [R2.64]", "EXIT")) is None


def test_alu_instructions_of_a_weight():
    decode = ["PRMT R4, R5, R6, R7", "LOP3.LUT R8, R9, R10, R11, 0xd8, !PT", "IMAD.SHL.U32 R5, R5, 0x10, RZ"]
    pairs = ["PRMT R12, R4, 0x4051, R8", "@P0 PRMT R13, R4.reuse, 0x6273, R8"]
    assert latency([], [*decode, *pairs]).alu_per_weight == 1  # two of `decode` and both of `pairs`, of four weights
    by_table = ["PRMT R20, R5, 0x4440, RZ", "F2FP.BF16.F32.PACK_AB R21, R22, R23"]
    planes = ["F2FP.BF16.F32.PACK_AB R1, R2, R3", "F2FP.BF16.F32.PACK_AB R2, R3, R6", "PRMT R24, R1, 0x7531, R2"]
    assert latency([], [*decode, *pairs, *by_table, *planes]).alu_per_weight == 9 / 6
    assert latency([], decode).alu_per_weight is None


def test_branch_back_that_only_code_behind_the_loop_leads_to():
    instructions = sass.parse("""
.text.kernel:
.L_x_1:
        /*0000*/                   LDG.E R4, [R2.64] ;
        /*0010*/                   HMMA.16816.F32 R28, R48, R40.reuse, R28 ;
        /*0020*/                   BRA `(.L_x_3) ;
.L_x_2:
        /*0030*/               @P0 BRA `(.L_x_1) ;
        /*0040*/                   EXIT ;
.L_x_3:
        /*0050*/                   BRA `(.L_x_2) ;
""")
    assert sass.find_latency(instructions).step == Stretch(0, 0, 1, 4)
