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
    assert all(row.fused for row in peft_kernels.optimize(model))
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
    assert all(row.fused for row in peft_kernels.optimize(fused))
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
    peft_kernels.optimize(fused)
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


def several_doras(kind, dtype=torch.float32, **config):
    """Three active adapters, of which the last two are DoRAs; and a fourth."""
    stock = dora_model(kind, dtype, **config)
    for name, is_dora in (("plain", False), ("second", True), ("idle", False)):
        stock.add_adapter(name, LoraConfig(r=2, target_modules=["lin"], use_dora=is_dora, lora_bias=not is_dora))
    for name, parameter in stock.named_parameters():
        if "lora_B" in name or "lora_magnitude" in name:
            nn.init.uniform_(parameter, 0.2, 1.2)
    layer_of(stock).base_layer.support_avx512bf16_for_cpu = False  # else stock would round its statistics to bf16
    return stock


@pytest.mark.parametrize(
    "order", [["plain", "default"], ["default", "plain"], ["second", "plain", "default"]], ids="-".join
)
@pytest.mark.parametrize("kind", KINDS)
def test_beside_other_adapters(kind, order, caplog):
    """Each DoRA multiplies what comes before it, in the order in which the adapters are active."""
    stock = several_doras(kind)
    fused = copy.deepcopy(stock)
    for model in (stock, fused):
        model.base_model.set_adapter(order)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
    assert peft_kernels.optimize(fused).layers[0].fused
    x, grad = torch.randn(3, 7, IN_FEATURES), torch.randn(3, 7, OUT_FEATURES)
    assert reasons(fused, caplog, x) == []
    for got, want in zip(gradients(fused, x, grad), gradients(stock, x, grad), strict=True):
        assert (got is None) == (want is None)
        assert want is None or error(got, want) < 1e-5
    for model in (stock, fused):
        model.eval()
    for rows in (1, 40):
        with torch.no_grad():
            torch.testing.assert_close(
                fused(x.new_ones(rows, IN_FEATURES)), stock(x.new_ones(rows, IN_FEATURES)), **FP32
            )
    if kind == "4bit":
        assert not is_repacked(layer_of(fused).base_layer)


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_beside_another_adapter_falls_through(kind, caplog):
    model = fused_dora(kind, lora_dropout=0.1)
    layer, x = layer_of(model), torch.randn(3, IN_FEATURES)
    model.add_adapter("plain", LoraConfig(r=2, target_modules=["lin"]))
    assert reasons(model, caplog, x) == []
    model.base_model.set_adapter(["plain", "default"])
    reason = "adapter 'default' is a DoRA with dropout beside others"
    assert reasons(model, caplog, x) == [reason]
    assert peft_kernels.optimize(model).layers[0].reason == reason
    assert reasons(model.eval(), caplog, x) == []
    layer._active_adapter = ["elsewhere", "default"]
    assert reasons(model.train(), caplog, x) == []
    assert reasons(model.eval(), caplog, x) == []
    torch.testing.assert_close(model(x), oracle(layer, x).float(), **FP32)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_decodes_packed(dtype, monkeypatch):
    """Few rows in inference read W in 4 bits once, with the gains in its statistics; and see whatever is trained."""
    stock = dora_model("4bit", dtype).eval()
    layer_of(stock).base_layer.support_avx512bf16_for_cpu = False
    fused = copy.deepcopy(stock)
    peft_kernels.optimize(fused)
    layer, x = layer_of(fused), torch.randn(2, IN_FEATURES, dtype=dtype)
    with torch.no_grad():
        want = oracle(layer, x)
        assert error(fused(x), want) <= max(tolerances.VERSUS_STOCK * error(stock(x), want), tolerances.FP32_SUM)
        monkeypatch.setattr("peft_kernels.integrations.peft.lora.FusedLoRA._call", None)
        assert torch.equal(fused(x), fused(x)) and layer._packed is not None
        for part in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector):
            part["default"].weight.data.mul_(1.5)
            want = oracle(layer, x)
            assert error(fused(x), want) <= (1e-5 if dtype is torch.float32 else 0.02)


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
        (_lora_bias, "adapter 'default' is a DoRA with lora_bias"),
        (_double, "adapter 'default' has a magnitude in torch.float64"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_left_to_peft(kind, change, reason, caplog):
    model, called = fused_dora(kind), []
    change(layer_of(model), called)
    assert peft_kernels.optimize(model).layers[0].reason == reason
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
