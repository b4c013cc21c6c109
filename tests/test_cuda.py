"""Which cards and drivers the kernels run on, and what a failure of CUDA leaves behind."""

import os
import subprocess

import ptx_emulator
import pytest
import tolerances
import torch
from comparison import assert_close
from lora_linear_cases import make_case, run
from ptx_emulator.build import ROOT, find_nvcc

from peft_kernels import _extension, cuda
from peft_kernels.ops import adapter, glu, lora_linear, quantize_4bit, rms_norm

DEVICE = torch.device("cuda", 0)

needs_emulator = pytest.mark.skipif(bool(ptx_emulator.missing()), reason=str(ptx_emulator.missing()))


@pytest.fixture
def emulated():
    from ptx_emulator.ops import emulated

    with emulated():
        yield


@pytest.fixture
def card(emulated, monkeypatch):
    """A build with CUDA, and a torch that has a card; the driver is the emulator's."""
    monkeypatch.setitem(_extension.build_info, "cuda", True)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 0))
    cuda._why_not_card.cache_clear()
    yield
    cuda._why_not_card.cache_clear()


def toolkit() -> int:
    _, runtime = torch.ops.peft_kernels.cuda_versions()
    return runtime


@needs_emulator
def test_versions(emulated):
    assert torch.ops.peft_kernels.cuda_versions() == [toolkit(), toolkit()]
    assert toolkit() >= 12000
    with ptx_emulator.driver(0):
        assert torch.ops.peft_kernels.cuda_versions() == [0, toolkit()]


@needs_emulator
def test_old_driver(card):
    major, minor = divmod(toolkit(), 1000)
    with ptx_emulator.driver(1000 * (major - 1) + 40):
        reason = cuda.why_not(DEVICE)
    built = f"CUDA {major}.{minor // 10}"
    assert reason.startswith(f"the NVIDIA driver is for CUDA {major - 1}.4, peft_kernels was built with {built}: ")
    assert f"install a driver for CUDA {major}" in reason


@needs_emulator
@pytest.mark.parametrize("behind", [0, -10, -1000], ids=["same", "newer-minor", "newer-major"])
def test_driver_that_is_new_enough(card, behind):
    with ptx_emulator.driver(toolkit() - behind):
        assert cuda.why_not(DEVICE) is None


