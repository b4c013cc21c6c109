"""The CUDA runtime in software: a whole CUDA program, compiled by nvcc, runs without a GPU."""

import subprocess
from pathlib import Path

import pytest

import ptx_emulator
from ptx_emulator.build import BUILD, find_nvcc, locked, native, run

KERNELS = Path(__file__).parent / "kernels"

pytestmark = pytest.mark.skipif(bool(ptx_emulator.missing()), reason=str(ptx_emulator.missing()))


@pytest.fixture(scope="module")
def program():
    native()
    source, binary = KERNELS / "host_program.cu", BUILD / "host_program"
    library = BUILD / "libptx_emulator.so"
    with locked():
        if not binary.exists() or binary.stat().st_mtime < max(path.stat().st_mtime for path in (source, library)):
            flags = ["-gencode", "arch=compute_80,code=compute_80", "--no-compress", "-cudart", "none"]
            link = [f"-L{BUILD}", "-lptx_emulator", "-Xlinker", f"-rpath={BUILD}"]
            run([find_nvcc(), "-std=c++17", *flags, str(source), "-o", str(binary), *link])
    return binary


def test_program(program):
    result = subprocess.run([program], capture_output=True, text=True)
    lines = result.stdout.splitlines()
    assert result.returncode == 0, result.stdout + result.stderr
    assert lines[0] == "scale of 300 elements, factor 1.00"
    assert lines[1] == "wrong 0, counted 300"
    assert lines[2] == "sm_80, 108 multiprocessors, 166912 bytes, 2 blocks"
    assert "bytes of dynamic shared memory without cudaFuncSetAttribute: got 61440, wanted at most 49152" in lines[3]
    assert "scale of 0 elements" in lines[4]
    assert "threads in a block: got 2048, wanted at most 1024" in lines[5]
    assert "thread 299: out of bounds in global memory: 4 bytes" in lines[6]
    assert "byte 1200 of 'cudaMalloc', which has 1200 bytes" in lines[6]
