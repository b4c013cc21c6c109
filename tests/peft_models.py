"""Small models with PEFT's and bitsandbytes' layers, and the error of a layer against the fp64 oracle."""

import logging

import torch
from optional import if_installed
from torch import Tensor, nn

import peft_kernels
from peft_kernels.integrations import registry
from peft_kernels.ops.nf4 import NF4Weight
from peft_kernels.testing.reference.lora_linear import lora_linear as reference

bnb, peft, pytorch_utils = map(if_installed, ("bitsandbytes", "peft", "transformers.pytorch_utils"))

IN_FEATURES, OUT_FEATURES = 64, 96


class OneLayer(nn.Module):
    """A model of one linear layer, `lin`."""

    def __init__(self, lin: nn.Module) -> None:
        super().__init__()
        self.lin = lin
        self.is_loaded_in_4bit = hasattr(lin, "quant_state")

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x)


def linear4bit(dtype: torch.dtype | None = torch.float32, bias: bool = True, **kwargs) -> nn.Module:
    """A quantised Linear4bit with `dtype` as its compute_dtype; double quantisation unless told otherwise."""
    layer = bnb.nn.Linear4bit(
        IN_FEATURES, OUT_FEATURES, bias=bias, compute_dtype=dtype, **({"quant_type": "nf4"} | kwargs)
    )
    return layer.to("cpu")


def conv1d(dtype: torch.dtype = torch.float32) -> nn.Module:
    """transformers' linear layer with the weight stored as [in, out], as GPT-2 has it."""
    layer = pytorch_utils.Conv1D(OUT_FEATURES, IN_FEATURES)
    nn.init.normal_(layer.weight, std=IN_FEATURES**-0.5)
    nn.init.normal_(layer.bias)
    return layer.to(dtype)


def base_layer(kind: str, dtype: torch.dtype) -> nn.Module:
    if kind == "dense":
        return nn.Linear(IN_FEATURES, OUT_FEATURES, dtype=dtype)
    return linear4bit(dtype) if kind == "4bit" else conv1d(dtype)


def lora_model(
    kind: str, dtype: torch.dtype = torch.float32, base: nn.Module | None = None, nonzero: bool = True, **config
) -> nn.Module:
    """A PEFT model on a `kind` of 'dense', 'conv1d' or '4bit', in training mode, whose B is not zero."""
    if base is None:
        base = base_layer(kind, dtype)
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["lin"], "fan_in_fan_out": kind == "conv1d"} | config
    model = peft.get_peft_model(OneLayer(base), peft.LoraConfig(**config))
    if nonzero:
        randomize(model)
    return model.train()


def randomize(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)


def layer_of(model: nn.Module) -> nn.Module:
    return model.base_model.model.lin


def is_repacked(layer: nn.Module) -> bool:
    return bool(vars(layer.weight.quant_state).get("packing_format_for_cpu", False))


def dense_weight(layer: nn.Module) -> Tensor:
    """The base weight [out, in] in fp64."""
    weight = layer.weight
    if hasattr(weight, "quant_state"):
        weight = NF4Weight.from_params4bit(weight).dequantize()
    elif isinstance(layer, pytorch_utils.Conv1D):
        weight = weight.T
    return weight.detach().double()


def oracle(layer: nn.Module, x: Tensor, adapters: tuple[str, ...] | None = None) -> Tensor:
    """What a PEFT layer computes without dropout, in fp64, differentiably."""
    names = layer.active_adapters if adapters is None else adapters
    base = layer.get_base_layer()
    return reference(
        x,
        dense_weight(base),
        base.bias,
        [layer.lora_A[name].weight for name in names],
        [layer.lora_B[name].weight for name in names],
        [float(layer.scaling[name]) for name in names],
    )


def fused_model(kind, *args, **kwargs):
    model = lora_model(kind, *args, **kwargs)
    assert all(row.fused for row in peft_kernels.optimize(model))
    return model


def gradients(model: nn.Module, x: Tensor, grad: Tensor) -> list[Tensor | None]:
    """y, and the gradients of x and of all that an adapter is made of."""
    x = x.clone().requires_grad_()
    y = model(x)
    trained = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    return [y.detach(), *torch.autograd.grad(y, [x, *trained], grad.to(y.dtype), allow_unused=True)]


def stock_path_reasons(model: nn.Module, caplog, *args, **kwargs) -> list[str]:
    """The reasons that were logged when calls of a model took the stock path."""
    registry._logged.clear()
    caplog.clear()
    with caplog.at_level(logging.WARNING, "peft_kernels"):
        model(*args, **kwargs)
    return caplog.messages
