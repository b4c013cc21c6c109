"""A GEMM of CUTLASS for sm_90a, from the headers in pip's nvidia-cutlass: code that nobody here wrote."""

import ctypes
import importlib.util
from pathlib import Path

import pytest
import torch

import ptx_emulator
from ptx_emulator.build import BUILD, find_nvcc, locked, native, run
from ptx_emulator.device import Fresh, Registration

SOURCE = Path(__file__).parent / "kernels/cutlass_gemm.cu"


def find_headers() -> list[Path]:
    spec = importlib.util.find_spec("cutlass_library")
    if spec is None or not spec.submodule_search_locations:
        return []
    source = Path(spec.submodule_search_locations[0]) / "source"
    return [path for path in (source / "include", source / "tools/util/include") if path.is_dir()]


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(ptx_emulator.missing()), reason=str(ptx_emulator.missing())),
    pytest.mark.skipif(len(find_headers()) < 2, reason="needs the headers of nvidia-cutlass"),
]


@pytest.fixture(scope="module")
def gemm():
    native()
    library = BUILD / "cutlass_gemm.so"
    with locked():
        if not library.exists() or library.stat().st_mtime < SOURCE.stat().st_mtime:
            flags = ["-gencode", "arch=compute_90a,code=compute_90a", "--no-compress", "-cudart", "none", "-shared"]
            flags += ["-std=c++17", "--expt-relaxed-constexpr", "-DNDEBUG", "-w", "-Xcompiler=-fPIC,-O0"]
            flags += [f"-I{path}" for path in find_headers()]
            link = [f"-L{BUILD}", "-lptx_emulator", "-Xlinker", f"-rpath={BUILD}"]
            run([find_nvcc(), *flags, str(SOURCE), "-o", str(library), *link])
    return ctypes.CDLL(str(library))


@pytest.mark.parametrize("checks", [{"seed": 0}, {"seed": 1}, {"random_order": False}], ids=["0", "1", "in order"])
@pytest.mark.parametrize(("m", "n", "k"), [(128, 128, 256), (72, 136, 40), (200, 64, 8)])
def test_gemm(gemm, m, n, k, checks):
    a, b = torch.randn(m, k).bfloat16(), torch.randn(n, k).bfloat16()
    c, d = torch.randn(m, n), torch.empty(m, n)
    with Registration() as registration, ptx_emulator.profile("sm_90"), ptx_emulator.set_checks(**checks):
        pointers = [registration.add(x, name) for x, name in ((a, "a"), (b, "b"), (c, "c"), (Fresh(d), "d"))]
        registration.apply()
        failed = gemm.gemm(*map(ctypes.c_void_p, pointers), m, n, k)
        gemm.cudaGetErrorString.restype = ctypes.c_char_p
        assert not failed, (failed, gemm.cudaGetErrorString(1).decode())
    (record,) = native().take_records()
    torch.testing.assert_close(d.double(), a.double() @ b.double().T + 2 * c.double(), rtol=1e-5, atol=1e-4)
    assert record["wgmma"] == -(-m // 64) * -(-n // 64) * -(-k // 64) * 4
    assert record["unique_bytes_written"] == d.nbytes
