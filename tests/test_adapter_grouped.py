"""Batches in which each example names its adapter."""

from dataclasses import replace

import pytest
import tolerances
import torch
from adapter_cases import make_case
from comparison import DTYPES, assert_close, short

from peft_kernels.ops import AdapterWeights, adapter, adapter_grouped
from peft_kernels.testing.reference.adapter import adapter_grouped as oracle

pytestmark = pytest.mark.kernels

RANKS = (8, 5, 33)
FIELDS = ("down_weight", "down_bias", "up_weight", "up_bias", "scale")


def make_adapters(d, dtype, norm=False):
    cases = [make_case(1, d, r, dtype, dtype, scale="learned", norm=norm) for r in RANKS]
    weights = [{name: getattr(case, name) for name in FIELDS} for case in cases]
    for case, arguments in zip(cases, weights, strict=True):
        if norm:
            arguments |= {"norm_weight": case.norm_weight, "norm_bias": case.norm_bias}
    return weights


def run(x, weights, index, grad_y, function, as_weights=AdapterWeights, **options):
    x = x.detach().clone().requires_grad_()
    leaves = [{name: t.detach().clone().requires_grad_() for name, t in each.items()} for each in weights]
    adapters = []
    for each in leaves:
        norm = (each["norm_weight"], each["norm_bias"], 1e-5) if "norm_weight" in each else None
        adapters.append(as_weights(**{name: each[name] for name in FIELDS}, layer_norm=norm))
    y = function(x, adapters, index, residual=x, **options)
    y.backward(grad_y.to(y.dtype))
    return {"y": y.detach(), "x": x.grad} | {
        f"{name}{i}": t.grad for i, each in enumerate(leaves) for name, t in each.items()
    }


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize(
    "index", [[0, 0, 1, 1, 2, 2], [2, 0, 1, 0, -1, 2], [1, 1, 1, 1, 1, 1], [-1, -1, 0, -1, 2, -1]], ids=str
)
def test_against_reference(backend, index, dtype, norm):
    torch.manual_seed(2)
    x, grad_y = torch.randn(6, 11, 40).to(dtype), torch.randn(6, 11, 40).to(dtype)
    weights = make_adapters(40, dtype, norm)
    options = {"activation": "silu", "dropout": 0.2, "seed": torch.tensor([9])}
    actual = run(x, weights, index, grad_y, adapter_grouped, **options)
    double = [{name: tensor.double() for name, tensor in each.items()} for each in weights]
    wanted = run(x.double(), double, index, grad_y.double(), oracle, dict, **options)
    for name, value in wanted.items():
        if name.startswith("scale"):  # one number, which cancels
            continue
        tolerance = 1.5 * tolerances.product(dtype, dtype)
        assert_close(actual[name], torch.zeros_like(actual[name]) if value is None else value, tolerance, name)


def test_index_as_tensor_and_one_adapter_alone(platform):
    case = make_case(40, 24, 8)
    x = case.x.view(4, 10, 24)
    weights = AdapterWeights(case.down_weight, case.down_bias, case.up_weight, case.up_bias)
    wanted = adapter(x, case.down_weight, case.down_bias, case.up_weight, case.up_bias, residual=x)
    assert torch.equal(adapter_grouped(x, [weights], torch.zeros(4, dtype=torch.int64), residual=x), wanted)
    assert not adapter_grouped(x, [weights], [-1] * 4).any()
    assert torch.equal(adapter_grouped(x, [weights], [-1] * 4, residual=x), x)


def test_rows_are_independent_of_their_batch(platform):
    # What an example gets does not depend on who is beside it, to the last bit.
    case = make_case(64, 48, 16, torch.bfloat16, torch.bfloat16)
    x = case.x.view(8, 8, 48)
    one = AdapterWeights(case.down_weight, case.down_bias, case.up_weight, case.up_bias)
    other = replace(one, scale=0.25)
    mixed = adapter_grouped(x, [one, other], [0, 1, 1, 0, -1, 0, 0, 1], residual=x)
    for i, name in enumerate([0, 1, 1, 0, -1, 0, 0, 1]):
        assert torch.equal(mixed[i], adapter_grouped(x[i : i + 1], [one, other], [name], residual=x[i : i + 1])[0])


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ([0, 1], r"index: got 2 items, wanted one for each x\[i\]; x is float32 \[3, 8, 16\]"),
        ([0, 3, 0], "index: got 3, wanted the position of one of 2 adapters, or -1"),
        ([0, -2, 0], "index: got -2, wanted the position"),
        (0, r"index: got 0, a int, wanted a position for each x\[i\]"),
        (torch.tensor(0), "index: got 0, a int"),
    ],
    ids=str,
)
def test_bad_index(index, message):
    x, weights = torch.randn(3, 8, 16), make_adapters(16, torch.float32)[:2]
    with pytest.raises(ValueError, match=message):
        adapter_grouped(x, [AdapterWeights(**each) for each in weights], index)


def test_bad_adapters():
    x = torch.randn(3, 8, 16)
    plain, normed = (AdapterWeights(*(make_adapters(16, torch.float32)[0][name] for name in FIELDS)) for _ in "ab")
    with pytest.raises(ValueError, match="adapters: got none, wanted at least one AdapterWeights"):
        adapter_grouped(x, [], [0, 0, 0])
    with pytest.raises(ValueError, match="adapters: got a AdapterWeights, wanted a sequence of AdapterWeights"):
        adapter_grouped(x, plain, [0, 0, 0])
    with pytest.raises(ValueError, match="layer_norm: got some adapters with one and some without"):
        adapter_grouped(x, [plain, replace(normed, layer_norm=(None, None, 1e-5))], [0, 1, 0])
