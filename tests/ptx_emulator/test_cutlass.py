"""A GEMM of CUTLASS for sm_90a, from the headers in pip's nvidia-cutlass: code that nobody here wrote."""

import ctypes
import importlib.util
import re
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
def library():
    native()
    library = BUILD / "cutlass_gemm.so"
    with locked():
        if not library.exists() or library.stat().st_mtime < SOURCE.stat().st_mtime:
            flags = ["-gencode", "arch=compute_90a,code=compute_90a", "--no-compress", "-cudart", "none", "-shared"]
            flags += ["-std=c++17", "--expt-relaxed-constexpr", "-DNDEBUG", "-w", "-Xcompiler=-fPIC,-O0"]
            flags += [f"-I{path}" for path in find_headers()]
            link = [f"-L{BUILD}", "-lptx_emulator", "-Xlinker", f"-rpath={BUILD}"]
            run([find_nvcc(), *flags, str(SOURCE), "-o", str(library), *link])
    return library


def run_gemm(library: Path, m: int, n: int, k: int, **checks):
    """What went wrong, the result, what it should be, and the launch's record."""
    gemm = ctypes.CDLL(str(library))
    a, b = torch.randn(m, k).bfloat16(), torch.randn(n, k).bfloat16()
    c, d = torch.randn(m, n), torch.empty(m, n)
    with Registration() as registration, ptx_emulator.profile("sm_90"), ptx_emulator.set_checks(**checks):
        pointers = [registration.add(x, name) for x, name in ((a, "a"), (b, "b"), (c, "c"), (Fresh(d), "d"))]
        registration.apply()
        failed = gemm.gemm(*map(ctypes.c_void_p, pointers), m, n, k)
        gemm.cudaGetErrorString.restype = ctypes.c_char_p
        error = gemm.cudaGetErrorString(1).decode() if failed else None
        gemm.cudaGetLastError()
    records = native().take_records()
    return error, d.double(), a.double() @ b.double().T + 2 * c.double(), records


@pytest.mark.parametrize("checks", [{"seed": 0}, {"seed": 1}, {"random_order": False}], ids=["0", "1", "in order"])
@pytest.mark.parametrize(("m", "n", "k"), [(128, 128, 256), (72, 136, 40), (200, 64, 8)])
def test_gemm(library, m, n, k, checks):
    error, result, expected, records = run_gemm(library, m, n, k, **checks)
    assert not error
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-4)
    assert records[0]["wgmma"] == -(-m // 64) * -(-n // 64) * -(-k // 64) * 4
    assert records[0]["unique_bytes_written"] == 4 * m * n


LEFT_OUT = {
    r"fence\.proxy\.async\.shared::cta": "with no fence.proxy.async between",
    r"fence\.mbarrier_init\.release\.cluster": "the async proxy does not know this mbarrier",
    r"wgmma\.fence\.sync\.aligned": "no wgmma.fence between",
    r"wgmma\.commit_group\.sync\.aligned": "(reads|is used) that no .*wait has covered|touched with no barrier between",
    r"wgmma\.wait_group\.sync\.aligned 0": "(wgmma reads|of a wgmma is used) that no .*wait",
    r"cp\.async\.bulk\.commit_group": "bulk copy .* that no wait has covered|touched with no barrier between",
    r"cp\.async\.bulk\.wait_group\.read \d": "bulk copy .* that no wait has covered|touched with no barrier between",
    r"bar\.sync [^;]*": "race|no mbarrier was initialised there",
    r"mbarrier\.init[^;]*": "no mbarrier was initialised there",
    r"mbarrier\.arrive\.shared::cluster[^;]*": "deadlock",
    r"mbarrier\.arrive\.expect_tx[^;]*": "deadlock",
    r"mbarrier\.expect_tx[^;]*": "is under way that no wait has covered|it was not told to expect",
}


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("instruction", LEFT_OUT, ids=[name.replace("\\", "").split("[")[0] for name in LEFT_OUT])
def test_what_is_left_out_is_noticed(library, tmp_path, instruction, seed):
    """The same program without one kind of instruction, blanks in its place."""
    binary, count = re.subn(
        rf"\b{instruction};".encode(), lambda match: b";".ljust(len(match.group())), library.read_bytes()
    )
    assert count
    (tmp_path / "without.so").write_bytes(binary)
    error = run_gemm(tmp_path / "without.so", 200, 200, 256, seed=seed)[0]
    assert error and re.search(LEFT_OUT[instruction], error, re.DOTALL), error
