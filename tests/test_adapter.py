"""The adapter family against the fp64 oracle and the eager chain: numerics, shapes, strides, every instruction set."""

from dataclasses import replace

import pytest
import tolerances
import torch
from adapter_cases import MODES, call, eager, expected, make_case, run
from comparison import DTYPES, assert_close, error, mode_id, short, views_of_x
from hypothesis import given
from hypothesis import strategies as st

from peft_kernels.ops import ACTIVATIONS
from peft_kernels.ops.adapter import bottleneck

pytestmark = pytest.mark.kernels

# (M, d, r): odd, in the middle of vectors, tiles and panels; several blocks of rows, several chunks of r.
SHAPES = [(1, 16, 1), (3, 17, 5), (33, 64, 16), (70, 100, 31), (130, 65, 64), (300, 96, 70), (9, 257, 130)]


def shape_id(shape):
    return "m{}-d{}-r{}".format(*shape)


def rounding(case):
    """The dtype that the products' operands are rounded to."""
    return case.x.dtype if case.x.dtype == case.down_weight.dtype == case.up_weight.dtype else torch.float32


def check(case, compute_dtype=None, **more):
    """y and all gradients are as near to the oracle's as their dtypes allow."""
    actual, wanted = run(case, **more), expected(case)
    assert actual.keys() == wanted.keys()
    compute_dtype = compute_dtype or rounding(case)
    for name, value in wanted.items():
        leaf = case.leaves().get(name)
        assert leaf is None or actual[name].dtype == leaf.dtype, name
        tolerance = tolerances.product(compute_dtype, actual[name].dtype)
        if name == "scale":  # a sum over all of y, which cancels
            size = (case.grad_y.double() * wanted["y"]).norm()
            assert (actual[name].double() - value).abs() <= tolerance * size
        else:
            assert_close(actual[name], value, tolerance, name)


@pytest.mark.parametrize("mode", MODES, ids=mode_id)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_shapes(backend, shape, mode):
    check(make_case(*shape, *mode))


@pytest.mark.parametrize("mode", MODES[:3], ids=mode_id)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(backend, activation, mode):
    case = make_case(40, 48, 24, *mode, activation=activation)
    case.x *= 3  # reaches the tails of σ
    check(case)


OPTIONS = {
    "parallel": {"residual": "given"},
    "bare": {"residual": None, "bias": False},
    "scale": {"scale": "learned"},
    "gate": {"gate": True, "scale": "learned", "bias": False},
    "dropout": {"dropout": 0.3, "gate": True},
    "norm": {"norm": True},
    "norm-given": {"norm": True, "residual": "given", "scale": "learned", "gate": True},
    "post-norm": {"post_norm": True},
    "post-norm-given": {"post_norm": True, "residual": "given", "dropout": 0.2},
    "all": {"norm": True, "post_norm": True, "scale": "learned", "gate": True, "dropout": 0.1},
}


@pytest.mark.parametrize("mode", MODES, ids=mode_id)
@pytest.mark.parametrize("options", list(OPTIONS))
def test_options(backend, options, mode):
    check(make_case(70, 72, 20, *mode, **OPTIONS[options]))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2100, 768, 64), (40, 16384, 512), (1, 4096, 512)], ids=shape_id)
@pytest.mark.parametrize("mode", MODES[:3], ids=mode_id)
def test_large_shapes(processor, shape, mode):
    check(make_case(*shape, *mode, norm=True, dropout=0.1))


@given(
    shape=st.tuples(st.integers(1, 150), st.integers(16, 150), st.integers(1, 80)),
    mode=st.sampled_from(MODES),
    options=st.sampled_from(list(OPTIONS)),
    activation=st.sampled_from([name for name in ACTIVATIONS if "relu" not in name]),  # their slopes jump
    data_seed=st.integers(0, 2**31),
)
def test_random_cases(backend, shape, mode, options, activation, data_seed):
    torch.manual_seed(data_seed)
    case = make_case(*shape, *mode, activation=activation, **OPTIONS[options])
    actual, wanted = run(case), expected(case)
    for name, value in wanted.items():
        # Small tensors can cancel: a few of their numbers are compared with what all gradients are like.
        assert actual[name].isfinite().all(), name
        size = max(value.abs().max().item(), case.grad_y.double().norm().item() / value.numel() ** 0.5)
        difference = (actual[name].double() - value).square().mean().sqrt().item()
        assert difference <= 2 * tolerances.product(rounding(case), actual[name].dtype) * size, name


@pytest.mark.parametrize("out_dtype", DTYPES, ids=short)
def test_output_dtype(platform, out_dtype):
    case = make_case(20, 40, 8, torch.bfloat16, out_dtype=out_dtype)
    check(case, out_dtype=out_dtype)
    assert call(case, out_dtype=out_dtype).dtype == out_dtype
    case.residual = torch.randn(20, 40)
    assert call(case).dtype == torch.float32


def test_mean_far_from_zero(backend):
    # A LayerNorm whose sums of squares would cancel: the mean is a thousand deviations.
    case = make_case(40, 96, 16, norm=True)
    case.x = case.x + 1000
    actual, wanted = run(case), expected(case)
    for name in ("y", "down_weight", "norm_weight"):
        assert_close(actual[name], wanted[name], 1000 * tolerances.ROUNDING[torch.float32] * 4, name)


@pytest.mark.parametrize("mean", [8, 100])
def test_mean_against_eager(backend, mean):
    # Near 0 a LayerNorm may be folded into the product of rounded numbers; further off rows are normalised first.
    case = make_case(128, 256, 32, torch.bfloat16, torch.bfloat16, norm=True, residual=None)
    case.x = case.x + mean
    actual, theirs, wanted = run(case), run(case, eager), expected(case)
    for name in wanted:
        assert error(actual[name], wanted[name]) <= tolerances.VERSUS_STOCK * error(theirs[name], wanted[name]), name


