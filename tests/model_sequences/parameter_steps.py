"""Steps that change numbers, memory and parameters, and the frozen layers."""

import copy

import bitsandbytes as bnb
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn.utils import parametrize, prune

from model_sequences.forwards import gradients, outcome
from model_sequences.pairs import LINEAR, SMALL, decoder_layers, lora


def edit_weight(pair):
    pair.change_parameter(SMALL, lambda module, name: getattr(module, name).data.mul_(1.5))


def edit_without_gradients(pair):
    def change(module, name):
        with torch.no_grad():
            getattr(module, name).add_(0.05)

    pair.change_parameter(SMALL, change)


def replace_data(pair):
    def change(module, name):
        parameter = getattr(module, name)
        parameter.data = 0.5 * parameter.data

    pair.change_parameter(SMALL, change)


def set_memory(pair):
    """Has a parameter lie elsewhere, without a new value of `.data`."""

    def change(module, name):
        with torch.no_grad():
            getattr(module, name).set_(0.75 * getattr(module, name).detach())

    pair.change_parameter(SMALL, change)


def transpose_memory(pair):
    """Has a square weight be its transpose, at the same address."""

    def change(layer):
        weight = layer.weight
        if weight.dim() == 2 and weight.shape[0] == weight.shape[1]:
            weight.data = weight.data.T

    pair.change(LINEAR, change)


def expand_memory(pair):
    """Has all rows of a matrix, or all numbers of a vector, be the first of them."""

    def change(module, name):
        parameter = getattr(module, name)
        parameter.data = parameter.data[:1].expand(parameter.shape)

    pair.change_parameter(("lora_B", "norm"), change)


def share_memory(pair):
    pair.change_parameter(SMALL, lambda module, name: getattr(module, name).share_memory_())


def replace_parameter(pair):
    def change(module, name):
        setattr(module, name, nn.Parameter(1.25 * getattr(module, name).detach()))

    pair.change_parameter(SMALL, change)


def register_parameter(pair):
    def change(module, name):
        module.register_parameter(name, nn.Parameter(0.75 * getattr(module, name).detach()))

    pair.change_parameter(SMALL, change)


def parameter_becomes_attribute(pair):
    """As `nn.utils.weight_norm` and its like do it."""

    def change(module, name):
        value = 0.75 * getattr(module, name).detach()
        delattr(module, name)
        setattr(module, name, value)

    pair.change_parameter(SMALL, change)


def parameter_becomes_buffer(pair):
    def change(module, name):
        value = 0.75 * getattr(module, name).detach()
        delattr(module, name)
        module.register_buffer(name, value)

    pair.change_parameter(SMALL, change)


class Halved(nn.Module):
    def forward(self, weight):
        return 0.5 * weight


def parametrise(pair):
    pair.change(LINEAR, lambda layer: parametrize.register_parametrization(layer, "weight", Halved()))


def unparametrise(pair):
    def change(model):
        for module in model.modules():
            if parametrize.is_parametrized(module):
                parametrize.remove_parametrizations(module, "weight")

    pair.both(change)


def prune_weight(pair):
    pair.change(LINEAR, lambda layer: prune.random_unstructured(layer, "weight", 0.5))


def unprune(pair):
    def change(model):
        for module in model.modules():
            if isinstance(module, nn.Linear) and prune.is_pruned(module) and hasattr(module, "weight_orig"):
                prune.remove(module, "weight")

    pair.both(change)


def tie_weights(pair):
    """Has two layers share a parameter."""
    name, attribute = pair.random.choice([("lora_A", "q_proj"), ("lora_B", "o_proj")])

    def change(model):
        one, other = (getattr(getattr(layer.self_attn, attribute), name) for layer in decoder_layers(model))
        for adapter in one:
            other[adapter].weight = one[adapter].weight

    if pair.config is lora:
        pair.both(change)


def add_bias(pair):
    """Adds it to an adapter's matrix, or to a layer with a frozen weight."""

    def change(layer):
        dtype = layer.weight.dtype if layer.weight.is_floating_point() else layer.compute_dtype
        layer.bias = nn.Parameter(0.2 * torch.randn(layer.out_features, dtype=dtype))

    pair.change(LINEAR, change)


def remove_bias(pair):
    pair.change(LINEAR, lambda layer: setattr(layer, "bias", None))


