"""The ia3_linear family against the fp64 oracle: numerics, shapes, strides, every instruction set and the GPU's."""

import pytest
import tolerances
import torch
import torch.nn.functional as F
from comparison import mode_id, saved_for_backward
from ia3_linear_cases import LEAVES, expected, make_case, run
from lora_linear_cases import BASES, DTYPES, assert_close, error, short
from torch.utils.checkpoint import checkpoint

from peft_kernels import cpu
from peft_kernels.ops import ia3_linear
from peft_kernels.ops._linear import weight_arguments

pytestmark = pytest.mark.kernels

ops = torch.ops.peft_kernels

# Decode shapes and training shapes; odd, straddling rows, and longer than one block of rows or of k.
SHAPES = [(1, 64, 128), (3, 33, 64), (8, 30, 20), (5, 12, 257), (33, 65, 64), (70, 31, 100), (128, 129, 705)]
SIDES = ["in", "out", "in out", ""]
# (x, l)
MODES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
]


def shape_id(shape):
    return "m{}-n{}-k{}".format(*shape)


def side_id(sides):
    return sides.replace(" ", "-") or "none"


def check(case, compute_dtype=None, out_dtype=None):
    """y and all gradients are as near to the oracle's as their dtypes allow."""
    actual, wanted = run(case, compute_dtype=compute_dtype, out_dtype=out_dtype), expected(case)
    compute_dtype, out_dtype = compute_dtype or case.x.dtype, out_dtype or case.x.dtype
    assert actual["y"].dtype == out_dtype
    bounds = {
        "y": tolerances.product(compute_dtype, out_dtype),
        "x": tolerances.product(compute_dtype, case.x.dtype),
        "bias": tolerances.FP32_SUM,
    }
    for name, leaf in case.leaves().items():
        assert actual[name].dtype == leaf.dtype, name
        bounds.setdefault(name, tolerances.product(compute_dtype, leaf.dtype))
    if case.l_out is not None:  # a sum over y before l_out, which is rounded to out_dtype
        bounds["l_out"] = tolerances.product(compute_dtype, out_dtype) + 2 * tolerances.ROUNDING[case.l_out.dtype]
    for name in actual:
        assert_close(actual[name], wanted[name], bounds[name], name)


@pytest.mark.parametrize("sides", SIDES, ids=side_id)
@pytest.mark.parametrize("mode", MODES, ids=mode_id)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_shapes(backend, shape, mode, sides):
    check(make_case(*shape, sides, *mode))


@pytest.mark.parametrize("compute_dtype", DTYPES, ids=short)
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=short)
@pytest.mark.parametrize("base", BASES)
def test_bases(backend, base, weight_dtype, compute_dtype):
    for rows in (3, 21):
        check(make_case(rows, 50, 128, base=base, weight_dtype=weight_dtype), compute_dtype)


@pytest.mark.parametrize("out_dtype", DTYPES, ids=short)
@pytest.mark.parametrize("base", ["nf4", "dense"])
def test_output_dtype(platform, base, out_dtype):
    for rows in (3, 21):
        case = make_case(rows, 50, 128, x_dtype=torch.bfloat16, base=base, out_dtype=out_dtype)
        check(case, out_dtype=out_dtype)


@pytest.mark.skipif("avx2" not in cpu.isas(), reason="this processor lacks avx2")
@pytest.mark.parametrize("sides", SIDES, ids=side_id)
def test_product_by_torch(sides):
    """Which the kernels leave rows of fp32 to from 512 on."""
    with cpu.use_isa("avx2"):
        case = make_case(514, 40, 128, sides)
        check(case)
        case.bias = None
        check(case)


@pytest.mark.slow
@pytest.mark.parametrize("base", ["nf4", "dense"])
@pytest.mark.parametrize("shape", [(600, 1100, 4096), (5000, 40, 4096)], ids=shape_id)
def test_large_shapes(processor, shape, base):
    check(make_case(*shape, x_dtype=torch.bfloat16, base=base))


@pytest.mark.parametrize("base", ["nf4", "dense"])
@pytest.mark.parametrize("rows", [3, 60])
def test_strides(backend, rows, base):
    case = make_case(rows, 40, 128, base=base, bias=False)
    wanted = run(case)
    wide = torch.randn(rows, 300)
    wide[:, 5:133] = case.x
    case.x = wide[:, 5:133]
    case.l_out = torch.stack([case.l_out, case.l_out], 1)[:, 0]
    for name, value in run(case).items():
        assert torch.equal(value, wanted[name]), name
    case.x = case.x.T.contiguous().T
    case.grad_y = case.grad_y.T.contiguous().T
    for name, value in run(case).items():
        assert torch.equal(value, wanted[name]), name
    if base == "dense":  # as a Conv1D stores it
        case.weight = case.weight.T.contiguous().T
        check(case)


