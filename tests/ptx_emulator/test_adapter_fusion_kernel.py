"""The kernels of fusion: what a launch fetches, sectors, banks, registers, order of blocks, plans."""

from pathlib import Path

import pytest
import tolerances
import torch
from comparison import DTYPES, assert_close, short

import ptx_emulator
from ptx_emulator import cards, report

ops = torch.ops.peft_kernels
SOURCE = Path(__file__).parent.parent.parent / "csrc/adapter_fusion/cuda/launch.cu"

pytestmark = pytest.mark.skipif(bool(ptx_emulator.missing()), reason=str(ptx_emulator.missing()))


def make_case(m, widths, dtype=torch.bfloat16, shared=True, offset=0):
    """t, dpooled and the adapters; scores of about one. Rows begin at an `offset` of elements."""
    columns = widths[0] if shared else sum(widths)
    t, grad = torch.randn(m, columns) / max(widths) ** 0.5, torch.randn(m, columns)
    tensors = [t, grad, *(torch.randn(m, width) for width in widths)]
    padded = [torch.nn.functional.pad(tensor, (offset, -tensor.shape[1] % 8)).to(dtype) for tensor in tensors]
    return [matrix[:, offset : offset + tensor.shape[1]] for matrix, tensor in zip(padded, tensors, strict=True)]


def run(case, shared=True, dropout=0.0, wanted=True):
    """What forward and backward return, by name."""
    t, grad, *adapters = case
    options = shared, None, 2.0, dropout, torch.tensor([7])
    pooled, probabilities = ops.adapter_fusion_forward(t, adapters, *options)
    gradients = ops.adapter_fusion_backward(
        grad, None, t, adapters, probabilities, shared, *options[1:], [wanted] * len(adapters)
    )
    names = ("pooled", "probabilities", "grad_t", "grad_offsets", "grads")
    return dict(zip(names, (pooled, probabilities, *gradients), strict=True))


def on_cpu(case, *arguments):
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes():
        return run(case, *arguments)


def check(case, *arguments):
    wanted = on_cpu(case, *arguments)
    for name, value in run(case, *arguments).items():
        assert_close(value, wanted[name], 2 * tolerances.product(value.dtype, value.dtype), name)


def launches_of(emulated, case, *arguments):
    """The records of the forward and of the backward."""
    emulated()
    run(case, *arguments)
    return emulated()


KEPT = {
    "one-warp": (10, [768] * 8, True),
    "four-warps": (3, [4096] * 3, True),
    "bottlenecks": (10, [64, 32, 16], False),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("shape", KEPT.values(), ids=KEPT)
def test_moves_every_byte_once(emulated, shape, dtype):
    m, widths, shared = shape
    for record in launches_of(emulated, make_case(m, widths, dtype, shared), shared, 0.1):
        # A row's numbers for each adapter lie in two sectors at most: scores, probabilities, their gradients.
        numbers = 2 * 3 * m
        assert report.moved_bytes(record) <= 1.05 * report.compulsory_bytes(record) + 32 * numbers, record["kernel"]
        for direction in ("global_load", "global_store"):
            traffic = record[direction]
            assert traffic["sectors"] <= traffic["ideal_sectors"] + numbers, (record["kernel"], direction)
        wavefronts, ideal_wavefronts = report.shared_wavefronts(record)
        assert wavefronts == ideal_wavefronts > 0
        assert record["order_dependent_atomics"] == 0


ODD = {
    "1": (3, [70], True),
    "48": (3, [33] * 48, True),
    "several-warps": (2, [1100] * 3, True),
    "eight-warps": (2, [5000] * 2, True),
    "bottlenecks": (9, [5, 1, 16, 300], False),
    "wide-bottlenecks": (2, [3, 2100], False),
}


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=short)
@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("shape", ODD.values(), ids=ODD)
def test_odd_shapes(emulated, shape, offset, dtype):
    m, widths, shared = shape
    check(make_case(m, widths, dtype, shared, offset), shared, 0.3)


@pytest.mark.parametrize("shared", [True, False], ids=["outputs", "bottlenecks"])
def test_rows_that_do_not_fit_are_read_twice(emulated, shared):
    case = make_case(2, [4100] * 7, torch.float32, shared)
    with ptx_emulator.profile("sm_86"):  # 99 KB of shared memory: the rows take 115
        check(case, shared)
        for record in emulated():
            assert record["shared_bytes"] < 1024
            assert record["sectors_read"]["adapters"] >= 2 * sum(a.nbytes for a in case[2:]) // 32


def test_unwanted_gradients_cost_nothing(emulated):
    case = make_case(5, [64] * 3)
    _, record = launches_of(emulated, case, True, 0.0, False)
    assert "t" not in record["sectors_read"] and record["unique_bytes_written"] == case[0].nbytes + 5 * 3 * 4
    assert run(case, True, 0.0, False)["grads"].numel() == 0


@pytest.mark.parametrize("shared", [True, False], ids=["outputs", "bottlenecks"])
def test_any_order_of_blocks_gives_the_same_bits(emulated, shared):
    case = make_case(20, [1100, 1100, 1100] if shared else [16, 5, 64], shared=shared)
    wanted = run(case, shared, 0.2)
    for seed in (1, 2, 3):
        with ptx_emulator.set_checks(seed=seed):
            actual = run(case, shared, 0.2)
        for name, value in wanted.items():
            assert torch.equal(actual[name], value), name


def test_too_many_adapters(emulated):
    with pytest.raises(ValueError, match="adapter_outputs: got 49 tensors, wanted at most 48 on a GPU"):
        run(make_case(2, [16] * 49))


@pytest.mark.parametrize("architecture", cards.ALL)
def test_registers(architecture):
    kernels = report.resources(SOURCE, architecture, includes=(SOURCE.parent.parent.parent,))
    assert len(kernels) == 2 * 3 * 3 * 2
    for kernel, used in kernels.items():
        assert used.spill_bytes == used.stack_bytes == 0, kernel
        # Shared memory, not registers, has to bound how many rows a multiprocessor works on.
        assert used.registers <= 64, kernel