def freeze(pair):
    wanted = pair.random.random() < 0.5
    pair.change_parameter(SMALL, lambda module, name: getattr(module, name).requires_grad_(wanted))


def learn(pair):
    """A step of an optimiser."""

    def change(model):
        tokens = torch.randint(3, 60, (1, 6))
        with torch.enable_grad():
            loss = model(tokens, labels=tokens).loss
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        grads = torch.autograd.grad(loss, trained, allow_unused=True)
        with torch.no_grad():
            for parameter, grad in zip(trained, grads, strict=True):
                if grad is not None:
                    parameter.sub_(grad.clamp(-1, 1), alpha=0.01)

    if isinstance(outcome(gradients, pair.stock, 0), torch.Tensor):
        pair.both(change)


# ---- Frozen layers --------------------------------------------------------------------------------------------------


def base_of(layer: nn.Module) -> nn.Module:
    return layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer


def statistics(weight):
    """The quantisation state whose absmax are floating-point numbers."""
    return weight.quant_state.state2 if weight.quant_state.nested else weight.quant_state


def edit_base(pair):
    def change(layer):
        weight = base_of(layer).weight
        numbers = statistics(weight).absmax if hasattr(weight, "quant_state") else weight.data
        numbers.mul_(1.25)

    pair.change((BaseTunerLayer, *LINEAR), change)


def replace_base_data(pair):
    def change(layer):
        weight = base_of(layer).weight
        weight.data = weight.data.flip(0).clone()

    pair.change((BaseTunerLayer, *LINEAR), change)


def replace_absmax(pair):
    def change(layer):
        statistics(layer.weight).absmax = statistics(layer.weight).absmax * 0.75

    pair.change(bnb.nn.Linear4bit, change)


def replace_memory_of_absmax(pair):
    def change(layer):
        absmax = statistics(layer.weight).absmax
        absmax.data = absmax.data * 0.75

    pair.change(bnb.nn.Linear4bit, change)


def edit_offset(pair):
    def change(layer):
        if layer.weight.quant_state.nested:
            layer.weight.quant_state.offset.mul_(1.5)

    pair.change(bnb.nn.Linear4bit, change)


def replace_offset(pair):
    def change(layer):
        if layer.weight.quant_state.nested:
            layer.weight.quant_state.offset = layer.weight.quant_state.offset * 1.5

    pair.change(bnb.nn.Linear4bit, change)


def replace_quant_state(pair):
    def change(layer):
        state = copy.deepcopy(layer.weight.quant_state)
        (state.state2 if state.nested else state).absmax.mul_(0.75)
        layer.weight.quant_state = layer.quant_state = state

    pair.change(bnb.nn.Linear4bit, change)


def quantise_anew(pair):
    nested = pair.random.random() < 0.5

    def change(layer):
        weight = torch.randn(layer.out_features, layer.in_features) * 0.1
        layer.weight = bnb.nn.Params4bit(
            weight, requires_grad=False, quant_type="nf4", compress_statistics=nested, module=layer
        ).to("cpu")

    pair.change(bnb.nn.Linear4bit, change)


def replace_base_layer(pair):
    def change(layer):
        old = layer.base_layer
        if isinstance(old, bnb.nn.Linear4bit):
            layer.base_layer = copy.deepcopy(old)
            statistics(layer.base_layer.weight).absmax.mul_(1.5)
        else:
            dtype = old.weight.dtype if old.weight.is_floating_point() else torch.float32
            layer.base_layer = nn.Linear(old.in_features, old.out_features, bias=False, dtype=dtype)

    pair.change(BaseTunerLayer, change)


def compute_in_bf16(pair):
    dtype = pair.random.choice([torch.bfloat16, torch.float32])
    pair.change(bnb.nn.Linear4bit, lambda layer: setattr(layer, "compute_dtype", dtype))


def tie_embedding(pair):
    """The output layer takes the embedding's weight."""

    def change(model):
        base = model.get_base_model()
        base.lm_head.weight = base.get_input_embeddings().weight

    pair.both(change)


def replace_output_layer(pair):
    def change(model):
        base = model.get_base_model()
        base.set_output_embeddings(nn.Linear(64, 60, bias=False, dtype=base.lm_head.weight.dtype))

    pair.both(change)