# ---- against stock -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("mode", [MODES[0], MODES[2], MODES[4]], ids=mode_id)
@pytest.mark.parametrize("options", ["scale", "norm", "post-norm", "all"])
def test_error_against_eager(platform, options, mode, autocast):
    # Enough elements, so that the ratio of two rms errors is no accident; the mask is another one.
    case = make_case(128, 256, 32, *mode, **OPTIONS[options] | {"dropout": 0.0})
    with torch.autocast(platform, torch.bfloat16, enabled=autocast):
        actual, theirs = run(case), run(case, eager)
    wanted = expected(case)
    for name in wanted:
        if wanted[name].numel() == 1:  # a learned scale: one number's error is an accident
            continue
        ours, stocks = error(actual[name], wanted[name]), error(theirs[name], wanted[name])
        assert ours <= tolerances.VERSUS_STOCK * stocks or ours <= tolerances.FP32_SUM, name


@pytest.mark.parametrize("special", [float("nan"), float("inf")], ids=str)
def test_not_finite_stays_in_its_row(backend, special):
    case = make_case(40, 64, 8, norm=True)
    case.x[17, 30] = special
    y = call(case)
    others = torch.arange(40) != 17
    assert y[others].isfinite().all() and not y[17].isfinite().any()


# ---- strides, empty tensors, broadcasting ------------------------------------------------------------------------


@pytest.mark.parametrize("view", list(views_of_x(torch.zeros(2, 1))))
def test_strided_x_and_grad_y(platform, view):
    case = make_case(38, 65, 8, norm=True)
    wanted = run(case)
    x = views_of_x(case.x)[view].detach().requires_grad_()
    case.x = x
    y = call(case)
    assert y.shape == x.shape
    y.backward(views_of_x(case.grad_y)[view])
    assert torch.equal(y.view_as(wanted["y"]), wanted["y"])
    assert torch.equal(x.grad.reshape(38, 65), wanted["x"])


def test_one_row_and_expanded_grad_y(platform):
    case = make_case(6, 40, 8, residual=None)
    row, y = replace(case, x=case.x[0]), call(case)
    assert_close(call(row), y[0], tolerances.FP32_SUM)
    case.grad_y = torch.ones(()).expand(6, 40)
    wanted = run(replace(case, grad_y=torch.ones(6, 40)))
    for name, value in run(case).items():
        assert torch.equal(value, wanted[name]), name


@pytest.mark.may_launch_nothing
@pytest.mark.parametrize("options", ["parallel", "all"])
def test_empty(platform, options):
    actual = run(make_case(0, 40, 8, **OPTIONS[options]))
    assert actual.pop("y").shape == (0, 40)
    assert all(not value.any() for value in actual.values())


def test_gate_broadcasts(platform):
    case = make_case(12, 24, 4)
    cube = replace(case, x=case.x.view(3, 4, 24), grad_y=case.grad_y.view(3, 4, 24))
    each = torch.rand(3, 1, 1)
    full = run(replace(cube, gate=each.expand(3, 4, 1).contiguous()))
    for gate in (each, each.expand(3, 4, 1)):
        actual = run(replace(cube, gate=gate))
        assert torch.equal(actual["y"], full["y"])
    assert_close(run(replace(cube, gate=each))["gate"], full["gate"].sum(1, keepdim=True), tolerances.FP32_SUM)


# ---- dropout -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("probability", [1e-9, 1e-3, 0.25, 0.99])
def test_dropout(backend, probability):
    check(make_case(35, 320, 8, dropout=probability))


def test_seeds_come_from_torchs_generator(platform):
    case = make_case(20, 24, 8)
    torch.manual_seed(3)
    first, second = call(case, dropout=0.5), call(case, dropout=0.5)
    torch.manual_seed(3)
    assert torch.equal(call(case, dropout=0.5), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": 3}, r"x: got 3, a int, wanted a float32, bfloat16 or float16 tensor \[..., d\]"),
        ({"x": torch.ones(2, 8).int()}, r"x: got int32 \[2, 8\], wanted a float32"),
        ({"x": torch.tensor(1.0)}, r"x: got float32 \[\], wanted a float32"),
        ({"down_weight": torch.ones(3, 7)}, r"down_weight: got float32 \[3, 7\], wanted .* tensor \[r, 8\]"),
        ({"down_weight": torch.ones(8)}, r"down_weight: got float32 \[8\], wanted .* tensor \[r, 8\]"),
        ({"down_weight": torch.ones(3, 8).bool()}, r"down_weight: got bool \[3, 8\], wanted"),
        ({"down_bias": torch.ones(4)}, r"down_bias: got float32 \[4\], wanted .* tensor \[3\] or None"),
        ({"down_bias": 0.0}, r"down_bias: got 0.0, a float, wanted"),
        ({"activation": "mish"}, "activation: got 'mish', wanted one of relu"),
        (
            {"layer_norm": 1e-5},
            "layer_norm: got 1e-05, a float, wanted None, or a tuple of a weight, a bias and an eps",
        ),
        (
            {"layer_norm": (torch.ones(3), None, 1e-5)},
            r"layer_norm: got float32 \[3\], wanted .* tensors \[8\] or None",
        ),
        ({"down_weight": torch.ones(3, 8, device="meta")}, "down_weight: got a tensor on meta, wanted one on cpu"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_arguments_of_a_bottleneck(change, message):
    arguments = {"x": torch.ones(2, 8), "down_weight": torch.ones(3, 8), "down_bias": torch.ones(3)} | change
    with pytest.raises(ValueError, match=message):
        bottleneck(**arguments)
