"""The rotary family against the fp64 oracle and the formula in torch's operations."""

import pytest
import torch
from comparison import DTYPES, assert_close, error, short
from tolerances import FP32_SUM, ROUNDING, VERSUS_STOCK

from peft_kernels.ops import rotary
from peft_kernels.testing.reference.rotary import rotary as oracle

pytestmark = pytest.mark.kernels

ops = torch.ops.peft_kernels


def make_case(batch, heads, kv_heads, length, dim, channels=None, dtype=torch.float32, angle_dtype=None, per_row=True):
    """q and k as transformers has them, [B, S, H, D] in memory; angles whose halves differ, unlike a model's."""
    q, k = (torch.randn(batch, length, count, dim).to(dtype).transpose(1, 2) for count in (heads, kv_heads))
    angles = 9 * torch.rand(batch if per_row else 1, length, dim if channels is None else channels)
    return q, k, *(part.to(angle_dtype or dtype) for part in (angles.cos(), angles.sin()))


def run(function, q, k, cos, sin):
    """Both results and both gradients."""
    q, k = (x.detach().requires_grad_() for x in (q, k))
    results = function(q, k, cos, sin)
    torch.manual_seed(1)
    grads = [torch.randn(x.shape).to(q.dtype).to(result.dtype) for x, result in zip((q, k), results, strict=True)]
    return [x.detach() for x in results] + list(torch.autograd.grad(results, (q, k), grads))


def expected(q, k, cos, sin):
    def rounded_grads(*tensors):
        q, k = (x.detach().requires_grad_() for x in tensors[:2])
        results = oracle(q, k, *tensors[2:])
        torch.manual_seed(1)
        grads = [torch.randn(x.shape).to(dtype).double() for x in results]
        return [x.detach() for x in results] + list(torch.autograd.grad(results, (q, k), grads))

    dtype = q.dtype
    return rounded_grads(*(x.double() for x in (q, k, cos, sin)))


def stock(q, k, cos, sin):
    def rotate_half(x):
        return torch.cat([-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]], -1)

    return tuple(x * cos.unsqueeze(1) + rotate_half(x) * sin.unsqueeze(1) for x in (q, k))


NAMES = ("q", "k", "grad_q", "grad_k")


def check(*case):
    for name, got, wanted in zip(NAMES, run(rotary, *case), expected(*case), strict=True):
        assert_close(got, wanted, FP32_SUM + 2 * ROUNDING[got.dtype], name)


