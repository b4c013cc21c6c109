"""Forward-mode and second derivatives of every function and every layer: right, or refused, but never left out."""

import inspect

import pytest
import torch
from op_cases import ARGUMENTS, LAYERS, VARIANTS, make_case
from torch.autograd import forward_ad

from peft_kernels import nn, ops

# What is documented as a constant.
CONSTANT = {
    "combine", "combine of the largest", "combine_products", "dequantize_4bit", "dequantize_4bit_rows", "dora_norm",
    "dora_norm of NF4", "quantize_4bit",
}  # fmt: skip
CASES = [*ARGUMENTS, *VARIANTS, *LAYERS]
DIFFERENTIABLE = [name for name in CASES if name not in CONSTANT]
# The tolerance for differences of results in fp32 with this step, which is relative to the size of the tensor.
STEP, TOLERANCE = 3e-3, 1e-2
REFUSAL = "forward-mode differentiation|autograd.Function|jvp"


def test_no_function_and_no_layer_is_forgotten():
    functions = {name for name in ops.__all__ if inspect.isfunction(getattr(ops, name))}
    assert functions == set(ARGUMENTS)
    assert set(nn.__all__) == {name.split()[0] for name in LAYERS}
    for name, make in ARGUMENTS.items():
        assert set(make()) == set(inspect.signature(getattr(ops, name)).parameters), name


def direction_for(x):
    direction = torch.randn_like(x)
    return direction * (x.norm() / direction.norm())


def numeric(function, x, direction):
    """The derivative of a tuple of tensors in a direction, by a central difference."""
    with torch.no_grad():
        above, below = (function(x + step * direction) for step in (STEP, -STEP))
    return [(a.double() - b.double()) / (2 * STEP) for a, b in zip(above, below, strict=True)]


def is_close(tangent, wanted):
    if tangent is None:
        tangent = torch.zeros_like(wanted)
    return (tangent.double() - wanted).norm() <= TOLERANCE * wanted.norm() + 1e-3


def check_tangents(tangents, function, x, direction):
    for tangent, wanted in zip(tangents, numeric(function, x, direction), strict=True):
        assert is_close(tangent, wanted), "a tangent was left out"


def refuses(call):
    """Whether it refuses; its result is kept as an attribute."""
    try:
        refuses.result = call()
    except (NotImplementedError, RuntimeError) as error:
        assert any(part in str(error) for part in REFUSAL.split("|")), error
        return True
    return False


@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_tangents_are_right_or_refused(name, trains):
    case = make_case(name)
    for path, x in case.floats().items():
        direction = direction_for(x)

        def function(value, path=path):
            return case({path: value})

        def dual(x=x, direction=direction, function=function):
            with forward_ad.dual_level():
                leaf = x.clone().requires_grad_(trains)
                return [forward_ad.unpack_dual(y).tangent for y in function(forward_ad.make_dual(leaf, direction))]

        if (not trains or not _refuses_gradients(case, path)) and not refuses(dual):
            check_tangents(refuses.result, function, x, direction)


def _refuses_gradients(case, path):
    try:
        case({path: case.floats()[path].requires_grad_()})
    except ValueError as error:
        assert "requires a gradient" in str(error)
        return True
    finally:
        case.floats()[path].requires_grad_(False)
    return False


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_torch_func_jvp_is_right_or_refused(name):
    case = make_case(name)
    for path, x in case.floats().items():
        direction = direction_for(x)

        def function(value, path=path):
            return case({path: value})

        if not refuses(lambda x=x, v=direction, f=function: torch.func.jvp(f, (x,), (v,))[1]):
            check_tangents(refuses.result, function, x, direction)


@pytest.mark.parametrize("name", ["lora_linear of NF4", "glu", "rotary"])
def test_nested_jvp_is_refused(name):
    case = make_case(name)
    path, x = next(iter(case.floats().items()))

    def outer(value):
        inner = torch.func.jvp(lambda z: case({path: value * 1})[0].sum() * z, (torch.ones(()),), (torch.ones(()),))
        return inner[1]

    assert refuses(lambda: torch.func.jvp(outer, (x,), (torch.ones_like(x),)))


@pytest.mark.parametrize("name", ["lora_linear of NF4", "adapter", "linear", "cross_entropy"])
def test_without_tangents_a_level_changes_nothing(name):
    case = make_case(name)
    wanted = case({})
    with forward_ad.dual_level():
        for got, want in zip(case({}), wanted, strict=True):
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", ["dora_norm", "dora_norm of NF4"])
def test_dora_norm_is_a_constant_to_tangents_too(name):
    case = make_case(name)
    with forward_ad.dual_level():
        duals = {path: forward_ad.make_dual(x, torch.ones_like(x)) for path, x in case.floats().items()}
        assert all(forward_ad.unpack_dual(y).tangent is None for y in case(duals))


@pytest.mark.parametrize("summed", [True, False], ids=["constant", "differentiable"])
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_second_derivatives_are_right_or_refused(name, summed):
    """Of each gradient with regard to each tensor, where only the two are trained, and where all are."""
    case = make_case(name)
    paths = [path for path in case.floats() if not _refuses_gradients(case, path)]
    for first in paths:
        _check_second_derivative(case, first, paths[0], paths, summed)
        for second in paths:
            _check_second_derivative(case, first, second, {first, second}, summed)


def _loss(ys, summed):
    # A square hands down a gradient that depends on y, a sum one that does not.
    return sum(y.float().sum() if summed else y.float().square().sum() for y in ys)


def _check_second_derivative(case, first, second, trained, summed):
    values = case.floats()
    weights = torch.randn_like(values[first])

    def first_derivative(value=None):
        leaves = {path: values[path].clone().requires_grad_() for path in trained}
        if value is not None:
            leaves[second] = value.clone().requires_grad_()
        with torch.enable_grad():
            loss = _loss(case(leaves), summed)
            grad = None
            if loss.requires_grad:
                (grad,) = torch.autograd.grad(loss, leaves[first], create_graph=value is None, allow_unused=True)
        return leaves, torch.zeros(()) if grad is None else (grad * weights).sum()

    leaves, penalty = first_derivative()
    direction = direction_for(values[second])
    (wanted,) = numeric(lambda value: (first_derivative(value)[1],), values[second], direction)
    if not penalty.requires_grad:
        got = torch.zeros(())
    else:
        try:
            (grad,) = torch.autograd.grad(penalty, leaves[second], allow_unused=True)
        except RuntimeError as error:
            assert "differentiate twice" in str(error), error
            return
        got = torch.zeros(()) if grad is None else (grad * direction).sum()
    scale = float(weights.norm() * direction.norm())
    assert abs(got.double() - wanted) <= TOLERANCE * abs(wanted) + 1e-3 * scale, (first, second)
