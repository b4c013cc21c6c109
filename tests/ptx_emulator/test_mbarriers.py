"""mbarriers of sm_90, and what kernels with warps of different roles need besides."""

from pathlib import Path

import numpy as np
import pytest

import ptx_emulator
from ptx_emulator import EmulatorError
from ptx_emulator.device import Fresh

KERNELS = Path(__file__).parent / "kernels"
HEAD = ".version 8.0\n.target sm_90a\n.address_size 64\n.visible .entry k()\n"

pytestmark = pytest.mark.skipif(bool(ptx_emulator.missing()), reason=str(ptx_emulator.missing()))


@pytest.fixture(scope="module")
def mbarriers():
    with ptx_emulator.profile("sm_90"):
        yield ptx_emulator.compile_cuda(KERNELS / "mbarriers.cu", "sm_90a", (KERNELS,))


@pytest.mark.parametrize("checks", [{"seed": 0}, {"seed": 1}, {"random_order": False}], ids=["0", "1", "in order"])
def test_ring_of_buffers(mbarriers, checks):
    numbers = np.arange(7 * 32, dtype=np.int32).reshape(7, 32)
    out = np.empty_like(numbers)
    with ptx_emulator.set_checks(**checks):
        mbarriers.right(1, 64, numbers, Fresh(out), np.int32(7))
    np.testing.assert_array_equal(out, numbers[:, ::-1])


MISTAKES = {
    "no_init": "no mbarrier was initialised there",
    "no_barrier_after_init": "no mbarrier was initialised there|initialised this mbarrier with no barrier between",
    "count_of_zero": "an mbarrier expects 1 to 1048575 arrivals, got 0",
    "init_twice": "an mbarrier is there already",
    "too_many_arrivals": "more arrivals at an mbarrier than it expects",
    "missing_arrival": r"deadlock: .*The mbarrier at 0x\w+ waits for 1 arrivals and 0 bytes.*polls an mbarrier",
    "too_few_bytes": r"deadlock: .*The mbarrier at 0x\w+ waits for 0 arrivals and 16 bytes.*polls an mbarrier",
    "too_many_bytes": "16 bytes came to an mbarrier that it was not told to expect",
    "overflow": "an mbarrier counts 1048575 bytes at most, it is to expect 1048576",
    "written_over": "write of shared memory at .*, where an mbarrier is",
    "use_after_inval": "no mbarrier was initialised there",
    "no_wait": "race in shared memory|deadlock",  # it gets two phases ahead, and parities repeat
    "wrong_parity": "deadlock",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_misuse(mbarriers, mistake):
    numbers = np.zeros((7, 32), np.int32)
    for seed in range(3):
        with ptx_emulator.set_checks(seed=seed), pytest.raises(EmulatorError, match=f"(?s){MISTAKES[mistake]}"):
            mbarriers.launch(mistake, 1, 64, numbers, numbers.copy(), np.int32(7))


def test_arrivals_that_drop_out(mbarriers):
    out = np.empty(32, np.int32)
    mbarriers.leave(1, 32, Fresh(out))
    np.testing.assert_array_equal(out, np.arange(32))


def test_setmaxnreg_has_limits():
    text = HEAD + "{\nsetmaxnreg.inc.sync.aligned.u32 20;\n}"
    with ptx_emulator.profile("sm_90"), pytest.raises(EmulatorError, match="got 20, wanted a multiple of 8 from 24"):
        ptx_emulator.load_ptx(text).k(1, 128)


def test_sm_90a_is_one_card(mbarriers):
    numbers = np.zeros((1, 32), np.int32)
    for card in ("sm_89", "sm_100"):
        with (
            ptx_emulator.profile(card),
            pytest.raises(EmulatorError, match=f"the PTX is for sm_90a, the device is {card}"),
        ):
            mbarriers.right(1, 64, numbers, numbers.copy(), np.int32(1))


def test_clusters_have_one_block():
    text = HEAD + ".explicitcluster\n.reqnctapercluster {}\n{{\nret;\n}}"
    with ptx_emulator.profile("sm_90"):
        ptx_emulator.load_ptx(text.format("1, 1, 1")).k(1, 128)
        with pytest.raises(EmulatorError, match="clusters of more than one block are not supported"):
            ptx_emulator.load_ptx(text.format("2, 1, 1"))
