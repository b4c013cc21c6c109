"""Counters as a table; the mma share of a main loop, from machine code."""

import re
from pathlib import Path

import pytest
import torch

import ptx_emulator
from ptx_emulator import report, sass
from ptx_emulator.gemm import SOURCE, multiply, padded

pytestmark = pytest.mark.skipif(bool(ptx_emulator.missing()), reason=str(ptx_emulator.missing()))

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
    assert sass.main_loop(CODE) == sass.Loop(2, 5, mma=2)
    without = re.sub(r"HMMA\S*", "FFMA", CODE)
    assert sass.main_loop(without) == sass.Loop(1, 8, mma=0)
    assert sass.main_loop("/*0000*/ EXIT ;\n.L_x_1:\n/*0010*/ BRA `(.L_x_1);") is None


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
    assert sass.loads_of_sums(SUMS) == [1, 3]


@pytest.fixture(scope="module")
def used():
    return report.resources(SOURCE, "sm_80")


def test_resources(used):
    assert 32 < used["gemm_bf16"].registers < 256 and used["gemm_bf16"].spill_bytes == 0


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_mma_share_of_machine_code(architecture):
    if not sass.find_cuda_tool("nvdisasm"):
        pytest.skip("needs nvdisasm")
    used = report.resources(SOURCE, architecture)
    for kernel in ("gemm_bf16", "gemm_bf16_transposed", "gemm_fp16"):
        assert 0.02 < used[kernel].mma_share < 0.2  # 16 mma, and the loads of a stage with all their bounds
    assert used["arithmetic"].mma_share == 0


def test_no_disassembler(monkeypatch):
    monkeypatch.setattr(sass, "find_cuda_tool", lambda name: None)
    assert sass.disassemble(Path("none.cubin")) is None
    assert report.resources(SOURCE, "sm_80")["gemm_bf16"].mma_share == "no disassembler"


def test_table(used):
    kernel = ptx_emulator.compile_cuda(SOURCE).gemm_bf16
    a, b = padded(64, 64, torch.bfloat16), padded(64, 64, torch.bfloat16)
    _, record = multiply(kernel, a, b, 64)
    text = report.table([report.row(record, used["gemm_bf16"])])
    print(text)
    cells = dict([cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines())
    assert cells["kernel"] == "gemm_bf16" and cells["mma"] == "128"
    assert cells["shared wavefronts / ideal"] == cells["load sectors / ideal"] == "1.00"
    assert cells["store sectors / ideal"] == "2.00" and cells["bytes / compulsory"] == "1.50"  # it stores by halves
    assert cells["bytes read of argument 0"] == str(a.nbytes) and cells["shared wavefronts / mma"] == "4.00"
    assert cells["barriers"] == "8" and cells["shared bytes"] == "24576"
    assert cells["warp instructions"] == str(sum(int(cells[name]) for name in cells if name.startswith("- ")))
