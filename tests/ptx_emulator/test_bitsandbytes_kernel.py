"""bitsandbytes' own CUDA GEMM, from the PTX in the installed wheel: code that nobody here wrote, and its mistakes."""

import subprocess
from pathlib import Path

import bitsandbytes
import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch

import ptx_emulator
from ptx_emulator import EmulatorError
from ptx_emulator.build import find_cuda_tool
from ptx_emulator.device import Fresh

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(ptx_emulator.missing()), reason=str(ptx_emulator.missing())),
]

KERNEL = "gemm_4bit_sm80_m16n8k16I13__nv_bfloat16Li32ELi64ELi64E"  # bf16, tiles of 32 x 64 x 64


@pytest.fixture(scope="module")
def gemm(tmp_path_factory):
    """A function of activations, a quantised weight and a bias or None."""
    libraries = sorted(Path(bitsandbytes.__file__).parent.glob("libbitsandbytes_cuda13*.so"))
    extractor = find_cuda_tool("cuobjdump")
    if not (libraries and extractor):
        pytest.skip("needs cuobjdump, and a bitsandbytes for CUDA 13")
    folder = tmp_path_factory.mktemp("bitsandbytes")
    subprocess.run([extractor, "-all", "-xptx", "all", libraries[-1]], cwd=folder, capture_output=True, check=True)
    sources = [text for path in folder.glob("*.ptx") if KERNEL in (text := path.read_text())]
    if not sources:
        pytest.skip(f"this bitsandbytes has no PTX of {KERNEL}")
    # Compiled for the newest card, of instructions that sm_80 has.
    module = ptx_emulator.load_ptx(sources[0].replace(".target sm_120", ".target sm_80"))
    (kernel,) = (name for name in module.kernels() if KERNEL in name)

    def launch(a, codes, state, bias):
        (m, k), n = a.shape, state.shape[0]
        out, null = torch.empty(m, n, dtype=a.dtype), np.uint64(0)
        operands = [a, codes, state.absmax, null, null, null, Fresh(out), null if bias is None else bias]
        numbers = [np.int32(value) for value in (m, n, k, state.blocksize, 2)]
        grid, shared = (-(-m // 32), -(-n // 64)), 2 * (32 + 64) * (64 + 8) * 2
        module.launch(kernel, grid, 256, *operands, *numbers, shared=shared)
        return out

    return launch


def problem(n, m=40, k=192):
    a, weight, bias = (torch.randn(*shape).bfloat16() for shape in ((m, k), (n, k), (n,)))
    codes, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    return a, codes, state, bias


def expected(a, codes, state, bias=None):
    out = a.double() @ bnb.dequantize_4bit(codes, state).double().T
    return (out if bias is None else out + bias.double()).bfloat16()


def test_right_where_tiles_fit(gemm):
    a, codes, state, bias = problem(n=128)
    torch.testing.assert_close(gemm(a, codes, state, bias), expected(a, codes, state, bias), rtol=2**-7, atol=2**-6)


def test_ragged_without_bias(gemm):
    a, codes, state, _ = problem(n=100)
    torch.testing.assert_close(gemm(a, codes, state, None), expected(a, codes, state), rtol=2**-7, atol=2**-6)


@pytest.mark.parametrize(
    ("n", "biased", "mistake"),
    [
        (100, True, r"ld\.global.*out of bounds in global memory: 2 bytes .* of 'argument 7'"),  # past the bias
        (101, False, r"st\.global.*misaligned access: 4 bytes"),  # pairs of elements, of rows of odd length
    ],
)
def test_finds_mistakes(gemm, n, biased, mistake):
    a, codes, state, bias = problem(n)
    with pytest.raises(EmulatorError, match=mistake):
        gemm(a, codes, state, bias if biased else None)
        pytest.skip("this bitsandbytes is right there")
