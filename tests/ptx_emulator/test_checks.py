"""For every mistake that the emulator promises to catch there is a kernel that makes it."""

from pathlib import Path

import numpy as np
import pytest

import ptx_emulator
from ptx_emulator import EmulatorError
from ptx_emulator.device import Fresh

KERNELS = Path(__file__).parent / "kernels"

pytestmark = pytest.mark.skipif(bool(ptx_emulator.missing()), reason=str(ptx_emulator.missing()))


@pytest.fixture(scope="module")
def broken():
    return ptx_emulator.compile_cuda(KERNELS / "broken.cu")


def floats(count):
    return np.zeros(count, np.float32)


def ints(count):
    return np.zeros(count, np.int32)


MISTAKES = [  # kernel, threads, arguments, bytes of dynamic shared memory, message
    ("read_past_end", 32, lambda: (floats(32), floats(32)), 0, "thread 31: out of bounds in global memory"),
    ("write_past_end", 32, lambda: (floats(32),), 0, r"byte 128 of 'argument 0', which has 128 bytes"),
    ("shared_past_end", 32, lambda: (floats(32), np.int32(1)), 128, "out of bounds in shared memory"),
    ("local_past_end", 1, lambda: (floats(1), np.int32(3)), 0, "out of bounds in local memory"),
    ("misaligned_global", 4, lambda: (np.zeros(64, np.int8), ints(4)), 0, "misaligned access: 4 bytes"),
    ("misaligned_shared", 4, lambda: (ints(4), np.int32(4)), 128, "misaligned access: 8 bytes at 0x4"),
    ("shared_nobody_wrote", 32, lambda: (floats(32),), 128, "uninitialised read of shared memory at 0x7c"),
    ("local_nobody_wrote", 1, lambda: (floats(1), np.int32(5)), 0, "uninitialised read: nobody wrote local memory"),
    ("global_nobody_wrote", 32, lambda: (Fresh(floats(32)),), 0, "uninitialised read: nobody wrote global memory"),
    ("read_without_barrier", 64, lambda: (floats(64),), 0, "(race in|uninitialised read of) shared memory"),
    ("overwrite_without_barrier", 64, lambda: (floats(64),), 0, "race in shared memory"),
    ("read_without_syncwarp", 32, lambda: (floats(32),), 0, "which another lane wrote with no __syncwarp between"),
    ("produced_late", 64, lambda: (floats(32),), 0, "(race in|uninitialised read of) shared memory"),
    ("lanes_disagree", 32, lambda: (floats(16),), 0, "lanes write different values to one address"),
    ("half_a_warp_at_the_barrier", 32, lambda: (floats(32),), 0, "deadlock: a barrier is divergent or missing"),
    ("one_warp_misses_the_barrier", 64, lambda: (floats(64),), 0, "deadlock.* Barrier 1 has 32 threads"),
    ("shuffle_without_a_lane", 32, lambda: (ints(32),), 0, "shfl reads lane 7, which does not take part"),
    ("lane_never_comes", 32, lambda: (ints(32),), 0, "deadlock"),
    ("asserts", 1, lambda: (np.int32(4),), 0, "assertion failed: n == 3"),
]


@pytest.mark.parametrize(
    ("kernel", "block", "arguments", "shared", "message"), MISTAKES, ids=[mistake[0] for mistake in MISTAKES]
)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_is_caught(broken, kernel, block, arguments, shared, message, seed):
    with ptx_emulator.set_checks(seed=seed), pytest.raises(EmulatorError, match=message) as caught:
        broken.launch(kernel, 1, block, *arguments(), shared=shared)
    assert kernel in str(caught.value)


def test_message_says_where(broken):
    with pytest.raises(EmulatorError, match=r"PTX line \d+ 'st.global.u32 \[.*\], .*', block \(0, 0, 0\), thread 31"):
        broken.write_past_end(1, 32, floats(32))


def test_right_twins_pass(broken):
    out = floats(64)
    broken.read_with_barrier(1, 64, out)
    np.testing.assert_array_equal(out, (np.arange(64) + 32) % 64)
    broken.read_with_syncwarp(1, 32, out)
    np.testing.assert_array_equal(out[:32], 31 - np.arange(32))
    broken.produced_in_time(1, 64, out)
    np.testing.assert_array_equal(out[:32], 31 - np.arange(32))
    broken.overwrite_with_barrier(1, 64, out)
    np.testing.assert_array_equal(out, 3 * (63 - np.arange(64)) + 3)


@pytest.mark.parametrize("seed", range(3))
def test_cp_async_pipeline(broken, seed):
    data = np.random.default_rng(0).standard_normal((5, 64, 4), dtype=np.float32)
    out = np.empty_like(data)
    with ptx_emulator.set_checks(seed=seed):
        broken.pipeline_right(1, 64, data, Fresh(out), np.int32(5))
        np.testing.assert_array_equal(out, data[:, ::-1])
        with pytest.raises(EmulatorError, match=r"into which a cp\.async is under way that no wait has covered"):
            broken.pipeline_lax_wait(1, 64, data, out, np.int32(5))
        with pytest.raises(EmulatorError, match=r"race in shared|uninitialised read of shared|cp\.async is under way"):
            broken.pipeline_no_barrier(1, 64, data, out, np.int32(5))


