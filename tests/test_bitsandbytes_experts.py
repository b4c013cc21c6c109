"""Mixtures whose stacks of experts bitsandbytes keeps in 4 bits, behind a parametrization, with LoRA and without.

Stock dequantises a whole stack. PEFT then adds its adapters, but does not take its own parametrization off again, so
that a second forward fails; here results are compared with those of the dequantised stacks.
"""

import copy

import pytest
import torch
from bitsandbytes.nn.parametrize import (
    Bnb4bitParametrization,
    replace_parameter_4bit,
    replace_parameter_4bit_prequantized,
)
from comparison import Made, error
from moe_models import CONFIGS, differentiate, experts_layer, experts_of, inputs_of, routed, tiny_moe, token_ids
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import ParamWrapper
from peft_models import stock_path_reasons
from tolerances import FP32_SUM
from torch import nn
from torch.nn.utils import parametrize

import peft_kernels
from peft_kernels.ops import NF4Weight

MIXTRAL = "mixtral:MixtralExperts"
STACKS = ("gate_up_proj", "up_proj", "down_proj", "weight")
# Whose lines, flags and gates differ.
LAYERS = [
    MIXTRAL, "gpt_oss:GptOssExperts", "aria:AriaExperts", "nemotron_h:NemotronHExperts", "llama4:Llama4TextExperts",
    "jetmoe:JetMoeParallelExperts",
]  # fmt: skip


def quantise(layer, **options):
    """Puts the stacks of a layer into 4 bits, in place."""
    for name in [name for name in STACKS if name in layer._parameters]:
        replace_parameter_4bit(layer, name, **({"compress_statistics": True} | options))
    return layer


def dequantised(layer):
    """A dense copy of a layer in 4 bits.

    The values are this package's: bitsandbytes' CPU kernel takes the statistics of other blocks where a row has no
    whole number of them.
    """
    stock = type(layer).__bases__[0]  # torch's copies share the parametrised class, which none may take apart
    dense = stock.__new__(stock)
    vars(dense).update(copy.deepcopy(vars(layer)))
    for hooks in ("_forward_hooks", "_forward_pre_hooks", "_state_dict_hooks"):
        vars(dense)[hooks].clear()
    for name, found in dense._modules.pop("parametrizations").items():
        value = NF4Weight.from_quant_state(found.original, found[0].quant_state).dequantize()
        dense.register_parameter(name, nn.Parameter(value, requires_grad=False))
    return dense


def fuse(model):
    report = peft_kernels.optimize(model)
    layers = [layer for layer in report if layer.kind == "peft.ParamWrapper" or layer.kind.endswith("Experts")]
    assert layers and all(layer.fused for layer in layers), layers
    return model


def assert_close(actual, wanted, tolerance=FP32_SUM):
    for name, value in wanted.items():
        key = name.replace("base_layer.", "")
        assert error({k.replace("base_layer.", ""): v for k, v in actual.items()}[key], value) <= tolerance, name


def on_stacks(layer, names=None, seed=1):
    """LoRA on the stacks of a layer, the same one whether they are in 4 bits."""
    model = nn.Module()
    model.experts = layer
    names = names or [name for name in STACKS if hasattr(layer, name)]
    config = LoraConfig(r=3, lora_alpha=5, target_modules=[], target_parameters=[f"experts.{name}" for name in names])
    model = get_peft_model(model, config).get_base_model().experts
    generator = torch.Generator().manual_seed(seed)
    for wrapper in sorted(
        (each for each in model.modules() if isinstance(each, ParamWrapper)), key=lambda w: w.parameter_name
    ):
        for part in (wrapper.lora_A, wrapper.lora_B):
            weight = part["default"].weight
            weight.data = 0.2 * torch.randn(weight.shape, generator=generator)
    return model


def adapter_gradients(results, layer):
    """By the name of the parameter that is adapted: PEFT nests its wrappers in another order on parametrised layers."""
    found = {name: value for name, value in results.items() if "lora_" not in name}
    for prefix, module in layer.named_modules():
        if isinstance(module, ParamWrapper):
            for part in ("lora_A", "lora_B"):
                key = ".".join(filter(None, (prefix, part, "default.weight")))
                found[f"{module.parameter_name}.{part}"] = results[key]
    return found


