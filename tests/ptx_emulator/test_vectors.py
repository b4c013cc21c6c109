"""Kernels that pass over matrices once: they read and write 16 bytes a thread where rows allow it."""

import pytest
import torch
from comparison import DTYPES, short

import ptx_emulator

pytestmark = pytest.mark.skipif(bool(ptx_emulator.missing()), reason=str(ptx_emulator.missing()))

ops = torch.ops.peft_kernels

ROWS, COLUMNS = 16, 2048

# What a kernel makes of a matrix, and how many matrices it reads. A weight, which every row reads, counts as one.
CALLS = {
    "rms_norm_forward": (lambda x: (ops.rms_norm_forward(x, x[0], 1e-6, 0.0, x.dtype)[0],), 2),
    "rms_norm_backward": (lambda x: (ops.rms_norm_backward(x, x, x[0], torch.ones(ROWS), 0.0, True, False)[0],), 3),
    "cross_entropy_backward": (
        lambda x: (ops.cross_entropy_backward(torch.ones(ROWS), x, torch.arange(ROWS), torch.ones(ROWS, 2), -100),),
        1,
    ),
    "glu_forward": (lambda x: (ops.glu_forward(x, x, "silu"),), 2),
    "glu_backward": (lambda x: ops.glu_backward(x, x, x, "silu"), 3),
    "dropout": (lambda x: (ops.dropout(x, torch.tensor([1]), 0.5),), 1),
}


@pytest.mark.parametrize("call", list(CALLS))
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_requests_have_512_bytes(emulated, dtype, call):
    """That is 16 sectors, all of them whole. Rows that begin anywhere give the same results, element by element."""
    memory = torch.randn(ROWS * COLUMNS + 1).to(dtype)
    shifted = memory[1:].view(ROWS, COLUMNS)
    x = shifted.clone()
    run, matrices = CALLS[call]
    emulated()
    results = run(x)
    (record,) = emulated()
    for direction, count in ("global_load", matrices), ("global_store", len(results)):
        traffic, wide = record[direction], count * x.nbytes // 512
        numbers = traffic["requests"] - wide  # a seed, a target, rstd
        assert traffic["sectors"] == 16 * wide + numbers, direction
    for first, second in zip(results, run(shifted), strict=True):
        assert torch.equal(first, second)