SHAPES = {
    "decode": (1, 9, 3, 1, 64),
    "batch": (3, 4, 2, 70, 32),
    "less-than-a-vector": (2, 2, 1, 5, 8),
    "ragged": (2, 3, 3, 4, 84),
    "partial": (2, 3, 1, 5, 80, 36),
    "partial-ragged": (1, 2, 2, 3, 23, 10),
    "nothing-turned": (2, 2, 1, 3, 9, 0),
    "many-heads": (1, 40, 8, 30, 128),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(backend, shape, dtype):
    check(*make_case(*shape, dtype=dtype))
    check(*make_case(*shape, dtype=dtype, per_row=False))


@pytest.mark.parametrize("angle_dtype", DTYPES, ids=short)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_dtypes(backend, dtype, angle_dtype):
    case = make_case(2, 3, 1, 6, 48, dtype=dtype, angle_dtype=angle_dtype)
    check(*case)
    results, theirs = run(rotary, *case), run(stock, *case)
    assert [x.dtype for x in results] == [x.dtype for x in theirs]


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_error_against_torch(backend, dtype):
    case = make_case(2, 9, 3, 100, 64, dtype=dtype)
    for got, theirs, wanted in zip(run(rotary, *case), run(stock, *case), expected(*case), strict=True):
        assert error(got, wanted) <= VERSUS_STOCK * error(theirs, wanted)


@pytest.mark.parametrize("layout", ["heads-apart", "part-of-qkv", "strided-channels", "expanded"])
def test_layouts(backend, layout):
    q, k, cos, sin = case = make_case(2, 4, 2, 7, 36, dtype=torch.bfloat16, per_row=False)
    wanted = run(rotary, *case)
    if layout == "heads-apart":
        q, k = q.contiguous(), k.contiguous()
    elif layout == "part-of-qkv":
        qkv = torch.cat([q, k, k], 1).transpose(1, 2).contiguous().transpose(1, 2)
        q, k = qkv[:, :4], qkv[:, 4:6]
    elif layout == "strided-channels":
        q = q.transpose(2, 3).contiguous().transpose(2, 3)
    else:
        cos, sin = (torch.nn.functional.pad(part, (1, 2))[..., 1:37].expand(2, -1, -1) for part in (cos, sin))
    for got, value in zip(run(rotary, q, k, cos, sin), wanted, strict=True):
        assert torch.equal(got, value)


def test_results_are_stored_as_the_inputs():
    for length in (1, 5):
        q, k, cos, sin = make_case(2, 4, 2, length, 8)
        for got, x in zip(rotary(q, k, cos, sin), (q, k), strict=True):
            assert got.transpose(1, 2).is_contiguous()
            assert length == 1 or got.stride() == x.stride()
        assert rotary(q.contiguous(), k, cos, sin)[0].is_contiguous()


@pytest.mark.parametrize("count", [2, 3])
def test_thread_count_changes_no_bit(threads, count):
    case = make_case(2, 9, 3, 300, 64, dtype=torch.bfloat16)
    wanted = run(rotary, *case)
    threads(count)
    for got, value in zip(run(rotary, *case), wanted, strict=True):
        assert torch.equal(got, value)


@pytest.mark.parametrize("shape", [(0, 2, 1, 3, 8), (2, 2, 1, 0, 8), (2, 0, 1, 3, 8), (2, 2, 1, 3, 0)], ids=str)
def test_empty(shape):
    q, k, cos, sin = make_case(*shape)
    assert [x.shape for x in run(rotary, q, k, cos, sin)] == [q.shape, k.shape] * 2


def test_only_one_is_trained():
    q, k, cos, sin = make_case(2, 3, 1, 5, 16)
    wanted = run(rotary, q, k, cos, sin)
    results = rotary(q.requires_grad_(), k, cos, sin)
    torch.manual_seed(1)
    results[0].backward(torch.randn(q.shape))
    assert torch.equal(q.grad, wanted[2])


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_what_is_not_trained_wants_no_gradient(compiled):
    """Else an attention would make the gradient of all queries where only keys are trained."""
    function = torch.compile(rotary, backend="aot_eager", fullgraph=True) if compiled else rotary
    q, k, cos, sin = make_case(2, 3, 1, 5, 16)
    for trained in ((True, False), (False, True), (True, True), (False, False)):
        results = function(q.requires_grad_(trained[0]), k.requires_grad_(trained[1]), cos, sin)
        assert tuple(x.requires_grad for x in results) == trained
        if any(trained):
            q.grad = k.grad = None
            sum(x.square().sum() for x in results).backward()
            assert (q.grad is not None, k.grad is not None) == trained


def test_saves_the_angles_alone():
    case = make_case(2, 3, 1, 5, 16)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        rotary(case[0].requires_grad_(), *case[1:])
    assert set(saved) == {case[2].data_ptr(), case[3].data_ptr()}


@pytest.mark.parametrize("backwards", [False, True])
def test_opcheck(backwards):
    q, k, cos, sin = make_case(2, 4, 2, 5, 16, 12, torch.bfloat16, torch.float32)
    for first in (q, q.contiguous()):
        torch.library.opcheck(ops.rotary.default, (first, k, cos, sin, torch.float32, backwards))
    one = (x[..., :1, :] for x in (q, k, cos, sin))
    torch.library.opcheck(ops.rotary.default, (*one, torch.float32, backwards))


def test_compile():
    case = make_case(2, 4, 2, 5, 16)
    compiled = torch.compile(rotary, backend="aot_eager", fullgraph=True)
    for got, wanted in zip(run(compiled, *case), run(rotary, *case), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.ones(2, 3, 4)}, r"q: got float32 \[2, 3, 4\], wanted .* \[B, H, S, D\]"),
        ({"q": torch.ones(2, 3, 5, 8).int()}, r"q: got int32"),
        ({"k": torch.ones(2, 3, 6, 8)}, r"k: got float32 \[2, 3, 6, 8\], wanted float32 \[2, H_kv, 5, 8\]"),
        ({"k": torch.ones(2, 3, 5, 8).half()}, r"k: got float16"),
        ({"cos": torch.ones(3, 5, 8)}, r"cos: got float32 \[3, 5, 8\], wanted .* \[2 or 1, 5, R\]"),
        ({"cos": torch.ones(1, 5, 10)}, r"cos: .* an even R of at most 8"),
        ({"cos": torch.ones(1, 5, 3)}, r"cos: .* an even R of at most 8"),
        ({"sin": torch.ones(1, 5, 6)}, r"sin: got float32 \[1, 5, 6\], wanted .* the same for both"),
        ({"sin": torch.ones(1, 5, 8).half()}, r"sin: got float16 \[1, 5, 8\], wanted .* the same for both"),
        ({"k": torch.ones(2, 1, 5, 8, device="meta")}, "k: got a tensor on meta, wanted one on cpu, where q is"),
        ({"sin": torch.ones(1, 5, 8, device="meta")}, "sin: got a tensor on meta"),
        ({"sin": torch.ones(1, 5, 8).requires_grad_()}, r"sin: got one that requires a gradient"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_arguments(change, message):
    case = {"q": torch.ones(2, 3, 5, 8), "k": torch.ones(2, 1, 5, 8), "cos": torch.ones(1, 5, 8)}
    with pytest.raises(ValueError, match=message):
        rotary(**case | {"sin": case["cos"]} | change)


def test_bad_tensors_of_the_op():
    q, k, cos, sin = make_case(2, 3, 1, 5, 8)
    for arguments, message in (
        ((q[0], k, cos, sin), r"q: got float32 \[3, 5, 8\], wanted a tensor \[B, H, S, D\]"),
        ((q, k[:, :, :4], cos, sin), r"k: got shape \[2, 1, 4, 8\], wanted \[2, 1, 5, 8\]"),
        ((q, k, cos[..., :6], sin), r"sin: got float32 \[2, 5, 8\], wanted \[B or 1, S, R\] = \[2 or 1, 5, 6\]"),
        ((q, k, cos[..., :5], sin), r"cos: got float32 \[2, 5, 5\], wanted .* an even R of at most 8"),
        ((q, k, cos.transpose(1, 2).contiguous().transpose(1, 2), sin), r"cos: got strides"),
        ((q.transpose(2, 3).contiguous().transpose(2, 3), k, cos, sin), r"q: got strides"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.rotary(*arguments, torch.float32, False)