@pytest.mark.parametrize("options", [{}, {"quant_type": "fp4", "blocksize": 32}, {"compress_statistics": False}])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_compute_what_stock_does(name, options):
    layer = quantise(experts_layer(name), **options)
    inputs = inputs_of(layer)
    wanted = differentiate(layer, inputs)
    assert_close(differentiate(fuse(layer), inputs), wanted)


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm", "eager"])
def test_blocks_that_straddle_rows_and_experts(implementation, monkeypatch):
    for name, value in (("HIDDEN", 40), ("INTERMEDIATE", 36)):
        monkeypatch.setattr(f"moe_models.{name}", value)
    layer = quantise(experts_layer(MIXTRAL, implementation), blocksize=256)
    assert layer.gate_up_proj.shape[1:].numel() % 256 and layer.gate_up_proj.shape[2] % 64
    inputs = routed()
    wanted = differentiate(dequantised(layer), inputs)
    assert_close(
        differentiate(fuse(layer), inputs),
        {"y": wanted["y"], "input 0": wanted["input 0"], "input 2": wanted["input 2"]},
    )


@pytest.mark.parametrize("names", [None, ["gate_up_proj"], ["down_proj"]], ids=["both", "gate_up", "down"])
@pytest.mark.parametrize("name", [MIXTRAL, "gpt_oss:GptOssExperts", "llama4:Llama4TextExperts"])
def test_lora_on_4bit_stacks(name, names):
    layer = quantise(experts_layer(name))
    inputs = inputs_of(layer)
    dense, adapted = on_stacks(dequantised(layer), names), fuse(on_stacks(layer, names))
    wanted = adapter_gradients(differentiate(dense, inputs), dense)
    for _ in range(2):
        actual = adapter_gradients(differentiate(adapted, inputs), adapted)
        for key in wanted:
            if "base_layer" not in key:
                assert error(actual[key], wanted[key]) <= FP32_SUM, key


@pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
def test_no_dense_stack_is_made(lora):
    layer = quantise(experts_layer(MIXTRAL))
    numel = layer.down_proj.numel()
    model = fuse(on_stacks(layer) if lora else layer)
    x, index, weights = routed()
    with Made() as made:
        model(x.requires_grad_(), index, weights).sum().backward()
    # Codes are bytes of two elements each.
    assert max(tensor.numel() for tensor in made.tensors) < numel // 2


def test_language_model():
    model = tiny_moe("qwen3_moe")
    for layer in experts_of(model):
        quantise(layer)
    model.requires_grad_(False)
    names = [name for name, module in model.named_modules() if "parametrizations" in module._modules]
    stacks = [f"{name}.{stack}" for name in names for stack in ("gate_up_proj", "down_proj")]
    ids = token_ids()
    dense = copy.deepcopy(model)
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(dense.get_submodule(parent), child, dequantised(dense.get_submodule(name)))
    config = {"r": 3, "target_modules": [], "init_lora_weights": False}
    adapted = get_peft_model(model, LoraConfig(**config, target_parameters=stacks))
    stock = get_peft_model(dense, LoraConfig(**config, target_parameters=["experts.gate_up_proj", "experts.down_proj"]))

    def wrappers(model):
        found = {
            name.replace(".base_layer", ""): {}
            for name, each in model.named_modules()
            if isinstance(each, ParamWrapper)
        }
        for name, each in model.named_modules():
            if isinstance(each, ParamWrapper):
                found[name.replace(".base_layer", "")][each.parameter_name] = each
        return found

    for name, layers in wrappers(stock).items():
        for stack, wrapper in layers.items():
            other = wrappers(adapted)[name][stack]
            other.lora_A.load_state_dict(wrapper.lora_A.state_dict())
            other.lora_B.load_state_dict(wrapper.lora_B.state_dict())
    wanted = stock(ids, labels=ids)
    wanted.loss.backward()
    actual = fuse(adapted)(ids, labels=ids)
    actual.loss.backward()
    assert error(actual.logits, wanted.logits) <= 1e-5
    for name, layers in wrappers(stock).items():
        for stack, wrapper in layers.items():
            other = wrappers(adapted)[name][stack]
            for part in ("lora_A", "lora_B"):
                grads = (getattr(each, part)["default"].weight.grad for each in (other, wrapper))
                assert error(*grads) <= 1e-4, (name, stack, part)
    prompt = ids[:1, :4]
    with torch.no_grad():
        tokens = [each.generate(input_ids=prompt, max_new_tokens=6, do_sample=False) for each in (adapted, stock)]
    assert torch.equal(*tokens)


