"""PEFT's layers with DoRA, fused: results, dtypes, dropout, caching, and what is left to PEFT."""

import copy
import itertools

import pytest
import tolerances
import torch
from comparison import DTYPES, error, short
from peft import LoraConfig
from peft.helpers import DoraCaching
from peft_models import (
    IN_FEATURES,
    OUT_FEATURES,
    dense_weight,
    gradients,
    is_repacked,
    layer_of,
    linear4bit,
    lora_model,
    stock_path_reasons,
)
from torch import nn

import peft_kernels
from peft_kernels.ops import dora_norm
from peft_kernels.ops.dora_linear import dora_linear_unchecked
from peft_kernels.testing.reference.dora_linear import dora_linear as reference

KINDS = ("dense", "conv1d", "4bit")
FP32 = {"rtol": 1e-5, "atol": 1e-5}

pytestmark = pytest.mark.filterwarnings("ignore:Merge lora module", "ignore:Unmerge lora module")


def dora_model(kind, *args, **config):
    """With a magnitude that is not the norm."""
    model = lora_model(kind, *args, use_dora=True, **config)
    nn.init.uniform_(layer_of(model).lora_magnitude_vector["default"].weight, 0.5, 2)
    return model


def fused_dora(kind, *args, **config):
    model = dora_model(kind, *args, **config)
    assert all(row.fused for row in peft_kernels.accelerate(model))
    return model


def parts(layer, name="default"):
    """The arguments of `dora_linear` between bias and dropout."""
    weights = layer.lora_A[name].weight, layer.lora_B[name].weight, layer.lora_magnitude_vector[name].weight
    return *weights, layer.scaling[name]


def oracle(layer, x, name="default", **options):
    base = layer.get_base_layer()
    return reference(x, dense_weight(base), base.bias, *parts(layer, name), **options)


