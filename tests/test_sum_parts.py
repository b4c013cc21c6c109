"""The order in which fp32 products are summed: against fp64 they err no more than torch's, however long the sums."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from comparison import error
from tolerances import ROUNDING, VERSUS_STOCK

from peft_kernels.ops import lora_linear, quantize_4bit

pytestmark = pytest.mark.kernels

ROWS, DEPTHS, OUTPUTS = (1, 4, 8, 9, 32, 64, 128), (64, 96, 128, 192, 256, 512, 1024), 256
# Of 64 x 256 sums in the same order as torch's, the ratio of the errors has a standard deviation of 0.01.
LEAST_ROWS = 64


def product(function, given, weight, direction):
    """y of x, or dx of dy."""
    if direction == "y":
        with torch.no_grad():
            return function(given, weight)
    x = given.new_zeros(given.shape[0], OUTPUTS).requires_grad_()
    function(x, weight).backward(given)
    return x.grad


@pytest.mark.parametrize("direction", ["y", "dx"])
@pytest.mark.parametrize("base", ["nf4", "dense"])
def test_errs_no_more_than_torchs(cpu_isa, monkeypatch, base, direction):
    monkeypatch.setattr("peft_kernels.cpu.outruns_torch", lambda: True)
    # Without fused additions each product is rounded before it is added.
    products = ROUNDING[torch.float32] if cpu_isa == "portable" else 0
    worse = []
    for depth, rows in itertools.product(DEPTHS, ROWS):
        dense = weight = torch.randn((OUTPUTS, depth) if direction == "y" else (depth, OUTPUTS))
        if base == "nf4":
            weight = quantize_4bit(dense)
            dense = weight.dequantize()
        errors = []
        for _ in range(max(1, LEAST_ROWS // rows)):
            given = torch.randn(rows, depth)
            wanted = product(F.linear, given.double(), dense.double(), direction)
            results = [product(lora_linear, given, weight, direction), product(F.linear, given, dense, direction)]
            errors.append([error(result, wanted) for result in results])
        ours, theirs = torch.tensor(errors).square().mean(0).sqrt().tolist()
        if ours > VERSUS_STOCK * (theirs**2 + products**2) ** 0.5:
            worse.append(f"{rows} rows, {depth} products a sum: {ours:.3g}, torch's {theirs:.3g}")
    assert not worse, "\n".join(worse)