@pytest.mark.may_launch_nothing
@pytest.mark.parametrize("base", ["nf4", "dense"])
@pytest.mark.parametrize("shape", [(0, 40, 128), (5, 0, 128), (5, 40, 0), (0, 0, 0)], ids=shape_id)
def test_empty(platform, shape, base):
    case = make_case(*shape, base=base)
    actual, wanted = run(case), expected(case)
    for name, value in actual.items():
        assert error(value, wanted[name]) <= tolerances.FP32_SUM, name


@pytest.mark.may_launch_nothing
@pytest.mark.parametrize("sides", SIDES, ids=side_id)
@pytest.mark.parametrize("x_dtype", DTYPES, ids=short)
@pytest.mark.parametrize("base", ["nf4", "dense"])
def test_without_gradients(platform, base, x_dtype, sides):
    for rows in (2, 30):
        case = make_case(rows, 40, 128, sides, x_dtype, base=base)
        with torch.no_grad():
            y = ia3_linear(case.x, case.weight, case.bias, case.l_in, case.l_out)
        assert y.dtype == x_dtype
        tolerance = tolerances.product(x_dtype, x_dtype) + 2 * tolerances.ROUNDING[x_dtype]
        assert_close(y, expected(case)["y"], tolerance)


def test_leading_dimensions(platform):
    case = make_case(12, 40, 128)
    wanted = run(case)
    case.x, case.grad_y = case.x.view(3, 1, 4, 128), case.grad_y.view(3, 1, 4, 40)
    for name, value in run(case).items():
        assert torch.equal(value.flatten(), wanted[name].flatten()), name
    row = ia3_linear(case.x[1, 0, 2], case.weight, case.bias, case.l_in, case.l_out)
    assert row.shape == (40,)


@pytest.mark.parametrize("rows", [1, 40])
def test_zero_and_negative_scales(backend, rows):
    case = make_case(rows, 40, 128)
    case.l_in[::3], case.l_out[::3] = 0, 0
    actual = run(case)
    assert not actual["y"][:, ::3].any() and not actual["x"][:, ::3].any()
    wanted = expected(case)
    for name in ("l_in", "l_out"):  # what is scaled to nothing still says how its scale should change
        assert actual[name][::3].all()
        assert_close(actual[name], wanted[name], tolerances.FP32_SUM, name)


