"""Inputs, and what torch may do around a forward, that no fused operation has rules for: they take the stock path."""

import logging

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from peft_models import IN_FEATURES, OneLayer, linear4bit
from reports import missed
from tiny_models import tiny, tokens
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap

import peft_kernels
from peft_kernels.integrations import registry

MODELS = {
    "dense-lora": lambda: _peft(nn.Linear(IN_FEATURES, 8), LoraConfig(target_modules=["lin"], init_lora_weights=False)),
    "4bit-lora": lambda: _peft(linear4bit(), LoraConfig(target_modules=["lin"], init_lora_weights=False)),
    "dense-ia3": lambda: _peft(
        nn.Linear(IN_FEATURES, 8), IA3Config(target_modules=["lin"], feedforward_modules=[], init_ia3_weights=False)
    ),
    # Not on the input: bitsandbytes' own product can't take gradients of that in a transform either.
    "4bit-ia3": lambda: _peft(
        linear4bit(), IA3Config(target_modules=["lin"], feedforward_modules=[], init_ia3_weights=False)
    ),
}


def _peft(layer: nn.Module, config) -> nn.Module:
    return get_peft_model(OneLayer(layer), config)


def _trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _sum_of_squares(parameters, model, x):
    return functional_call(model, parameters, (x,)).square().sum()


def _gradients_of_each_row(model, x):
    each = vmap(grad(_sum_of_squares), in_dims=(None, None, 0))
    return list(each(_trained(model), model, x).values())


def _dual(model, x):
    with forward_ad.dual_level():
        return [forward_ad.unpack_dual(model(forward_ad.make_dual(x, torch.ones_like(x)))).tangent]


TRANSFORMS = {
    "grad": lambda model, x: list(grad(_sum_of_squares)(_trained(model), model, x).values()),
    "vmap-of-grad": _gradients_of_each_row,
    "vmap": lambda model, x: [vmap(model)(x)],
    "jvp": lambda model, x: list(jvp(model, (x,), (torch.ones_like(x),))),
    "forward-mode": _dual,
    "trace": lambda model, x: [torch.jit.trace(model, (x,), check_trace=False)(2 * x)],
    "sparse": lambda model, x: [model(x.to_sparse())],
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("kind", MODELS)
def test_takes_the_stock_path(kind, transform):
    model, x = MODELS[kind](), torch.randn(3, IN_FEATURES)  # in training mode: no weight is repacked
    wanted = TRANSFORMS[transform](model, x)
    assert all(row.fused for row in peft_kernels.optimize(model))
    actual = TRANSFORMS[transform](model, x)
    torch.testing.assert_close(actual, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("kind", MODELS)
def test_no_tensor_raises_what_stock_raises(kind, caplog):
    model = MODELS[kind]()
    with pytest.raises((TypeError, AttributeError)) as wanted:
        model(None)
    peft_kernels.optimize(model)
    registry._logged.clear()
    with caplog.at_level(logging.WARNING, "peft_kernels"), pytest.raises(wanted.type) as actual:
        model(None)
    assert str(actual.value) == str(wanted.value)
    assert caplog.messages[0].endswith("x is a NoneType")


def test_language_model_in_a_transform():
    model = tiny("llama")
    ids, _ = tokens()

    def loss(parameters):
        return functional_call(model, parameters, (), {"input_ids": ids, "labels": ids, "use_cache": False}).loss

    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    wanted = grad(loss)(parameters)
    assert not missed(peft_kernels.optimize(model))
    torch.testing.assert_close(grad(loss)(parameters), wanted)
