"""The dropout family against the fp64 oracle and its mask: shapes, strides, what is kept, and what is saved."""

import math

import pytest
import tolerances
import torch
from comparison import DTYPES, assert_close, rms, short, views_of_x

from peft_kernels.ops import dropout
from peft_kernels.testing.reference.dropout import dropout as oracle
from peft_kernels.testing.reference.dropout import keep

pytestmark = pytest.mark.kernels

ops = torch.ops.peft_kernels

SEEDS = [0, -1, 2**32 + 7, -(2**63)]


def seed_of(number):
    return torch.tensor([number])


def run(function, x, p, seed, grad_dtype=None):
    """y and dx; dy are numbers of grad_dtype."""
    x = x.detach().clone().requires_grad_()
    y = function(x, p, seed)
    torch.manual_seed(1)
    y.backward(torch.randn(y.shape).to(grad_dtype or y.dtype).to(y.dtype))
    return y.detach(), x.grad


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("shape", [(), (1,), (5, 17), (3, 2, 64), (300, 127), (2, 16384)], ids=str)
def test_shapes(backend, shape, dtype):
    x = torch.randn(shape).to(dtype)
    actual = run(dropout, x, 0.3, seed_of(7))
    wanted = run(oracle, x.double(), 0.3, seed_of(7), dtype)
    for name, got, expected in zip(("y", "dx"), actual, wanted, strict=True):
        assert got.dtype is dtype and torch.equal(got == 0, expected == 0), name
        assert_close(got, expected, tolerances.FP32_SUM + 2 * tolerances.ROUNDING[dtype], name)


@pytest.mark.parametrize("count", [1, 63, 257, 3 * 2**14 + 5])
def test_mask(backend, count):
    for seed in map(seed_of, SEEDS):
        y = dropout(torch.ones(count), 0.3, seed)
        assert torch.equal(y != 0, keep(seed, count, 0.3).to(y.device))
        assert torch.equal(y[y != 0].unique(), torch.tensor([1 / 0.7])) or not y.any()


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_keep_rate(p):
    kept = (dropout(torch.ones(1000, 256), p, seed_of(2024)) != 0).double()
    other = (dropout(torch.ones(1000, 256), p, seed_of(2025)) != 0).double()
    deviation = (p * (1 - p)) ** 0.5
    assert abs(kept.mean() - (1 - p)) < 5 * deviation / kept.numel() ** 0.5
    # Neighbours, rows of the mask, and the next seed's do not know of each other.
    centred = ((kept - (1 - p)) / deviation).flatten()
    centred_other = ((other - (1 - p)) / deviation).flatten()
    for product in (centred[1:] * centred[:-1], centred[2**14 :] * centred[: -(2**14)], centred * centred_other):
        assert abs(product.mean()) < 5 / product.numel() ** 0.5


def test_extreme_probabilities(platform):
    x = torch.randn(5, 130).requires_grad_()
    assert dropout(x, 0) is x
    assert torch.equal(ops.dropout(x.detach(), seed_of(9), 0.0), x)
    assert torch.equal(dropout(x, 1e-9, seed_of(9)), x)
    assert not dropout(x, 0.999999, seed_of(9)).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_nothing_that_is_dropped_shows(backend, dtype):
    x = torch.tensor([math.inf, -math.inf, math.nan]).repeat(100).to(dtype).requires_grad_()
    y = dropout(x, 0.5, seed_of(3))
    kept = keep(seed_of(3), 300, 0.5).to(y.device)
    assert torch.equal(y == 0, ~kept) and not y[kept].isfinite().any()
    y.backward(torch.full_like(y, math.nan))
    assert torch.equal(x.grad == 0, ~kept)


@pytest.mark.parametrize("count", [2, 5])
def test_thread_count_changes_no_bit(threads, count):
    x = torch.randn(300, 700).bfloat16()
    wanted = run(dropout, x, 0.1, seed_of(5))
    threads(count)
    for got, expected in zip(run(dropout, x, 0.1, seed_of(5)), wanted, strict=True):
        assert torch.equal(got, expected)