@pytest.mark.parametrize("special", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("base", ["nf4", "dense"])
@pytest.mark.parametrize("rows", [1, 40])
def test_nan_and_infinity_propagate(backend, rows, base, special):
    case = make_case(rows, 30, 128, base=base)
    case.x[rows // 2, 77] = special
    weight = case.weight.dequantize() if base == "nf4" else case.weight
    stock = F.linear(case.x * case.l_in, weight, case.bias) * case.l_out
    actual = run(case)["y"]
    assert torch.equal(actual.isnan(), stock.isnan())
    assert torch.equal(actual.isinf(), stock.isinf())


@pytest.mark.parametrize("sides", ["in", "out"])
def test_no_worse_than_separate_passes(platform, sides):
    """bf16 rounds once less than PEFT's way, which rounds the product before l_out; l_in rounds as often."""
    case = make_case(96, 384, 512, sides, torch.bfloat16, weight_dtype=torch.bfloat16, bias=False)
    weight = case.weight.dequantize()

    def separate(x, weight, bias, l_in, l_out):
        y = F.linear(x if l_in is None else (x * l_in).to(x.dtype), weight)
        return y if l_out is None else (y * l_out).to(y.dtype)

    actual, wanted = run(case), expected(case)
    case.weight = weight
    theirs = run(case, separate)
    for name in actual:
        assert error(actual[name], wanted[name]) <= tolerances.VERSUS_STOCK * error(theirs[name], wanted[name]), name


# ---- torch's machinery -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["nf4", "dense"])
@pytest.mark.parametrize("rows", [4, 60])
@pytest.mark.parametrize("trained", ["x", "l_in", "l_out", "x l_out", "bias", "x l_in l_out", ""])
def test_saves_and_computes_what_is_asked_for(platform, trained, rows, base):
    case, trained = make_case(rows, 40, 128, base=base), trained.split()
    full = run(case)
    leaves = {name: leaf.detach().requires_grad_(name in trained) for name, leaf in case.leaves().items()}
    arguments = {name: leaves.get(name, getattr(case, name)) for name in LEAVES}
    known = [tensor for name, tensor in leaves.items() if name != "x"]
    y, saved = saved_for_backward(lambda: ia3_linear(**arguments), known)
    assert sum(saved.values()) == 4 * (("l_in" in trained) * rows * 128 + ("l_out" in trained) * rows * 40)
    assert y.requires_grad == bool(trained)
    if trained:
        y.backward(case.grad_y)
    for name, leaf in leaves.items():
        assert (leaf.grad is not None) == (name in trained)
        if name in trained:
            assert torch.equal(leaf.grad, full[name]), name


@pytest.mark.parametrize("rows", [4, 150])
def test_thread_count_changes_no_bit(cpu_isa, threads, rows):
    case = make_case(rows, 300, 512, bias=False)
    threads(2)
    wanted = run(case)
    for count in (1, 3, 8, 2):
        threads(count)
        for name, value in run(case).items():
            assert torch.equal(value, wanted[name]), name


def test_double_backward_is_refused(platform):
    case = make_case(20, 40, 128)
    x = case.x.requires_grad_()
    (grad,) = torch.autograd.grad(ia3_linear(x, case.weight, l_out=case.l_out).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


@pytest.mark.parametrize("base", ["nf4", "dense"])
def test_autocast(platform, base):
    case = make_case(20, 40, 128, base=base)
    with torch.autocast(platform, torch.bfloat16):
        actual = run(case)
    wanted = run(case, compute_dtype=torch.bfloat16, out_dtype=torch.bfloat16)
    assert actual["y"].dtype == torch.bfloat16 and actual["x"].dtype == torch.float32
    for name, value in wanted.items():
        assert torch.equal(actual[name], value), name


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_checkpointing(platform, reentrant):
    case = make_case(20, 40, 128)

    def checkpointed(x, **others):
        return checkpoint(lambda x: ia3_linear(x, **others), x, use_reentrant=reentrant)

    wanted = run(case)
    for name, value in run(case, checkpointed).items():
        assert torch.equal(value, wanted[name]), name


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("base", ["nf4", "dense"])
def test_compile(base, dynamic):
    torch.compiler.reset()
    compiled = torch.compile(ia3_linear, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (37, 6, 50):
        case = make_case(rows, 24, 128, x_dtype=torch.bfloat16, base=base)
        actual, wanted = run(case, compiled), run(case)
        for name, value in wanted.items():
            assert_close(actual[name], value, tolerances.product(value.dtype, value.dtype), name)


def op_arguments(case, grad_y=None):
    """The arguments of the forward op or, with a grad_y, of the backward op."""
    weight, dtype = weight_arguments(case.weight), case.x.dtype
    if grad_y is None:
        return (case.x, *weight, case.bias, case.l_in, case.l_out, True), {"compute_dtype": dtype, "out_dtype": dtype}
    arguments = grad_y, case.x, torch.randn_like(grad_y), *weight, case.l_in, case.l_out, True, True, True
    return arguments, {"compute_dtype": dtype, "x_dtype": dtype}


@pytest.mark.may_launch_nothing
@pytest.mark.parametrize("base", ["nested", "dense"])
@pytest.mark.parametrize("rows", [0, 4, 30])
def test_opcheck(platform, rows, base):
    case = make_case(rows, 40, 128, x_dtype=torch.bfloat16, base=base, weight_dtype=torch.bfloat16)
    torch.library.opcheck(ops.ia3_linear_forward.default, *op_arguments(case))
    torch.library.opcheck(ops.ia3_linear_backward.default, *op_arguments(case, case.grad_y))


# ---- bad arguments -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("x", lambda x: x[:, 1:], r"x: got float32 \[3, 127\], wanted \[..., 128\]"),
        ("l_in", lambda s: s[1:], r"l_in: got float32 \[127\], wanted a floating-point tensor \[128\]"),
        ("l_in", lambda s: s[None], r"l_in: got float32 \[1, 128\], wanted"),
        ("l_out", lambda s: s.int(), r"l_out: got int32 \[40\], wanted a floating-point tensor \[40\]"),
        ("l_out", lambda s: 2.0, "l_out: got 2.0, a float, wanted"),
        ("l_out", lambda s: s.to("meta"), "l_out: got a tensor on meta, wanted one on cpu, where x is"),
        ("bias", lambda b: b[1:], r"bias: got (shape|float32) \[39\], wanted"),
        ("weight", lambda w: None, "weight: got None, a NoneType, wanted an NF4Weight or"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("base", ["nf4", "dense"])
def test_bad_arguments(base, name, change, message):
    case = make_case(3, 40, 128, base=base)
    setattr(case, name, change(getattr(case, name)))
    with pytest.raises(ValueError, match=message):
        ia3_linear(**{leaf: getattr(case, leaf) for leaf in LEAVES})


def test_bad_op_arguments():
    case = make_case(3, 40, 128)
    arguments, options = op_arguments(case)
    with pytest.raises(ValueError, match="weight: got none, wanted a dense or a 4-bit weight"):
        ops.ia3_linear_forward(arguments[0], (), (), *arguments[3:], **options)
    backward, options = op_arguments(case, case.grad_y)
    for position, name in ((1, "x"), (2, "unscaled")):
        without = [*backward]
        without[position] = None
        with pytest.raises(ValueError, match=f"{name}: got none, wanted the forward's"):
            ops.ia3_linear_backward(*without, **options)
