"""What `optimize` fuses where it is told to fuse only some layers, or not to fuse others."""

import copy

import pytest
import torch
from comparison import error
from decoding_models import quantised
from peft import LoraConfig, get_peft_model
from peft_models import randomize
from tiny_models import SAME_STEP, tiny

import peft_kernels
from peft_kernels import FAMILIES
from peft_kernels.integrations import registry
from peft_kernels.integrations.registry import FusedLayer
from peft_kernels.integrations.transformers.attention import NAME

TOKENS = torch.arange(12).view(2, 6)
WIDE = {"hidden": 128, "intermediate": 256}


@pytest.fixture
def model():
    return tiny("llama", **WIDE).eval()


@pytest.fixture
def adapted():
    """Layer 0 has a LoRA on 4-bit weights, layer 1 on dense ones."""
    model = tiny("llama", **WIDE)
    quantised(model.model.layers[0].mlp)
    model.is_loaded_in_4bit = True  # PEFT asks
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["gate_proj", "up_proj", "down_proj"]))
    randomize(model)
    return model.train()  # in inference bitsandbytes has a kernel that rounds more


def fused(model):
    return {name for name, module in model.named_modules() if isinstance(module, FusedLayer)}


def settings_of(model):
    return {setting.family for module in model.modules() for setting in registry.settings() if setting.is_set(module)}


def families(model):
    return {module.family for module in model.modules() if isinstance(module, FusedLayer)} | settings_of(model)


def assert_same(model, stock):
    assert error(model(TOKENS).logits, stock(TOKENS).logits) <= SAME_STEP


def test_the_families_are_those_of_the_layers(adapted):
    peft_kernels.optimize(adapted)
    assert families(adapted) <= {*FAMILIES}
    assert families(adapted) >= {
        "lora", "linear4bit", "attention", "rms_norm", "gated_mlp", "decoder_layer", "output_layer", "cross_entropy"
    }  # fmt: skip


@pytest.mark.parametrize("family", ["attention", "rms_norm", "gated_mlp", "decoder_layer", "output_layer",
                                    "cross_entropy"])  # fmt: skip
def test_a_family(family, model):
    whole, stock = copy.deepcopy(model), copy.deepcopy(model)
    peft_kernels.optimize(whole)
    report = peft_kernels.optimize(model, exclude=family)
    assert families(model) == families(whole) - {family}
    # An output layer is then a linear layer like any other.
    assert family == "output_layer" or any(f"{family!r} is excluded" in layer.reason for layer in report.left_alone)
    assert_same(model, stock)
    alone = copy.deepcopy(stock)
    peft_kernels.optimize(alone, only=[family])
    assert families(alone) == {family}
    assert_same(alone, stock)


def test_modules(model, monkeypatch):
    monkeypatch.setattr("peft_kernels.cpu.outruns_torch", lambda: False)  # dense layers are torch's
    stock = copy.deepcopy(model)
    report = peft_kernels.optimize(model, only="model.layers.1", exclude=["*.mlp", "model.layers.*.input_layernorm"])
    assert fused(model) == {
        "model.layers.1", "model.layers.1.self_attn", "model.layers.1.post_attention_layernorm"
    }  # fmt: skip
    reasons = {layer.name: layer.reason for layer in report}
    assert reasons["model.norm"] == "only 'model.layers.1' may be fused"
    assert reasons["model.layers.1.mlp"] == "'*.mlp' is excluded"
    assert reasons[""] == "its loss: only 'model.layers.1' may be fused"
    assert_same(model, stock)


def test_attention_that_is_left_alone_runs_as_stock(model, monkeypatch):
    stock = copy.deepcopy(model)
    peft_kernels.optimize(model, exclude=["model.layers.0.self_attn"])
    assert model.config._attn_implementation == NAME
    asked = []
    by_torch = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *a, **k: asked.append(1) or by_torch(*a, **k)
    )
    padding = torch.ones_like(TOKENS)
    padding[0, :2] = 0
    for mask in (None, padding):
        asked.clear()
        got = model(TOKENS, attention_mask=mask).logits
        assert len(asked) == 1
        wanted = stock(TOKENS, attention_mask=mask).logits
        if mask is not None:
            got, wanted = got[:, 2:], wanted[:, 2:]
        assert error(got, wanted) <= SAME_STEP
    assert torch.equal(*(m.generate(TOKENS, max_new_tokens=4, do_sample=False) for m in (model, stock)))


def test_parts_go_with_an_adapters_layer(adapted):
    stock = copy.deepcopy(adapted)
    peft_kernels.optimize(adapted, only="lora")
    mlp = "base_model.model.model.layers.{}.mlp.{}_proj"
    layers = {mlp.format(number, name) for number in (0, 1) for name in ("gate", "up", "down")}
    assert fused(adapted) >= layers and families(adapted) <= {"lora", "linear4bit", "linear", "dropout"}
    assert_same(adapted, stock)
    other = copy.deepcopy(stock)
    peft_kernels.optimize(other, exclude=["linear4bit", "linear"])
    assert fused(other) >= layers
    third = copy.deepcopy(stock)
    peft_kernels.optimize(third, exclude="lora")
    assert not families(third) & {"lora", "linear4bit", "dropout"}
    assert_same(third, stock)


def test_a_later_call_restores_what_it_excludes(model):
    stock = copy.deepcopy(model)
    peft_kernels.optimize(model)
    peft_kernels.optimize(model, only=["rms_norm", "lm_head"], exclude="model.norm")
    assert families(model) == {"rms_norm", "output_layer"} and "model.norm" not in fused(model)
    assert model.config._attn_implementation == "sdpa"
    assert_same(model, stock)
    peft_kernels.optimize(model)
    assert {"attention", "gated_mlp", "cross_entropy"} <= families(model)
    peft_kernels.restore(model)
    assert not families(model)


def test_environment(model, monkeypatch, caplog):
    monkeypatch.setenv("PEFT_KERNELS_ONLY", "rms_norm, attention")
    monkeypatch.setenv("PEFT_KERNELS_EXCLUDE", "model.norm,nothing.like.it")
    peft_kernels.optimize(model)
    assert families(model) == {"rms_norm", "attention"} and "model.norm" not in fused(model)
    assert "PEFT_KERNELS_EXCLUDE: got 'nothing.like.it'" in caplog.text
    peft_kernels.optimize(model, only="gated_mlp", exclude=())
    assert families(model) == {"gated_mlp"}


@pytest.mark.parametrize(
    ("switch", "error_type", "match"),
    [
        ({"exclude": "lorra"}, ValueError, "exclude: got 'lorra', wanted a module of the model, or a family: lora"),
        ({"only": ["attention", "*.mlpp"]}, ValueError, r"only: got '\*\.mlpp', wanted a module"),
        ({"only": 3}, TypeError, "only: got 3, wanted names of families or of modules"),
        ({"exclude": [torch.nn.Linear]}, TypeError, "exclude: got .*, wanted names"),
    ],
    ids=["family", "pattern", "number", "class"],
)
def test_bad_names(switch, error_type, match, model):
    with pytest.raises(error_type, match=match):
        peft_kernels.optimize(model, **switch)
    assert not families(model) and model.config._attn_implementation == "sdpa"


def test_nothing_may_be_fused(model):
    report = peft_kernels.optimize(model, only=())
    assert not families(model) and not report.fused