def test_strides(platform):
    x, grad = torch.randn(12, 18), torch.randn(12, 18)
    wanted = run(lambda x, p, seed: dropout(x, p, seed), x, 0.3, seed_of(7))[0]
    for name, view in views_of_x(x).items():
        assert torch.equal(dropout(view, 0.3, seed_of(7)).reshape(12, 18), wanted), name
    for name, view in views_of_x(grad).items():
        leaf = x.view(view.shape).clone().requires_grad_()
        dropout(leaf, 0.3, seed_of(7)).backward(view)
        assert torch.equal(leaf.grad.reshape(12, 18), dropout(grad, 0.3, seed_of(7))), name


@pytest.mark.parametrize("shape", [(0,), (0, 18), (18, 0)], ids=str)
def test_empty(shape):
    assert [tensor.shape for tensor in run(dropout, torch.ones(shape), 0.5, None)] == [shape] * 2


def test_keeps_nothing_but_the_seed():
    x, saved = torch.randn(50, 64).bfloat16().requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        dropout(x, 0.1)
    assert [(t.dtype, t.shape) for t in saved] == [(torch.int64, (1,))]


def test_seeds_come_from_torchs_generator():
    x = torch.ones(1000)
    torch.manual_seed(1)
    first, second = dropout(x, 0.5), dropout(x, 0.5)
    torch.manual_seed(1)
    assert torch.equal(dropout(x, 0.5), first) and not torch.equal(first, second)


def test_gradients_of_gradients():
    x = torch.randn(40, requires_grad=True)
    (grad,) = torch.autograd.grad((dropout(x, 0.5, seed_of(3)) ** 2).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), x)
    assert torch.equal(second, 8.0 * keep(seed_of(3), 40, 0.5))


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_error_against_torch(dtype):
    """Torch's factor 1 / (1 - p) is itself rounded to the dtype."""
    x = torch.randn(100, 300).to(dtype)
    ours, theirs = dropout(x, 0.1, seed_of(1)), torch.nn.functional.dropout(x, 0.1)

    def error(y):
        kept = y != 0
        return rms(y[kept].double() - x[kept].double() / 0.9) / rms(x)

    assert error(ours) <= tolerances.VERSUS_STOCK * error(theirs)


def test_opcheck():
    for x in (torch.randn(7, 24).bfloat16(), torch.randn(24, 7).T):
        torch.library.opcheck(ops.dropout.default, (x, seed_of(3), 0.5))


def test_compile():
    x = torch.randn(20, 16)
    compiled = torch.compile(dropout, backend="aot_eager", fullgraph=True)
    for got, expected in zip(run(compiled, x, 0.3, seed_of(7)), run(dropout, x, 0.3, seed_of(7)), strict=True):
        assert torch.equal(got, expected)
    torch.manual_seed(1)
    first, second = compiled(x, 0.3), compiled(x, 0.3)
    torch.manual_seed(1)
    assert torch.equal(compiled(x, 0.3), first) and not torch.equal(first, second)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(3, 4).int()}, r"x: got int32 \[3, 4\], wanted a float32, bfloat16 or float16 tensor"),
        ({"x": [1.0]}, r"x: got \[1.0\], a list, wanted a float32, bfloat16 or float16 tensor"),
        ({"p": 1.0}, r"p: got 1.0, a float, wanted a probability in \[0, 1\)"),
        ({"p": -0.1}, r"p: got -0.1, a float, wanted a probability in \[0, 1\)"),
        ({"p": None}, r"p: got None, a NoneType, wanted a probability in \[0, 1\)"),
        ({"seed": 3}, r"seed: got 3, a int, wanted an int64 tensor \[1\]"),
        ({"seed": torch.ones(1)}, r"seed: got float32 \[1\], wanted an int64 tensor \[1\]"),
        ({"seed": seed_of(1).to("meta")}, "seed: got a tensor on meta, wanted one on cpu, where x is"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        dropout(**{"x": torch.ones(3, 4), "p": 0.5, "seed": seed_of(1)} | change)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(3).double(), seed_of(1), 0.5), "x: got float64, wanted float32, bfloat16 or float16"),
        ((torch.ones(3), torch.ones(1), 0.5), r"seed: got float32 \[1\], wanted int64 with 1 elements"),
        ((torch.ones(3), seed_of(1), 1.0), r"p: got 1.000000, wanted a probability in \[0, 1\)"),
    ],
    ids=["x", "seed", "p"],
)
def test_bad_arguments_of_the_op(arguments, message):
    with pytest.raises(ValueError, match=message):
        ops.dropout(*arguments)
