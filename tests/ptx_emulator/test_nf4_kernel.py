"""The library's own dequantisation kernel, launched directly: bit-equal to the CPU's."""

import struct
from pathlib import Path

import pytest
import torch

import ptx_emulator
from peft_kernels.ops import quantize_4bit
from peft_kernels.testing.reference import nf4 as reference
from ptx_emulator import report
from ptx_emulator.device import Fresh

CSRC = Path(__file__).parent.parent.parent / "csrc"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]  # in the order of csrc/common/dtype.h

pytestmark = pytest.mark.skipif(bool(ptx_emulator.missing()), reason=str(ptx_emulator.missing()))


def pack(weight, out, tiles):
    """Nf4DequantizeKernelParams (csrc/nf4/cuda/dequantize_kernel.cuh), and the tensors that it points to."""
    plain = not weight.nested
    tensors = [weight.absmax] if plain else [weight.absmax, *weight.nested]
    pointers = [tensor.data_ptr() for tensor in tensors]
    absmax = [*pointers, 0, 0, 0, 0] if plain else [0, *pointers]
    log2 = weight.nested_blocksize.bit_length() - 1
    n, k = weight.shape
    fields = struct.pack(
        "<QQQQQQi4xqqiii4x",
        weight.codes.data_ptr(),
        *absmax,
        log2,
        n,
        k,
        weight.blocksize.bit_length() - 1,
        0,
        DTYPES.index(weight.dtype),
    )
    codebook = reference.CODEBOOKS["nf4"].tolist()
    return fields + struct.pack("<qqQq16f", 0, n * k, out.data_ptr(), tiles, *codebook), [weight.codes, *tensors]


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "nested"])
def test_dequantize(double_quant, dtype, architecture):
    weight = quantize_4bit(torch.randn(33, 517).to(dtype), double_quant=double_quant)
    out = torch.empty(weight.shape, dtype=dtype)
    tile = 16 // out.element_size() * 256 * 4
    params, memory = pack(weight, out, -(-out.numel() // tile))
    module = ptx_emulator.compile_cuda(CSRC / "nf4/cuda/launch.cu", architecture, includes=(CSRC,))
    kind = {torch.float32: "IfLb1E", torch.bfloat16: "I13__nv_bfloat16Lb1E", torch.float16: "I6__halfLb1E"}[dtype]
    (kernel,) = (name for name in module.kernels() if kind in name)
    with ptx_emulator.profile(architecture):
        record = module.launch(kernel, 2, 256, params, memory=[*memory, Fresh(out)])
    assert torch.equal(out, weight.dequantize())
    loads, stores = record["global_load"], record["global_store"]
    assert record["unique_bytes_written"] == out.numel() * out.element_size()
    # The rows of the weight are aligned to nothing: codes and output begin where they begin, and no bank is met twice.
    assert stores["sectors"] <= stores["ideal_sectors"] + stores["requests"]
    assert loads["requests"] > 0
    assert record["shared_load"]["wavefronts"] == record["shared_load"]["ideal_wavefronts"]


@pytest.mark.parametrize("architecture", ["sm_80", "sm_86", "sm_89", "sm_90"])
def test_plan_follows_the_card(architecture):
    # 660 tiles: more CTAs than 82 multiprocessors hold, 6 each, fewer than the others do.
    from ptx_emulator.ops import emulated

    weight = quantize_4bit(torch.randn(660 * 4096))
    with ptx_emulator.profile(architecture), emulated() as launches:
        out = weight.dequantize()
        (launch,) = launches()
    assert torch.equal(out, weight.dequantize())
    assert launch["grid"] == (492 if architecture == "sm_86" else 660, 1, 1)
    # Nothing but the codes and statistics is read, and every sector of the output is written whole.
    assert launch["unique_bytes_read"] == weight.codes.numel() + 4 * weight.absmax.numel()
    assert launch["global_store"]["sectors"] == launch["global_store"]["ideal_sectors"]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_traffic(nested, dtype):
    from ptx_emulator.ops import emulated

    weight = quantize_4bit(torch.randn(576, 576).to(dtype), double_quant=nested)
    with emulated() as launches:
        out = weight.dequantize()
        (launch,) = launches()
    stored = [weight.codes, weight.absmax, *(weight.nested if nested else ())]
    minimum = out.nbytes + sum(tensor.nbytes for tensor in stored)
    unused = 256 * 4 if nested else 0  # at most: it reads what it needs of the table of nested statistics
    assert minimum - unused <= report.compulsory_bytes(launch) <= minimum
    wavefronts, ideal_wavefronts = report.shared_wavefronts(launch)
    assert wavefronts == ideal_wavefronts > 0
    # Nested statistics are looked up in two small tables, which stay in the L1.
    assert report.moved_bytes(launch) <= (1.35 if nested else 1.05) * report.compulsory_bytes(launch)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("blocksize", [32, 4096])
def test_traffic_of_quantisation(blocksize, dtype):
    from ptx_emulator.ops import emulated

    tensor = torch.randn(576, 576).to(dtype)
    with emulated() as launches:
        weight = quantize_4bit(tensor, blocksize)
        (launch,) = launches()
    assert launch["unique_bytes_read"] == tensor.nbytes
    assert launch["unique_bytes_written"] == weight.codes.nbytes + weight.absmax.nbytes
    assert 32 * launch["global_load"]["sectors"] <= 1.01 * tensor.nbytes
    wavefronts, ideal_wavefronts = report.shared_wavefronts(launch)
    assert wavefronts == ideal_wavefronts > 0


@pytest.mark.parametrize("architecture", ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_110", "sm_120"])
def test_registers(architecture):
    kernels = report.resources(CSRC / "nf4/cuda/launch.cu", architecture, includes=(CSRC,))
    assert len(kernels) == 9
    for kernel, used in kernels.items():
        # On sm_120, two registers of an instance are kept in memory, which only codes at odd addresses take.
        spilt = architecture == "sm_120" and "13__nv_bfloat16Lb0E" in kernel
        assert used.spill_bytes == 2 * used.stack_bytes == 16 * spilt
        # The plan of dequantisation counts on as many threads as a multiprocessor takes, 2048 or 1536.
        if "dequantize" in kernel:
            assert used.registers <= (32 if architecture in ("sm_80", "sm_90", "sm_100") else 40)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_decoding_for_products(architecture):
    """What the fused products make of codes in registers: the same bits, at 3.2 instructions a weight at most."""
    source = Path(__file__).parent / "kernels/decode.cu"
    module = ptx_emulator.compile_cuda(source, architecture, includes=(CSRC,))
    instructions = []
    for kernel, blocks in ((module.one_block, 1), (module.five_blocks, 5)):
        weight = quantize_4bit(torch.randn(32, 64 * blocks).bfloat16())
        out = torch.empty(weight.shape, dtype=torch.bfloat16)
        with ptx_emulator.profile(architecture):
            record = kernel(1, 32, weight.codes, weight.absmax, reference.CODEBOOKS["nf4"].float(), Fresh(out))
        assert torch.equal(out, weight.dequantize())
        instructions.append(record["warp_instructions"] - record["instructions"]["memory"])
    # Of 64 weights: planes 32, words 8 times 21. The rest is addresses.
    assert instructions[1] - instructions[0] <= 3.2 * 4 * 64
