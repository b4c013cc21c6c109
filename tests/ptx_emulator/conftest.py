"""With --hardware a real card runs the kernels as well, and the tests judge what it leaves in memory."""

import ctypes

import pytest

from ptx_emulator.device import Module
from ptx_emulator.hardware import architecture_of, find_driver

ON_HARDWARE = ("test_floats", "test_integers", "test_kernels", "test_math", "test_warps", "test_gemm", "test_toolkit")


@pytest.fixture(autouse=True)
def hardware(request, monkeypatch):
    """The emulator goes first: a kernel that it objects to never runs on the card."""
    if not request.config.getoption("hardware") or request.path.stem not in ON_HARDWARE:
        return
    driver, emulate = find_driver(), Module.run
    if driver is None:
        pytest.skip("no CUDA device")

    def run(module, kernel, grid, block, shared, packed, ranges):
        before = {low: ctypes.string_at(low, high - low) for low, high in ranges if high > low}
        record = emulate(module, kernel, grid, block, shared, packed, ranges)
        if architecture_of(module.ptx) > driver.architecture:
            pytest.skip(f"the CUDA device is older than {architecture_of(module.ptx)}")
        for low, data in driver.launch(module.ptx, kernel, grid, block, shared, packed, before).items():
            ctypes.memmove(low, data, len(data))
        return record

    monkeypatch.setattr(Module, "run", run)


@pytest.fixture
def emulated():
    """The library's ops run the CUDA kernels in the emulator; it is a function that returns the launches so far."""
    from ptx_emulator.ops import emulated

    with emulated() as launches:
        yield launches
