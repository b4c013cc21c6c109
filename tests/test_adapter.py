"""The adapter family against the fp64 oracle and the eager chain: numerics, shapes, strides, every instruction set."""

import pytest
import tolerances
import torch
from adapter_cases import MODES, expected, make_case, run
from comparison import assert_close, short

from peft_kernels.ops import ACTIVATIONS

# (M, d, r): odd, in the middle of vectors, tiles and panels; several blocks of rows, several chunks of r.
SHAPES = [(1, 16, 1), (3, 17, 5), (33, 64, 16), (70, 100, 31), (130, 65, 64), (300, 96, 70), (9, 257, 130)]


def mode_id(mode):
    return "-".join(short(dtype) for dtype in mode)


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
def test_shapes(cpu_isa, shape, mode):
    check(make_case(*shape, *mode))


@pytest.mark.parametrize("mode", MODES[:3], ids=mode_id)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(cpu_isa, activation, mode):
    case = make_case(40, 48, 24, *mode, activation=activation)
    case.x *= 3  # some of σ's tails
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
def test_options(cpu_isa, options, mode):
    check(make_case(70, 72, 20, *mode, **OPTIONS[options]))
