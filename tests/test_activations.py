"""transformers' activations that are chains of operations, as one of torch's: exactness, memory, and the ways back."""

import copy
import math
import pickle

import pytest
import tolerances
import torch
from comparison import DTYPES, error, short
from torch import nn
from transformers import activations as stock
from transformers.activations import ACT2FN

import peft_kernels

NAMES = ["gelu_new", "gelu_fast", "gelu_accurate", "gelu_python", "gelu_python_tanh"]


def fused(name):
    model = nn.Sequential(ACT2FN[name])
    (row,) = peft_kernels.optimize(model)
    assert row.fused and row.kind == f"transformers.{type(ACT2FN[name]).__name__}"
    return model


def step(activation, x, grad):
    """y and the gradient of x."""
    x = x.clone().requires_grad_()
    y = activation(x)
    return {"y": y, "x": torch.autograd.grad(y, x, grad.to(y.dtype))[0]}


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("name", NAMES)
def test_as_near_to_fp64_as_stock(name, dtype):
    x, grad = (3 * torch.randn(4096)).to(dtype), torch.randn(4096).to(dtype)
    wanted = step(ACT2FN[name], x.double(), grad)
    theirs, ours = step(ACT2FN[name], x, grad), step(fused(name), x, grad)
    for key, want in wanted.items():
        assert ours[key].dtype is theirs[key].dtype
        noise = 8 * tolerances.ROUNDING[torch.float32]  # of erf, tanh and what is made of them
        assert error(ours[key], want) <= max(tolerances.VERSUS_STOCK * error(theirs[key], want), noise)


def test_constant_is_the_same_in_fp32():
    assert torch.tensor(0.7978845608) == torch.tensor(math.sqrt(2 / math.pi))


@pytest.mark.parametrize("name", NAMES)
def test_input_alone_is_kept(name):
    x, saved = torch.randn(5, 7, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fused(name)(x)
    assert [t.data_ptr() for t in saved] == [x.data_ptr()]


@pytest.mark.parametrize("name", NAMES)
def test_what_stock_does(name):
    model, x = fused(name), torch.randn(5, 7, dtype=torch.float64)
    assert torch.equal(model(x), ACT2FN[name](x))
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x.float()).dtype is ACT2FN[name](x.float()).dtype
        assert model(x.bfloat16()).dtype is ACT2FN[name](x.bfloat16()).dtype


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("name", NAMES)
def test_autocast_on_a_gpu(name):
    """It computes powers in fp32, which stock then returns."""
    x = torch.randn(5, 7, dtype=torch.bfloat16, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        assert torch.equal(fused(name)(x), ACT2FN[name](x))


@pytest.mark.parametrize("name", NAMES)
def test_restore_copy_and_pickle(name):
    model, x = fused(name), torch.randn(5, 7)
    wanted = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other[0]) is type(model[0]) and torch.equal(other(x), wanted)
        assert [row.fused for row in peft_kernels.optimize(other)] == [True]
    peft_kernels.restore(model)
    assert type(model[0]) is type(ACT2FN[name]) and torch.equal(model(x), ACT2FN[name](x))


@pytest.mark.parametrize("name", ["gelu", "gelu_pytorch_tanh", "quick_gelu", "relu2", "silu", "mish"])
def test_others_are_passed_over(name):
    assert not list(peft_kernels.optimize(nn.Sequential(ACT2FN[name])))


def test_other_constant_is_passed_over():
    activation = stock.AccurateGELUActivation()
    activation.precomputed_constant = 0.8
    assert not list(peft_kernels.optimize(nn.Sequential(activation)))


def test_replaced_forward_is_left_alone():
    model = nn.Sequential(ACT2FN["gelu_new"])
    model[0].forward = lambda x: x
    (row,) = peft_kernels.optimize(model)
    assert (row.fused, row.reason) == (False, "its forward was replaced on the instance")
