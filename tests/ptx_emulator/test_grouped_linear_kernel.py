"""The experts of a mixture on the emulated GPU: which kernels they launch, for any number of them."""

from collections import Counter

import pytest
import torch

import ptx_emulator
from peft_kernels.ops import ExpertStack, experts, grouped_linear, quantize_4bit
from ptx_emulator import report

pytestmark = pytest.mark.skipif(bool(ptx_emulator.missing()), reason=str(ptx_emulator.missing()))

PRODUCT = ["matmul_experts"]
FORWARD = [*PRODUCT, "lora_grouped_shrink", "lora_grouped_expand"]
BACKWARD = [*PRODUCT, "lora_grouped_shrink", "lora_grouped_x_pass", "lora_grouped_sum"]


@pytest.fixture
def emulated():
    from ptx_emulator.ops import emulated

    with emulated() as launches:
        yield lambda: [report.plain_name(record["kernel"]).removesuffix("_kernel") for record in launches()]


def stack(num_experts, n, k):
    weight = quantize_4bit(torch.randn(num_experts, n, k).bfloat16())
    A, B = torch.randn(num_experts * 8, k).bfloat16(), torch.randn(n, 8 * num_experts).bfloat16()
    return ExpertStack(weight, None, [A.requires_grad_()], [B.requires_grad_()], [1.0])


@pytest.mark.parametrize("num_experts", [2, 8, 64, 70])
def test_launches_of_a_layer(emulated, num_experts):
    """The branches of each further 64 experts are launches of their own."""
    of, x = stack(num_experts, 64, 64), torch.randn(50, 64).bfloat16().requires_grad_()
    offsets = torch.linspace(0, 50, num_experts).long()
    arguments = x, of.weight, of.bias, of.lora_A, of.lora_B, of.scaling, offsets
    turns = 1 + (num_experts > 64)
    emulated()
    with torch.no_grad():
        grouped_linear(*arguments)
    assert Counter(emulated()) == Counter(PRODUCT + turns * FORWARD[1:])
    y = grouped_linear(*arguments)
    assert Counter(emulated()) == Counter(PRODUCT + turns * FORWARD[1:])
    y.sum().backward()
    assert Counter(emulated()) == Counter(PRODUCT + turns * BACKWARD[1:])


@pytest.mark.parametrize("num_experts", [2, 8])
def test_launches_of_a_block(emulated, num_experts):
    """Of three kernels for either product, and the activation; and of four, and the activation's twice."""
    gate_up, down = stack(num_experts, 128, 64), stack(num_experts, 64, 64)
    x = torch.randn(9, 64).bfloat16().requires_grad_()
    index, routing_weights = torch.randint(num_experts, (9, 2)), torch.rand(9, 2).bfloat16()
    emulated()
    y = experts(x, index, routing_weights, gate_up, down)
    names = emulated()
    assert names[:3] == names[-3:] == FORWARD and len(names) == 7
    y.sum().backward()
    names = emulated()
    assert names[1:5] == names[-4:] == BACKWARD and len(names) == 11