@needs_emulator
def test_driver_of_an_older_minor_version(card):
    with ptx_emulator.driver(toolkit() // 1000 * 1000):
        assert cuda.why_not(DEVICE) is None


def test_what_is_told_of_a_driver(monkeypatch):
    def reason(driver, runtime):
        monkeypatch.setattr(torch.ops.peft_kernels, "cuda_versions", lambda: [driver, runtime])
        return cuda._why_not_driver()

    assert reason(12040, 13000) == (
        "the NVIDIA driver is for CUDA 12.4, peft_kernels was built with CUDA 13.0: install a driver for CUDA 13 (580 "
        "or newer), or build with CUDA 12 (CUDA_HOME=/usr/local/cuda-12 pip install .)"
    )
    assert reason(11080, 12090).endswith("install a driver for CUDA 12 (525 or newer)")
    assert reason(13000, 14010).endswith("(CUDA_HOME=/usr/local/cuda-13 pip install .)")
    assert reason(12000, 12090) is reason(13000, 12090) is None


def test_compile():
    """The driver is asked when a graph is made; the question is no part of it."""

    def step(x):
        return x + 1 if cuda._why_not_driver() is None else x - 1

    x = torch.zeros(2)
    assert torch.equal(torch.compile(step, backend="eager", fullgraph=True)(x), step(x))


@needs_emulator
@pytest.mark.parametrize("function", ["cudaFuncSetAttribute", "cudaMemsetAsync", "cudaGetDevice"])
def test_a_failure_is_not_the_next_launch_s(emulated, function):
    case = make_case(40, 64, 4096, (8,), torch.bfloat16, bias=False)  # the product is split: its counters are cleared
    wanted = run(case)
    with ptx_emulator.failing(function), pytest.raises(RuntimeError, match=f"{function} was told to fail"):
        run(case)
    for name, value in run(case).items():
        assert torch.equal(value, wanted[name]), name


@needs_emulator
def test_an_op_on_an_old_driver(emulated):
    case = make_case(3, 64, 64, (), torch.bfloat16, bias=False)
    with ptx_emulator.driver(1000), pytest.raises(RuntimeError, match=r"cudaErrorInsufficientDriver.*wants a newer"):
        lora_linear(case.x, case.weight)
    lora_linear(case.x, case.weight)


# As much of libcuda.so.1 as CUDA's own runtime asks of an old driver.
OLD_DRIVER = """
#include <string.h>
int cuDriverGetVersion(int *version) { *version = 11080; return 0; }
static int unknown(void) { return 500; }
int cuGetProcAddress(const char *name, void **address, int version, unsigned long long flags, int *status) {
    *address = !strcmp(name, "cuDriverGetVersion") ? (void *)cuDriverGetVersion
             : !strcmp(name, "cuGetProcAddress") ? (void *)cuGetProcAddress : (void *)unknown;
    if (version >= 12000 && status) *status = 0;  // older ones have no fifth argument
    return 0;
}
"""
ASK = """
#include <cstdio>
#include "common/cuda/device.h"
int main() {
    peft_kernels::cuda::CudaVersions versions;
    peft_kernels::DeviceProperties properties;
    const int error = peft_kernels::cuda::query_versions(versions);
    std::printf("%d %d, %d", error, versions.driver, peft_kernels::cuda::query_device(properties));
}
"""


@pytest.mark.slow
@pytest.mark.skipif(not find_nvcc(), reason="needs nvcc")
def test_versions_of_the_real_runtime(tmp_path):
    """CUDA's own runtime, statically linked, on an old driver: the emulator plays what is found here."""
    (tmp_path / "ask.cu").write_text(ASK)
    (tmp_path / "driver.c").write_text(OLD_DRIVER)
    csrc = ROOT / "csrc"
    command = [find_nvcc(), "-std=c++20", "--cudart=static", f"-I{csrc}", "ask.cu", str(csrc / "common/cuda/device.cu")]
    subprocess.run([*command, "-o", "ask"], cwd=tmp_path, check=True)
    library = ["-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", "libcuda.so.1"]
    subprocess.run([os.environ.get("CC", "cc"), "driver.c", *library], cwd=tmp_path, check=True)
    environment = os.environ | {"LD_LIBRARY_PATH": str(tmp_path)}
    result = subprocess.run(["./ask"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert result.stdout == "0 11080, 35"  # cudaErrorInsufficientDriver


COLUMNS = 2048 + 64

# Calls on a matrix whose rows have nothing to do with each other.
OF_ROWS = {
    "rms_norm": lambda x, a, b: rms_norm(x, b[0]),
    "glu": lambda x, a, b: glu(x, x, "silu"),
    "adapter": lambda x, a, b: adapter(x, a, None, b[:16].T.contiguous(), None, activation="relu"),
    "lora_linear": lambda x, a, b: lora_linear(x, quantize_4bit(b), None, [a], [b[:, :16]], [0.5]),
    "quantize_4bit": lambda x, a, b: quantize_4bit(x, double_quant=False).dequantize(),
}


@pytest.mark.kernels
@pytest.mark.parametrize("name", list(OF_ROWS))
def test_more_elements_than_32_bits_count(processor, name):
    """The last rows are as without the others; on a CPU with few, which shows that the test is right."""
    if processor == "cuda" and torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of the card's memory")
    rows = 2**31 // COLUMNS + 100 if processor == "cuda" else 200
    a, b = torch.randn(16, COLUMNS) / 50, torch.randn(64, COLUMNS) / 50
    x = torch.randn(rows, COLUMNS, dtype=torch.bfloat16)
    with torch.no_grad():
        y, last = (OF_ROWS[name](rows_of_x, a, b) for rows_of_x in (x, x[-40:].clone()))
    assert_close(y[-40:], last, 2 * tolerances.ROUNDING[torch.bfloat16], name)
