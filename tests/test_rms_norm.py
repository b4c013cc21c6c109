"""The rms_norm family against the fp64 oracle, and against what transformers spells out."""

import pytest
import tolerances
import torch
import torch.nn.functional as F
from comparison import DTYPES, assert_close, error, short

from peft_kernels.ops import rms_norm
from peft_kernels.testing.reference.rms_norm import rms_norm as oracle

pytestmark = pytest.mark.kernels

ops = torch.ops.peft_kernels
# Of a warp and of several on a GPU, of more columns than they keep; parts of vectors; more rows than a task has.
SHAPES = [(1, 9), (5, 17), (33, 576), (70, 1030), (3, 5000), (2, 20000)]


def make_case(m, d, dtype=torch.float32, weight_dtype=None):
    return 3 * torch.randn(m, d).to(dtype), (1 + 0.2 * torch.randn(d)).to(weight_dtype or dtype)


def run(function, x, weight, grad_dtype=None, **options):
    """y, dx and dw; dy are numbers of grad_dtype."""
    x, weight = x.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    y = function(x, weight, **options)
    torch.manual_seed(1)
    y.backward(torch.randn(y.shape).to(grad_dtype or y.dtype).to(y.dtype))
    return y.detach(), x.grad, weight.grad


def check(x, weight, **options):
    actual = run(rms_norm, x, weight, **options)
    exact = {name: value for name, value in options.items() if name != "out_dtype"}
    wanted = run(oracle, x.double(), weight.double(), actual[0].dtype, **exact)
    for name, got, expected in zip(("y", "dx", "dw"), actual, wanted, strict=True):
        assert_close(got, expected, tolerances.FP32_SUM + 2 * tolerances.ROUNDING[got.dtype], name)
    return actual


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(backend, shape, dtype):
    check(*make_case(*shape, dtype))


@pytest.mark.parametrize("weight_dtype", DTYPES, ids=short)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_dtypes(platform, dtype, weight_dtype):
    y, dx, dw = check(*make_case(20, 48, dtype, weight_dtype), eps=0.5, offset=1.0)
    assert y.dtype is torch.promote_types(dtype, weight_dtype) and dx.dtype is dtype and dw.dtype is weight_dtype
    for out_dtype in DTYPES:
        assert check(*make_case(3, 48, dtype, weight_dtype), out_dtype=out_dtype)[0].dtype is out_dtype


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=short)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_error_against_transformers(platform, dtype, weight_dtype):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    x, weight = make_case(40, 576, dtype, weight_dtype)

    def stock(x, weight):
        norm = LlamaRMSNorm(weight.shape[0])
        del norm.weight
        norm.weight = weight
        return norm(x)

    ours, theirs = run(rms_norm, x, weight), run(stock, x, weight)
    wanted = run(oracle, x.double(), weight.double(), ours[0].dtype)
    for name, got, stocks, expected in zip(("y", "dx", "dw"), ours, theirs, wanted, strict=True):
        assert got.dtype is stocks.dtype
        assert error(got, expected) <= tolerances.VERSUS_STOCK * error(stocks, expected) + 1e-7, name


def test_extremes(platform):
    x, weight = make_case(4, 64)
    x[0], x[1], x[2] = 0, 1e15, 1e-20
    y, dx, _ = run(rms_norm, x, weight)
    assert not y[0].any() and y.isfinite().all() and dx.isfinite().all()
    x[3, 5] = float("nan")
    assert rms_norm(x, weight)[3].isnan().all() and not rms_norm(x, weight)[:3].isnan().any()


def test_only_what_is_wanted():
    x, weight = make_case(9, 40)
    _, dx, dw = run(rms_norm, x, weight)
    for wanted, frozen, gradient in ((x, weight, dx), (weight, x, dw)):
        leaf = wanted.clone().requires_grad_()
        y = rms_norm(leaf, frozen) if wanted is x else rms_norm(frozen, leaf)
        torch.manual_seed(1)
        y.backward(torch.randn(y.shape))
        assert torch.equal(leaf.grad, gradient)


@pytest.mark.parametrize("count", [2, 5])
def test_thread_count_changes_no_bit(threads, count):
    case = make_case(300, 700, torch.bfloat16)
    wanted = run(rms_norm, *case)
    threads(count)
    for got, expected in zip(run(rms_norm, *case), wanted, strict=True):
        assert torch.equal(got, expected)


def test_strides_and_empty(platform):
    x, weight = make_case(12, 18)
    wanted = rms_norm(x, weight)
    assert torch.equal(rms_norm(F.pad(x, (1, 4))[:, 1:19], weight), wanted)
    assert torch.equal(rms_norm(x.T.contiguous().T, weight.repeat(2).view(2, 18).T.contiguous()[:, 0]), wanted)
    assert torch.equal(rms_norm(x.view(3, 4, 18), weight).view(12, 18), wanted)
    assert torch.equal(rms_norm(x[0], weight), wanted[0])


def test_no_rows():
    y, dx, dw = run(rms_norm, *make_case(0, 18))
    assert y.shape == dx.shape == (0, 18) and not dw.any()


def test_keeps_a_number_for_each_row():
    x, weight = make_case(50, 64, torch.bfloat16)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        rms_norm(x.requires_grad_(), weight)
    assert sum(t.numel() for t in saved if t.data_ptr() not in (x.data_ptr(), weight.data_ptr())) == 50


def test_opcheck():
    x, weight = make_case(7, 24, torch.bfloat16)
    torch.library.opcheck(ops.rms_norm_forward.default, (x, weight, 1e-6, 1.0, torch.float32))
    for wanted in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(ops.rms_norm_backward.default, (x, x, weight, torch.rand(7), 1.0, *wanted))


def test_compile():
    case = make_case(20, 16)
    compiled = torch.compile(rms_norm, backend="aot_eager", fullgraph=True)
    for got, expected in zip(run(compiled, *case), run(rms_norm, *case), strict=True):
        assert_close(got, expected, tolerances.FP32_SUM)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(3, 0)}, r"x: got float32 \[3, 0\], wanted .* d of at least 1"),
        ({"x": torch.ones(3, 4).int()}, r"x: got int32 \[3, 4\], wanted a float32, bfloat16 or float16 tensor"),
        ({"weight": torch.ones(5)}, r"weight: got float32 \[5\], wanted .* tensor \[4\], for x of shape \[3, 4\]"),
        ({"weight": None}, r"weight: got None, a NoneType"),
        ({"weight": torch.ones(4, device="meta")}, "weight: got a tensor on meta, wanted one on cpu"),
        ({"eps": -1.0}, "eps: got -1.0, a float, wanted a number of at least 0"),
        ({"eps": None}, "eps: got None, a NoneType, wanted a number"),
        ({"offset": "one"}, "offset: got 'one', a str, wanted a number"),
        ({"out_dtype": torch.float64}, "out_dtype: got torch.float64"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        rms_norm(**{"x": torch.ones(3, 4), "weight": torch.ones(4)} | change)
