"""The experts of a mixture on the emulated GPU: which kernels they launch, for any number of them."""

from collections import Counter

import pytest
import torch

import ptx_emulator
from peft_kernels.ops import ExpertStack, experts, grouped_linear, quantize_4bit
from ptx_emulator import report

pytestmark = pytest.mark.skipif(bool(ptx_emulator.missing()), reason=str(ptx_emulator.missing()))

FORWARD = ["lora_experts_shrink", "matmul_experts"]
FORWARD_OF_DENSE = ["lora_experts_shrink", "matmul_experts_expand"]  # the product is torch's
BACKWARD = ["matmul_experts", "lora_grouped_shrink", "lora_grouped_x_pass", "lora_grouped_sum"]
MOST_OF_A_BLOCK = 4  # launches of its forward, whatever the numbers of experts and adapters are


@pytest.fixture
def names(emulated):
    return lambda: [report.plain_name(record["kernel"]).removesuffix("_kernel") for record in emulated()]


def stack(num_experts, n, k, adapters=1, quantized=True):
    weight = torch.randn(num_experts, n, k).bfloat16()
    A = [torch.randn(num_experts * 8, k).bfloat16().requires_grad_() for _ in range(adapters)]
    B = [torch.randn(n, 8 * num_experts).bfloat16().requires_grad_() for _ in range(adapters)]
    return ExpertStack(quantize_4bit(weight) if quantized else weight, None, A, B, [1.0] * adapters)


@pytest.mark.parametrize("num_experts", [2, 8, 64, 70])
def test_launches_of_a_layer(names, num_experts):
    """In the backward, the branches of each further 64 experts are launches of their own."""
    of, x = stack(num_experts, 64, 64), torch.randn(50, 64).bfloat16().requires_grad_()
    offsets = torch.linspace(0, 50, num_experts).long()
    arguments = x, of.weight, of.bias, of.lora_A, of.lora_B, of.scaling, offsets
    turns = 1 + (num_experts > 64)
    names()
    with torch.no_grad():
        grouped_linear(*arguments)
    assert names() == FORWARD
    y = grouped_linear(*arguments)
    assert names() == FORWARD
    y.sum().backward()
    assert Counter(names()) == Counter(BACKWARD[:1] + turns * BACKWARD[1:])


@pytest.mark.parametrize(("num_experts", "adapters"), [(2, 1), (8, 1), (70, 1), (3, 4)])
def test_launches_of_a_block(names, num_experts, adapters):
    """Two for either product: the gate is part of the second shrink. In the backward there are four, and three of the
    activation."""
    gate_up, down = stack(num_experts, 128, 64, adapters), stack(num_experts, 64, 64, adapters)
    x = torch.randn(9, 64).bfloat16().requires_grad_()
    index, routing_weights = torch.randint(num_experts, (9, 2)), torch.rand(9, 2).bfloat16()
    names()
    y = experts(x, index, routing_weights, gate_up, down)
    launched = names()
    assert launched == 2 * FORWARD and len(launched) <= MOST_OF_A_BLOCK
    if (num_experts, adapters) == (8, 1):
        y.sum().backward()
        launched = names()
        assert launched[1:5] == launched[-4:] == BACKWARD and len(launched) == 11


def test_launches_of_a_dense_block(names):
    gate_up, down = stack(5, 128, 64, 2, quantized=False), stack(5, 64, 64, 2, quantized=False)
    x, index, routing_weights = torch.randn(9, 64).bfloat16(), torch.randint(5, (9, 2)), torch.rand(9, 2).bfloat16()
    names()
    with torch.no_grad():
        experts(x, index, routing_weights, gate_up, down)
    launched = names()
    assert launched == 2 * FORWARD_OF_DENSE and len(launched) <= MOST_OF_A_BLOCK
