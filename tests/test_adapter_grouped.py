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


def run(x, weights, index, grad_y, function, as_weights=AdapterWeights, shared=None, **options):
    """y and every gradient, by name. `shared` are tensors of all adapters: `gate`, `post_weight` and `post_bias`, and
    `residual`, which is x without it, and may be None."""
    x = x.detach().clone().requires_grad_()
    leaves = [{name: t.detach().clone().requires_grad_() for name, t in each.items()} for each in weights]
    shared = {name: t if t is None else t.detach().clone().requires_grad_() for name, t in (shared or {}).items()}
    adapters = []
    for each in leaves:
        norm = (each["norm_weight"], each["norm_bias"], 1e-5) if "norm_weight" in each else None
        adapters.append(as_weights(**{name: each[name] for name in FIELDS}, layer_norm=norm))
    if "post_weight" in shared:
        options |= {"post_layer_norm": (shared["post_weight"], shared["post_bias"], 1e-5)}
    y = function(x, adapters, index, residual=shared.get("residual", x), gate=shared.get("gate"), **options)
    y.backward(grad_y.to(y.dtype))
    return (
        {"y": y.detach(), "x": x.grad}
        | {name: t.grad for name, t in shared.items() if t is not None}
        | {f"{name}{i}": t.grad for i, each in enumerate(leaves) for name, t in each.items()}
    )


def check(x, weights, index, grad_y, shared=None, **options):
    actual = run(x, weights, index, grad_y, adapter_grouped, shared=shared, **options)
    double = [{name: tensor.double() for name, tensor in each.items()} for each in weights]
    shared = {name: t if t is None else t.double() for name, t in (shared or {}).items()}
    wanted = run(x.double(), double, index, grad_y.double(), oracle, dict, shared, **options)
    for name, value in wanted.items():
        if value is None:  # of nothing that y was made of
            assert actual[name] is None or not actual[name].any(), name
        elif not name.startswith("scale"):  # one number, which cancels
            assert_close(actual[name], value, 1.5 * tolerances.product(x.dtype, x.dtype), name)
    return actual


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize(
    "index", [[0, 0, 1, 1, 2, 2], [2, 0, 1, 0, -1, 2], [1, 1, 1, 1, 1, 1], [-1, -1, 0, -1, 2, -1]], ids=str
)
def test_against_reference(backend, index, dtype, norm):
    torch.manual_seed(2)
    x, grad_y = torch.randn(6, 11, 40).to(dtype), torch.randn(6, 11, 40).to(dtype)
    weights = make_adapters(40, dtype, norm)
    check(x, weights, index, grad_y, activation="silu", dropout=0.2, seed=torch.tensor([9]))


def make_post_norm(d, dtype):
    return {"post_weight": (1 + 0.3 * torch.randn(d)).to(dtype), "post_bias": (0.3 * torch.randn(d)).to(dtype)}


# The first without rows of one adapter.
INDICES_WITH_NONE = [[-1, 0, 2, 0, -1, -1], [1, -1, 0, 2, 2, 2], [-1] * 6]


@pytest.mark.parametrize("norms", ["none", "before", "after", "both"])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("index", INDICES_WITH_NONE, ids=str)
def test_rows_of_no_adapter_are_the_residual(backend, index, dtype, norms):
    """No LayerNorm is theirs: a base example gets beside others what it gets from the base model."""
    x, grad_y = torch.randn(6, 11, 40).to(dtype), torch.randn(6, 11, 40).to(dtype)
    weights = make_adapters(40, dtype, norms in ("before", "both"))
    actual = check(x, weights, index, grad_y, make_post_norm(40, dtype) if norms in ("after", "both") else {})
    none = torch.tensor(index) < 0
    assert torch.equal(actual["y"][none], x[none]) and torch.equal(actual["x"][none], grad_y[none])


@pytest.mark.parametrize("post", [False, True], ids=["plain", "after"])
@pytest.mark.parametrize("residual", ["x", "given", "none"])
@pytest.mark.parametrize("index", INDICES_WITH_NONE, ids=str)
def test_rows_of_no_adapter_with_every_option(backend, index, residual, post):
    x, grad_y, added = torch.randn(3, 6, 11, 40)
    shared = {"x": {}, "given": {"residual": added}, "none": {"residual": None}}[residual]
    if residual != "none" or not post:  # else the LayerNorm undoes the gate, whose gradient cancels
        shared |= {"gate": torch.rand(6, 11, 1)}
    shared |= make_post_norm(40, x.dtype) if post else {}
    options = {"activation": "silu", "dropout": 0.2, "seed": torch.tensor([9])}
    actual = check(x, make_adapters(40, x.dtype, norm=True), index, grad_y, shared, **options)
    none = torch.tensor(index) < 0
    wanted = {"x": x, "given": added, "none": torch.zeros_like(x)}[residual]
    assert torch.equal(actual["y"][none], wanted[none])


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