@pytest.mark.parametrize("kernel", ["blocks_write_one_place", "blocks_read_what_others_write"])
def test_races_between_blocks(broken, kernel):
    with pytest.raises(EmulatorError, match=r"race between blocks: .* touched by (block|other)"):
        broken.launch(kernel, 3, 1, floats(4))
    broken.launch(kernel, 1, 1, floats(4))
    with ptx_emulator.set_checks(races=False):
        broken.launch(kernel, 3, 1, floats(4))


def test_endless_loop(broken):
    with (
        ptx_emulator.set_checks(max_instructions=5_000_000),
        pytest.raises(EmulatorError, match="never_ends: no end after"),
    ):
        broken.never_ends(1, 32, ints(1))


def test_nothing_runs(broken):
    """Only what a launch is asked for is recorded, and refused if it cannot be."""
    with ptx_emulator.set_checks(max_instructions=0):
        record = broken.never_ends(3, 32, ints(1))
        with pytest.raises(EmulatorError, match="an empty grid or block"):
            broken.never_ends(0, 32, ints(1))
    assert record["grid"] == (3, 1, 1) and record["warp_instructions"] == 0


def test_float_atomics_are_reported(broken):
    out = floats(1)
    assert broken.float_atomics(1, 32, out)["order_dependent_atomics"] == 0  # one warp
    assert broken.float_atomics(2, 64, out)["order_dependent_atomics"] == 96


def test_seeds_change_the_order(broken):
    orders = set()
    for seed in range(4):
        out = ints(256)
        with ptx_emulator.set_checks(seed=seed):
            broken.tickets(2, 128, ints(1), out)
        assert sorted(out) == list(range(256))
        orders.add(tuple(out))
        again = ints(256)
        with ptx_emulator.set_checks(seed=seed):
            broken.tickets(2, 128, ints(1), again)
        np.testing.assert_array_equal(out, again)
    assert len(orders) == 4


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("reads_at_once", "race between launches: read of global memory .* with no griddepcontrol.wait before"),
        ("writes_at_once", "race between launches: write of global memory .* with no griddepcontrol.wait before"),
        ("never_waits", "it may overlap the launch before, for whose end nobody waited"),
    ],
)
def test_launches_that_overlap(kernel, message):
    newer = ptx_emulator.compile_cuda(KERNELS / "broken.cu", "sm_90")
    out = floats(128)
    with ptx_emulator.profile("sm_90"):
        newer.run_one_on_another("first_launch", "waits_for_it", out)
        np.testing.assert_array_equal(out, np.repeat([1, 1, 0, 0], 32))
        with pytest.raises(EmulatorError, match=message):
            newer.run_one_on_another("first_launch", kernel, out)


# ---- programs and launches that cannot be ------------------------------------------------------------------------


HEAD = ".version 8.0\n.target sm_80\n.address_size 64\n"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("frobnicate.b32 %r1, %r2;", "PTX line 7 'frobnicate.b32 %r1, %r2': the instruction 'frobnicate' is not known"),
        ("add.s32.wild %r1, %r1, %r1;", "PTX line 7 .*the modifier .wild is not supported here"),
        ("add.s32 %r1, %r1, %r9;", "'%r9' is not declared|special register %r9"),
        ("add.s64 %r1, %r1, %r1;", "'%r1' has .*bytes"),
        ("bra nowhere;", "PTX line 7: no label 'nowhere'"),
        ("add.s32 %r1 %r1;", "PTX line 7: wanted"),
        ("ld.global.u32 %r1, [%x];", "'%x' is not declared"),
    ],
    ids=["opcode", "modifier", "register", "size", "label", "syntax", "address"],
)
def test_bad_ptx(body, message):
    with pytest.raises(EmulatorError, match=message):
        ptx_emulator.load_ptx(f"{HEAD}.visible .entry k()\n{{\n.reg .b32 %r<4>;\n{body}\nret;\n}}\n").k(1, 1)


def test_bad_launches(broken):
    out = floats(2048)
    for arguments, shared, block, grid, message in [
        ((out, np.int32(1)), 0, 2048, 1, "threads in a block: got 2048, wanted at most 1024"),
        ((out, np.int32(1)), 200_000, 32, 1, "bytes of shared memory in a block: got 200000, wanted at most 166912"),
        ((out, np.int64(1)), 128, 32, 1, "argument 1: got 8 bytes, wanted 4"),
        ((out,), 128, 32, 1, "got 1 arguments, wanted 2"),
        ((out, np.int32(1)), 128, 32, 0, "an empty grid or block"),
    ]:
        with pytest.raises(EmulatorError, match=message):
            broken.shared_past_end(grid, block, *arguments, shared=shared)
    with pytest.raises(EmulatorError, match="no kernel 'nothing' in the module"):
        broken.nothing(1, 1)
    with ptx_emulator.profile("sm_86"), pytest.raises(EmulatorError, match="got 102400, wanted at most 101376"):
        broken.shared_past_end(1, 32, out, np.int32(1), shared=102_400)
    with pytest.raises(EmulatorError, match="device profile: got 'sm_70'"), ptx_emulator.profile("sm_70"):
        pass
    newer = ptx_emulator.compile_cuda(KERNELS / "broken.cu", "sm_90")
    with pytest.raises(EmulatorError, match="the PTX is for sm_90, the device is sm_80"):
        newer.float_atomics(1, 32, out)
