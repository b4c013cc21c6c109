"""Guards: what is read by one is seen when it changes."""

import pytest
import torch
from peft_models import linear4bit
from torch import nn

import peft_kernels
from peft_kernels.inference.guards import ONCE, CannotGuardError, Guard


class Holder:
    def __init__(self):
        self.value, self.others, self.number = object(), [1], torch.tensor(2.0)
        self.layer = nn.Linear(4, 4)


def read(reading, holder):
    layer = reading.module(vars(holder), "layer")
    return [
        reading.attribute(holder, "value"),
        reading.attribute(holder, "absent", 5),
        reading.length(reading.attribute(holder, "others")),
        reading.parameter(layer, "weight"),
        reading.parameter(layer, "bias"),
        reading.tensor(holder, "number"),
        reading.number(vars(holder), "number"),
        reading.item(vars(holder), "missing"),
    ]


CHANGES = {
    "attribute": lambda holder: setattr(holder, "value", object()),
    "missing": lambda holder: setattr(holder, "missing", object()),
    "absent": lambda holder: setattr(holder, "absent", object()),
    "length": lambda holder: holder.others.append(2),
    "number": lambda holder: holder.number.fill_(3),
    "memory": lambda holder: setattr(holder.number, "data", torch.tensor(2.0)),
    "parameter": lambda holder: setattr(holder.layer, "weight", nn.Parameter(holder.layer.weight.detach())),
    "strides": lambda holder: setattr(holder.layer.weight, "data", holder.layer.weight.data.T),
    "shape": lambda holder: setattr(holder.layer.weight, "data", holder.layer.weight.data[:2]),
    "dtype": lambda holder: setattr(holder.layer.weight, "data", holder.layer.weight.data.view(torch.int32)),
    "module": lambda holder: setattr(holder, "layer", nn.Linear(4, 4)),
    "class": lambda holder: setattr(holder.layer, "__class__", nn.Identity),
    "hook": lambda holder: holder.layer.register_forward_hook(print),
    "forward": lambda holder: setattr(holder.layer, "forward", print),
}


@pytest.mark.parametrize("change", CHANGES)
def test_sees_what_changes(change):
    holder = Holder()
    guard = Guard()
    for found, wanted in zip(read(guard, holder), read(ONCE, holder), strict=True):
        assert found is wanted or found == wanted
    read(guard, holder)  # once more, which adds nothing
    assert guard.close().holds()
    with torch.no_grad():
        holder.layer.weight.mul_(2)  # numbers in memory are read where they are
    assert guard.holds()
    if change == "dtype":
        holder.layer.weight.requires_grad_(False)
    CHANGES[change](holder)
    assert not guard.holds()


def test_holds_nothing_before_it_is_closed():
    assert not Guard().holds()


def test_what_cannot_be_guarded():
    layer = nn.Linear(4, 4)
    del layer.weight
    layer.weight = torch.zeros(4, 4)
    with pytest.raises(CannotGuardError):
        Guard().parameter(layer, "weight")
    with pytest.raises(CannotGuardError):
        Guard().attribute(layer, "__doc__")
    assert ONCE.parameter(layer, "weight") is layer.weight


def test_copied_statistics_are_not_kept():
    layer = linear4bit(compress_statistics=False)
    layer.weight.quant_state.absmax = layer.weight.quant_state.absmax.bfloat16()
    peft_kernels.optimize(layer)
    x = torch.randn(1, 64)
    with torch.no_grad():
        before = layer(x) - layer.bias
        layer.weight.quant_state.absmax.mul_(2)
        torch.testing.assert_close(layer(x) - layer.bias, 2 * before)