def test_state_dict_and_restore():
    layer = quantise(experts_layer(MIXTRAL))
    cls, before, attributes = type(layer), layer.state_dict(), set(vars(layer))
    fuse(layer)
    layer(*routed())
    assert before.keys() == layer.state_dict().keys() and type(layer).__name__ == cls.__name__
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())
    peft_kernels.restore(layer)
    assert type(layer) is cls and set(vars(layer)) == attributes
    for name in ("down_proj", "gate_up_proj"):
        parametrize.remove_parametrizations(layer, name, leave_parametrized=False)
    assert type(layer) is cls.__bases__[0]


def test_loaded_from_a_checkpoint():
    layer = quantise(experts_layer(MIXTRAL))
    saved = layer.state_dict()
    loaded = experts_layer(MIXTRAL)
    for name in ("gate_up_proj", "down_proj"):
        state = {key.removeprefix(f"{name}."): value for key, value in saved.items() if key.startswith(f"{name}.")}
        loaded._parameters[name] = nn.Parameter(saved[name], requires_grad=False)
        replace_parameter_4bit_prequantized(loaded, name, state, "cpu")
    inputs = routed()
    assert torch.equal(fuse(loaded)(*inputs), fuse(layer)(*inputs))


def test_quantised_after_it_was_fused():
    layer = fuse(experts_layer(MIXTRAL))
    quantise(layer)
    inputs = routed()
    wanted = differentiate(dequantised(layer), inputs)
    fuse(layer)
    with Made() as made:
        actual = differentiate(layer, inputs)
    assert error(actual["y"], wanted["y"]) <= FP32_SUM and error(actual["input 0"], wanted["input 0"]) <= FP32_SUM
    assert max(tensor.numel() for tensor in made.tensors) < layer.parametrizations.down_proj.original.numel()
    peft_kernels.restore(layer)
    assert torch.allclose(layer(*inputs), wanted["y"], atol=1e-4)


def test_one_stack_in_4_bits():
    layer = experts_layer(MIXTRAL)
    replace_parameter_4bit(layer, "down_proj")
    inputs = routed()
    wanted = differentiate(layer, inputs)
    assert_close(differentiate(fuse(layer), inputs), wanted)


def test_copies_are_fused():
    layer = fuse(quantise(experts_layer(MIXTRAL)))
    copied, inputs = copy.deepcopy(layer), routed()
    assert type(copied) is type(layer) and torch.equal(copied(*inputs), layer(*inputs))
    peft_kernels.restore(copied)
    assert fuse(layer)(*inputs).isfinite().all()


def test_further_parametrizations_are_left_to_stock(caplog):
    layer = quantise(experts_layer(MIXTRAL))
    parametrize.register_parametrization(layer, "down_proj", nn.Tanh(), unsafe=True)
    inputs = routed()
    wanted = layer(*inputs)
    assert peft_kernels.optimize(layer).layers[0].reason == "its down_proj has a parametrization"
    assert torch.equal(layer(*inputs), wanted)
    assert "its down_proj has a parametrization" in stock_path_reasons(layer, caplog, *inputs)[0]


def test_statistics_that_do_not_fit():
    layer = quantise(experts_layer(MIXTRAL), compress_statistics=False)
    state = layer.parametrizations.down_proj[0].quant_state
    state.absmax = state.absmax.to("meta")  # as .to() leaves them behind when it moves the codes
    assert "its down_proj: quant_state.absmax" in peft_kernels.optimize(layer).layers[0].reason


def test_hooks_of_the_users_are_called(caplog):
    layer = quantise(experts_layer(MIXTRAL))
    model, seen = on_stacks(layer), []
    layer.register_forward_hook(lambda *_: seen.append(1))
    reasons = {row.reason for row in peft_kernels.optimize(model) if row.kind == "peft.ParamWrapper"}
    assert reasons == {"its base layer has hooks"}
    with torch.no_grad():
        model(*routed())
    assert seen == [1]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant):
    model = fuse(on_stacks(quantise(experts_layer(MIXTRAL))))
    x, index, weights = routed()
    wanted = differentiate(model, (x, index, weights))
    model.zero_grad()
    x.requires_grad_()
    y = torch.utils.checkpoint.checkpoint(model, x, index, weights, use_reentrant=use_reentrant)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(3)))
    assert torch.equal(x.grad, wanted["input 0"])
    assert parametrize._cache_enabled == 0


def test_sizes_are_those_that_the_tests_rely_on():
    layer = quantise(experts_layer(MIXTRAL))
    assert type(layer.parametrizations.down_proj[0]) is Bnb4bitParametrization
    assert set(CONFIGS) >= {"mixtral", "gpt_oss"}
