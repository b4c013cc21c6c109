"""Merging and unmerging fused PEFT layers: PEFT's numbers when merged, the very weights from before when unmerged."""

import copy
import pickle

import pytest
import torch
from comparison import error
from peft import LoraConfig
from peft.tuners import lora
from peft_models import (
    IN_FEATURES,
    dense_weight,
    fused_model,
    is_repacked,
    layer_of,
    linear4bit,
    lora_model,
    oracle,
    randomize,
)
from torch import nn

import peft_kernels
from peft_kernels.testing.reference.lora_linear import lora_linear as reference

FP32 = {"rtol": 1e-5, "atol": 1e-5}

KINDS = ("dense", "conv1d", "4bit")

pytestmark = pytest.mark.filterwarnings(
    "ignore:Merge lora module", "ignore:Unmerge lora module", "ignore:Already following"
)


def names(value):
    return str(value).removeprefix("torch.")


@pytest.mark.parametrize("kind", KINDS)
def test_merging(kind):
    """A stock 4-bit layer that was evaluated before it is merged computes garbage: bitsandbytes had repacked it."""
    model = fused_model(kind).eval()
    layer, x = layer_of(model), torch.randn(4, IN_FEATURES)
    want = model(x)
    model.merge_adapter()
    merged = reference(x, dense_weight(layer.base_layer), layer.base_layer.bias).float()
    torch.testing.assert_close(model(x), merged, **FP32)
    assert error(model(x), want) < (0.2 if kind == "4bit" else 1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(model(x), want, **FP32)
    model.merge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(model(x), oracle(layer, x, ()).float(), **FP32)
    assert not layer.merged
    torch.testing.assert_close(model(x), want, **FP32)
    if kind == "4bit":
        assert not is_repacked(layer.base_layer)


def test_merging_computes_what_pefts_does():
    stock = lora_model("4bit")
    fused = copy.deepcopy(stock)
    peft_kernels.optimize(fused)
    for model in (stock, fused):
        model.merge_adapter()
    got, want = (layer_of(model).base_layer.state_dict() for model in (fused, stock))
    assert list(got) == list(want) and all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32], ids=names)
@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
@pytest.mark.parametrize("cycles", [1, 5])
def test_unmerging_4bit_is_exact(cycles, nested, storage):
    """PEFT's weight drifts with each cycle."""
    base = linear4bit(compress_statistics=nested, quant_storage=storage)
    model = fused_model("4bit", base=base)
    model.add_adapter("b", LoraConfig(r=2, target_modules=["lin"]))
    randomize(model)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    x = torch.randn(3, IN_FEATURES)
    want = model(x)
    for _ in range(cycles):
        model.merge_adapter(["default"])
        assert error(model(x), want) < 0.25
        model.merge_adapter(["b"])  # one after the other: what is put back must be what was there before the first
        model.to("cpu")
        model.unmerge_adapter()
        assert layer_of(model).merged_adapters == []
        assert torch.equal(model(x), want)
    after = base.state_dict()
    assert base.weight.bnb_quantized and base.quant_state is base.weight.quant_state
    assert list(after) == list(before)
    for name, value in before.items():
        assert torch.equal(value.view(-1).view(torch.uint8), after[name].view(-1).view(torch.uint8)), name


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copy_of_a_merged_layer_unmerges(copy_of):
    model = fused_model("4bit")
    x = torch.randn(3, IN_FEATURES)
    want = model(x)
    model.merge_adapter()
    other = copy_of(model)
    for each in (model, other):
        each.unmerge_adapter()
        assert torch.equal(each(x), want)


def test_unmerging_leaves_a_replaced_weight_to_peft():
    model = fused_model("4bit")
    layer = layer_of(model)
    model.merge_adapter()
    layer.base_layer.weight = linear4bit().weight
    want = dense_weight(layer.base_layer) - layer.get_delta_weight("default").double()
    model.unmerge_adapter()
    assert error(dense_weight(layer.base_layer), want) < 0.2


def test_adapter_merged_before_the_layer_was_fused():
    model = lora_model("4bit")
    model.add_adapter("b", LoraConfig(r=2, target_modules=["lin"]))
    original = dense_weight(layer_of(model).base_layer)
    model.merge_adapter()
    peft_kernels.optimize(model)
    model.merge_adapter(["b"])
    assert layer_of(model).merged_adapters == ["default", "b"]
    model.unmerge_adapter()
    assert layer_of(model).merged_adapters == []
    assert 0 < error(dense_weight(layer_of(model).base_layer), original) < 0.4  # PEFT's arithmetic


def test_merge_that_fails_halfway_changes_nothing():
    model = fused_model("4bit")
    model.add_adapter("bad", LoraConfig(r=2, target_modules=["lin"]))
    layer, x = layer_of(model), torch.randn(3, IN_FEATURES)
    want = model(x)
    nn.init.constant_(layer.lora_B["bad"].weight, float("nan"))
    with pytest.raises(ValueError, match="NaNs detected"):
        layer.merge(safe_merge=True, adapter_names=["default", "bad"])
    assert not layer.merged
    assert torch.equal(model(x), want)


@pytest.mark.parametrize("kind", KINDS)
def test_merge_and_unload(kind):
    model = fused_model(kind)
    x = torch.randn(3, IN_FEATURES)
    want = model(x)
    plain = model.merge_and_unload()
    assert not any(isinstance(module, lora.LoraLayer) for module in plain.modules())
    assert error(plain(x), want) < (0.2 if kind == "4bit" else 1e-5)


def test_unmerging_dora_on_4bit_puts_the_weight_back():
    model = lora_model("4bit", use_dora=True)
    peft_kernels.optimize(model)
    layer, x = layer_of(model), torch.randn(3, IN_FEATURES)
    want = model(x)
    model.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(model(x), want) and not layer.merged and not layer._caches


def test_lora_bias_is_merged_with_its_scaling():
    """PEFT's 4-bit layer forgets it."""
    model = lora_model("4bit", lora_bias=True)
    layer = layer_of(model)
    nn.init.ones_(layer.lora_B["default"].bias)
    peft_kernels.optimize(model)
    bias = layer.base_layer.bias.clone()
    model.merge_adapter()
    assert torch.equal(layer.base_layer.bias, bias + layer.scaling["default"])
    model.unmerge_adapter()
    assert torch.equal(layer.base_layer.bias, bias)
