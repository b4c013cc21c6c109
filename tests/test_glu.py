"""The glu family against the fp64 oracle, and against torch's two operations."""

import pytest
import tolerances
import torch
import torch.nn.functional as F
from comparison import DTYPES, assert_close, error, short

from peft_kernels.ops import ACTIVATIONS, glu
from peft_kernels.testing.reference.adapter import ACTIVATIONS as ACTIVATE
from peft_kernels.testing.reference.glu import glu as oracle

pytestmark = pytest.mark.kernels

ops = torch.ops.peft_kernels


def make_case(m, n, dtype=torch.float32):
    return 3 * torch.randn(m, n).to(dtype), torch.randn(m, n).to(dtype)


def run(function, gate, up, activation="silu", grad_dtype=None):
    """y and the gradients; dy are numbers of grad_dtype."""
    gate, up = gate.detach().clone().requires_grad_(), up.detach().clone().requires_grad_()
    y = function(gate, up, activation)
    torch.manual_seed(1)
    y.backward(torch.randn(y.shape).to(grad_dtype or y.dtype).to(y.dtype))
    return y.detach(), gate.grad, up.grad


def check(gate, up, activation="silu"):
    actual = run(glu, gate, up, activation)
    wanted = run(oracle, gate.double(), up.double(), activation, gate.dtype)
    for name, got, expected in zip(("y", "dgate", "dup"), actual, wanted, strict=True):
        assert got.dtype is gate.dtype
        assert_close(got, expected, tolerances.FP32_SUM + 2 * tolerances.ROUNDING[got.dtype], name)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("shape", [(1, 1), (5, 17), (40, 576), (3, 20000)], ids=str)
def test_shapes(backend, shape, dtype):
    check(*make_case(*shape, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(backend, activation, dtype):
    check(*make_case(9, 70, dtype), activation)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_error_against_torch(platform, dtype, activation):
    case = make_case(100, 300, dtype)
    ours = run(glu, *case, activation)
    theirs = run(lambda gate, up, name: ACTIVATE[name](gate) * up, *case, activation)
    wanted = run(oracle, *(tensor.double() for tensor in case), activation, dtype)
    for name, got, stocks, expected in zip(("y", "dgate", "dup"), ours, theirs, wanted, strict=True):
        assert error(got, expected) <= tolerances.VERSUS_STOCK * error(stocks, expected) + 1e-7, name


def test_extremes(platform):
    gate = torch.tensor([[-1e30, -200.0, -88.0, 0.0, 88.0, 200.0, 1e30, float("nan")]])
    y, grad_gate, grad_up = run(glu, gate, torch.ones_like(gate))
    assert torch.allclose(y, F.silu(gate), atol=1e-30, equal_nan=True)
    assert grad_gate[0, :7].isfinite().all() and grad_up[0, :7].isfinite().all()


@pytest.mark.parametrize("count", [2, 5])
def test_thread_count_changes_no_bit(threads, count):
    case = make_case(300, 700, torch.bfloat16)
    wanted = run(glu, *case)
    threads(count)
    for got, expected in zip(run(glu, *case), wanted, strict=True):
        assert torch.equal(got, expected)


def test_strides(platform):
    gate, up = make_case(12, 18)
    wanted = glu(gate, up)
    both = torch.cat([gate, up], 1)
    assert torch.equal(glu(*both.chunk(2, 1)), wanted)  # the halves of one projection
    assert torch.equal(glu(gate.T.contiguous().T, up), wanted)
    assert torch.equal(glu(gate.view(3, 4, 18), up.view(3, 4, 18)).view(12, 18), wanted)
    assert torch.equal(glu(gate[0], up[0]), wanted[0])


@pytest.mark.parametrize("shape", [(0, 18), (18, 0)], ids=str)
def test_empty(shape):
    assert [tensor.shape for tensor in run(glu, *make_case(*shape))] == [shape] * 3


def test_keeps_nothing_but_its_arguments():
    gate, up = make_case(50, 64, torch.bfloat16)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        glu(gate.requires_grad_(), up)
    assert {t.data_ptr() for t in saved} == {gate.data_ptr(), up.data_ptr()}


def test_opcheck():
    gate, up = make_case(7, 24, torch.bfloat16)
    torch.library.opcheck(ops.glu_forward.default, (gate, up, "gelu"))
    torch.library.opcheck(ops.glu_backward.default, (gate, gate, up, "silu"))


def test_compile():
    case = make_case(20, 16)
    compiled = torch.compile(glu, backend="aot_eager", fullgraph=True)
    for got, expected in zip(run(compiled, *case), run(glu, *case), strict=True):
        assert_close(got, expected, tolerances.FP32_SUM)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate": torch.ones(3, 4).int()}, r"gate: got int32 \[3, 4\], wanted a float32, bfloat16 or float16 tensor"),
        ({"up": torch.ones(3, 5)}, r"up: got float32 \[3, 5\], wanted a tensor like gate, float32 \[3, 4\]"),
        ({"up": torch.ones(3, 4).half()}, r"up: got float16 \[3, 4\], wanted a tensor like gate, float32 \[3, 4\]"),
        ({"up": torch.ones(3, 4, device="meta")}, "up: got a tensor on meta, wanted one on cpu, where gate is"),
        ({"activation": "sin"}, "activation: got 'sin', wanted one of"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        glu(**{"gate": torch.ones(3, 4), "up": torch.ones(3, 4)} | change)
