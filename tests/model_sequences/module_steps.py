"""Steps that change modules, and the whole model."""

import copy
from functools import partial

import bitsandbytes as bnb
import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

import peft_kernels
from model_sequences.pairs import LINEAR, decoder_layers, read, written


def hook(pair):
    factor, before = pair.random.choice([0.5, 2.0]), pair.random.random() < 0.3

    def change(module):
        if before:
            handle = module.register_forward_pre_hook(partial(times_input, factor))
        else:
            handle = module.register_forward_hook(partial(times_output, factor))
        module._test_hooks = [*getattr(module, "_test_hooks", []), handle]

    pair.change((BaseTunerLayer, *LINEAR) if pair.random.random() < 0.6 else nn.Module, change)


def times_input(factor, module, args):
    return times(args, factor)


def times_output(factor, module, args, out):
    return times(out, factor)


def times(value, factor):
    """What a hook returns: floating-point tensors times a factor."""
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value * factor
    return tuple(times(item, factor) for item in value) if type(value) is tuple else value


def remove_hooks(pair):
    def change(model):
        for module in model.modules():
            for handle in vars(module).pop("_test_hooks", []):
                handle.remove()

    pair.both(change)


def backward_hook(pair):
    def change(module):
        handle = module.register_full_backward_hook(halve_gradients)
        module._test_hooks = [*getattr(module, "_test_hooks", []), handle]

    pair.change((LoraLayer, nn.Linear), change)


def halve_gradients(module, grads, _):
    return tuple(None if grad is None else 0.5 * grad for grad in grads)


def replace_forward(pair):
    def change(module):
        module.forward = partial(half_of_stock, module)

    pair.change(nn.Linear, change)


def half_of_stock(module, x):
    stock = bnb.nn.Linear4bit if isinstance(module, bnb.nn.Linear4bit) else nn.Linear
    return 0.5 * stock.forward(module, x)


def put_forward_back(pair):
    def change(model):
        for module in model.modules():
            if isinstance(vars(module).get("forward"), partial):
                del module.forward

    pair.both(change)


class Doubled(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


def change_class(pair):
    """Gives an adapter's matrix, or the output layer, another class."""

    def change(layer):
        if type(layer).__name__ == "Linear" and not isinstance(layer, BaseTunerLayer):
            layer.__class__ = Doubled

    pair.change(LINEAR, change)


def change_eps(pair):
    def change(layer):
        if hasattr(layer, "variance_epsilon"):
            layer.variance_epsilon = 0.5

    names = [name for name, _ in pair.stock.named_modules() if name.endswith("norm")]
    name = pair.random.choice(names)
    pair.both(lambda model: change(model.get_submodule(name)))


def replace_norm(pair):
    names = [name for name, module in pair.stock.named_modules() if "RMSNorm" in type(module).__name__]
    name, identity = pair.random.choice(names), pair.random.random() < 0.3

    def change(model):
        parent, _, child = name.rpartition(".")
        old = model.get_submodule(name)
        stock = getattr(type(old), "stock", type(old))
        new = nn.Identity() if identity else stock(old.weight.shape[0]).to(old.weight.dtype)
        setattr(model.get_submodule(parent), child, new)

    if names:
        pair.both(change)


def change_activation(pair):
    which = pair.random.randrange(2)
    other = pair.random.choice([nn.ReLU, nn.GELU, nn.SiLU])
    pair.both(lambda model: setattr(decoder_layers(model)[which].mlp, "act_fn", other()))


def swap_layers(pair):
    def change(model):
        layers = decoder_layers(model)
        layers[0], layers[1] = layers[1], layers[0]
        for index, layer in enumerate(layers):
            layer.self_attn.layer_idx = index

    pair.both(change)


def exchange_parts(pair):
    """Two decoder layers exchange a part."""
    name = pair.random.choice(["mlp", "input_layernorm", "mlp.up_proj", "self_attn.v_proj"])

    def change(model):
        owner, _, child = name.rpartition(".")
        one, other = (layer.get_submodule(owner) for layer in decoder_layers(model))
        part = getattr(one, child)
        setattr(one, child, getattr(other, child))
        setattr(other, child, part)

    pair.both(change)


def share_part(pair):
    name = pair.random.choice(["mlp", "post_attention_layernorm"])

    def change(model):
        one, other = decoder_layers(model)
        setattr(one, name, getattr(other, name))

    pair.both(change)


def change_scaling_of_attention(pair):
    pair.both(lambda model: setattr(decoder_layers(model)[0].self_attn, "scaling", 0.4))


def edit_angles(pair):
    pair.both(lambda model: model.get_base_model().model.rotary_emb.inv_freq.mul_(0.8))


def attend_eagerly(pair):
    implementation = pair.random.choice(["eager", "sdpa"])
    pair.both(lambda model: model.set_attn_implementation(implementation))


def change_config(pair):
    implementation = pair.random.choice(["eager", "sdpa"])
    pair.both(lambda model: setattr(model.get_base_model().config, "_attn_implementation", implementation))


# ---- The whole model ------------------------------------------------------------------------------------------------


def train(pair):
    pair.both(lambda model: model.train())


def evaluate(pair):
    pair.both(lambda model: model.eval())


def train_a_part(pair):
    wanted = pair.random.random() < 0.5
    pair.change(nn.Module, lambda module: module.train(wanted))


def checkpoint(pair):
    pair.both(lambda model: model.gradient_checkpointing_enable())


def stop_checkpointing(pair):
    pair.both(lambda model: model.gradient_checkpointing_disable())


def move(pair):
    dtype = pair.random.choice([torch.bfloat16, torch.float16, torch.float32, torch.float32])
    pair.both(lambda model: model.to(dtype))


def move_a_part(pair):
    dtype = pair.random.choice([torch.bfloat16, torch.float32])
    pair.change(nn.Module, lambda module: module.to(dtype))


def copied(pair):
    pair.stock, pair.fused = copy.deepcopy(pair.stock), copy.deepcopy(pair.fused)


def saved(pair):
    try:
        stock, fused = written(pair.stock), written(pair.fused)
    except (AttributeError, RuntimeError):  # transformers' own hooks are closures, and torch refuses parametrised ones
        return
    pair.stock, pair.fused = read(stock), read(fused)


def accelerate_again(pair):
    peft_kernels.optimize(pair.fused)


def restore(pair):
    peft_kernels.restore(pair.fused)
