"""Counters as a table, beside what machine code tells."""

from pathlib import Path

import pytest
import torch

import ptx_emulator
from ptx_emulator import report, sass
from ptx_emulator.gemm import SOURCE, multiply, padded

pytestmark = pytest.mark.skipif(bool(ptx_emulator.missing()), reason=str(ptx_emulator.missing()))


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