def reasons(*args, **kwargs):
    return [message.split(": ")[1] for message in stock_path_reasons(*args, **kwargs)]


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16], ids=short)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("kind", KINDS)
def test_exact_as_stock(kind, dtype, adapter_dtype):
    stock = dora_model(kind, dtype)
    for part in ("lora_A", "lora_B", "lora_magnitude_vector"):
        getattr(layer_of(stock), part).to(adapter_dtype)
    fused, true = copy.deepcopy(stock), copy.deepcopy(stock)
    assert all(row.fused for row in peft_kernels.accelerate(fused))
    layer_of(true).forward = lambda x: oracle(layer_of(true), x)
    x, grad = torch.randn(3, 11, IN_FEATURES, dtype=dtype), torch.randn(3, 11, OUT_FEATURES, dtype=dtype)
    for ours, theirs, want in zip(*(gradients(model, x, grad) for model in (fused, stock, true)), strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        assert error(ours, want) <= max(tolerances.VERSUS_STOCK * error(theirs, want), tolerances.FP32_SUM)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("kind", KINDS)
def test_result_dtype_is_stocks(kind, dtype):
    stock = dora_model(kind, dtype)
    fused = copy.deepcopy(stock)
    peft_kernels.accelerate(fused)
    for x_dtype, autocast in itertools.product(DTYPES, (None, torch.bfloat16, torch.float16)):
        x, results = torch.randn(3, IN_FEATURES, dtype=x_dtype), []
        for model in (stock, fused):
            with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None), torch.no_grad():
                try:
                    results.append(model(x))
                except RuntimeError as problem:
                    results.append(str(problem))
        want, got = results
        if isinstance(want, str):
            assert got == want
        else:
            assert got.dtype == want.dtype, (x_dtype, autocast)
            torch.testing.assert_close(got, want, rtol=0, atol=2**-6 * float(want.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_is_that_of_the_op(kind):
    model = fused_dora(kind, lora_dropout=0.3)
    layer, x = layer_of(model), torch.randn(6, IN_FEATURES)
    torch.manual_seed(5)
    y = model(x)
    torch.manual_seed(5)
    seed = torch.randint(torch.iinfo(torch.int64).max, (1,))
    torch.testing.assert_close(y, oracle(layer, x, dropout=0.3, seed=seed).float(), **FP32)
    torch.testing.assert_close(model.eval()(x), oracle(layer, x).float(), **FP32)


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("kind", KINDS)
def test_follows_what_is_trained(kind, rows):
    """Nothing of A, B or the magnitude is kept from one forward to the next."""
    model = fused_dora(kind).eval()
    layer, x = layer_of(model), torch.randn(rows, IN_FEATURES)
    for part in (None, "lora_A", "lora_B", "lora_magnitude_vector"):
        if part:
            getattr(layer, part)["default"].weight.data.mul_(1.5)  # which raises no version of the parameter
        with torch.no_grad():
            torch.testing.assert_close(model(x), oracle(layer, x).float(), **FP32)


def test_follows_a_4bit_weight_that_is_replaced():
    model = fused_dora("4bit")
    layer, x = layer_of(model), torch.randn(5, IN_FEATURES)
    model(x)
    layer.base_layer.weight = linear4bit().weight
    torch.testing.assert_close(model(x), oracle(layer, x).float(), **FP32)
    layer.base_layer.weight.data = torch.randint_like(layer.base_layer.weight.data, 256)
    torch.testing.assert_close(model(x), oracle(layer, x).float(), **FP32)


@pytest.mark.parametrize("kind", KINDS)
def test_caching_of_pefts(kind):
    model = fused_dora(kind).eval()
    layer, x = layer_of(model), torch.randn(5, IN_FEATURES)
    magnitude = layer.lora_magnitude_vector["default"]
    with torch.no_grad():
        want = model(x)
        with DoraCaching():
            assert torch.equal(model(x), want) and torch.equal(model(x), want)
            (norm,) = magnitude._dora_cache.values()
            torch.testing.assert_close(norm, dora_norm(dense_weight(layer.base_layer).float(), *parts(layer)[:2], 2.0))
            magnitude._dora_cache.update(dict.fromkeys(magnitude._dora_cache, 2 * norm))
            assert error(model(x), want) > 0.1
            model.train()(x)
            assert not magnitude._dora_cache
        assert torch.equal(model.eval()(x), want)


@pytest.mark.parametrize("kind", KINDS)
def test_beside_another_adapter_falls_through(kind, caplog):
    model = fused_dora(kind)
    layer, x = layer_of(model), torch.randn(3, IN_FEATURES)
    model.add_adapter("plain", LoraConfig(r=2, target_modules=["lin"]))
    assert reasons(model, caplog, x) == []
    model.base_model.set_adapter(["plain", "default"])
    assert reasons(model, caplog, x) == ["adapter 'default' is a DoraLinearVariant"]
    assert peft_kernels.accelerate(model).layers[0].reason == "adapter 'default' is a DoraLinearVariant"
    torch.testing.assert_close(model(x), oracle(layer, x).float(), rtol=1e-4, atol=1e-4)  # B of the other is zero
    layer._active_adapter = ["elsewhere", "default"]
    assert reasons(model, caplog, x) == []
    torch.testing.assert_close(model(x), oracle(layer, x).float(), **FP32)
    if kind == "4bit":
        assert not is_repacked(layer.base_layer)


def _hooked(layer, called):
    layer.lora_magnitude_vector["default"].register_forward_hook(lambda *_: called.append(1))


def _lora_bias(layer, called):
    layer.lora_B["default"].bias = nn.Parameter(torch.ones(OUT_FEATURES))


def _double(layer, called):
    layer.lora_magnitude_vector["default"].double()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_hooked, "adapter 'default' has hooks"),
        (_lora_bias, "adapter 'default' has lora_bias"),
        (_double, "adapter 'default' has a magnitude in torch.float64"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_left_to_peft(kind, change, reason, caplog):
    model, called = fused_dora(kind), []
    change(layer_of(model), called)
    assert peft_kernels.accelerate(model).layers[0].reason == reason
    assert reasons(model, caplog, torch.randn(3, IN_FEATURES)) == [reason]
    assert bool(called) == (change is _hooked)


@pytest.mark.parametrize("kind", KINDS)
def test_disabled_merged_and_restored(kind):
    model = fused_dora(kind).eval()
    layer, x = layer_of(model), torch.randn(3, IN_FEATURES)
    with torch.no_grad():
        want = model(x)
        with model.disable_adapter():
            torch.testing.assert_close(model(x), x @ dense_weight(layer.base_layer).float().T + layer.base_layer.bias)
        model.merge_adapter()
        assert error(model(x), want) < (0.2 if kind == "4bit" else 1e-5)
        model.unmerge_adapter()
        torch.testing.assert_close(model(x), want, **FP32)
        peft_kernels.restore(model.train())
        torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("kind", KINDS)
def test_compiles_into_one_graph(kind, grad):
    torch.compiler.reset()
    model = fused_dora(kind)
    compiled = torch.compile(layer_of(model), backend="aot_eager", fullgraph=True)
    x = torch.randn(20, IN_FEATURES)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(compiled(x), model(x), **FP32)


def test_the_op_is_what_runs(monkeypatch):
    calls = []
    monkeypatch.setattr(
        "peft_kernels.integrations.peft.lora.dora_linear_unchecked",
        lambda *args, **kwargs: calls.append(1) or dora_linear_unchecked(*args, **kwargs),
    )
    for kind in KINDS:
        fused_dora(kind)(torch.randn(2, IN_FEATURES))
    assert len(calls) == len(KINDS)
