"""Steps that change adapters and their layers."""

import copy
import tempfile
from functools import partial

import torch
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.hotswap import hotswap_adapter_from_state_dict
from torch import nn

from model_sequences.pairs import SMALL, ia3, is_4bit, lora, scramble

NAMES = ("default", "second", "third")


def nothing(pair):
    pass


def add_adapter(pair):
    name = pair.random.choice(NAMES)
    options = {
        "r": pair.random.choice([1, 2, 5]),
        "target_modules": pair.random.choice(["all-linear", ["q_proj", "down_proj"], ["v_proj"]]),
        **pair.random.choice([{}, {}, {"use_dora": True}, {"use_rslora": True}, {"lora_bias": True}]),
    }
    if "use_dora" in options and pair.random.random() < 0.5:
        options["target_modules"] = ["down_proj"]

    def change(model):
        if name not in model.peft_config:
            model.add_adapter(name, lora(**options) if pair.config is lora else pair.config())
            scramble(model, name)
        model.set_adapter(name)

    pair.both(change)


def set_adapter(pair):
    name = pair.adapter()
    pair.both(lambda model: model.set_adapter(name))


def activate_several(pair):
    names = sorted(pair.stock.peft_config)
    pair.both(lambda model: model.base_model.set_adapter(names))


def activate_in_one_layer(pair):
    name = pair.adapter()
    pair.change(BaseTunerLayer, lambda layer: layer.set_adapter([name]))


def delete_adapter(pair):
    name = pair.adapter()
    if len(pair.stock.peft_config) > 1:
        pair.both(lambda model: (model.delete_adapter(name), model.set_adapter(sorted(model.peft_config)[0])))


def disable_adapters(pair):
    pair.both(lambda model: model.base_model.disable_adapter_layers())


def enable_adapters(pair):
    pair.both(lambda model: model.base_model.enable_adapter_layers())


def disable_in_one_layer(pair):
    wanted = pair.random.random() < 0.5
    pair.change(BaseTunerLayer, lambda layer: layer.enable_adapters(wanted))


def load_adapter_state(pair):
    name = pair.adapter()

    def change(model):
        state = get_peft_model_state_dict(model, adapter_name=name)
        state = {key: 0.8 * value + 0.01 for key, value in state.items()}
        set_peft_model_state_dict(model, state, adapter_name=name)

    pair.both(change)


def load_adapter_from_a_file(pair):
    name, new = pair.adapter(), pair.random.choice(NAMES)

    def change(model):
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder, selected_adapters=[name])
            path = folder if name == "default" else f"{folder}/{name}"
            if new in model.peft_config and len(model.peft_config) > 1:
                model.delete_adapter(new)
            model.load_adapter(path, new)
        model.set_adapter(new)

    pair.both(change)


def hot_swap(pair):
    name = pair.adapter()

    def change(model):
        state = {key: 0.6 * value for key, value in get_peft_model_state_dict(model, adapter_name=name).items()}
        hotswap_adapter_from_state_dict(model, state, adapter_name=name, config=model.peft_config[name])

    if pair.config is lora:
        pair.both(change)


def weighted_adapter(pair):
    names = sorted(pair.stock.peft_config)

    def change(model):
        if "third" not in names:
            model.add_weighted_adapter(names, [0.7] * len(names), "third", combination_type="cat")
            model.set_adapter("third")

    if pair.config is lora:
        pair.both(change)


def load_state_dict(pair):
    assign = pair.random.random() < 0.5

    def change(model):
        state = {
            key: (value * 0.9 if any(word in key for word in SMALL) else value).clone()
            for key, value in model.state_dict().items()
        }
        if not any("quant" in key for key in state):  # bitsandbytes' layers can't load their own state
            model.load_state_dict(state, assign=assign)

    pair.both(change)


def merge(pair):
    # PEFT quantises a merged 4-bit weight anew, and accelerated layers put the original back, with less loss.
    if not is_4bit(pair.stock):
        pair.merge()


def unmerge(pair):
    # PEFT refuses to unmerge (IA)³ from 4-bit weights, and accelerated layers do it.
    if pair.config is not ia3:
        pair.both(lambda model: model.unmerge_adapter())


def wrap_anew(pair):
    """Takes the adapters off, and puts another one on."""
    rank = pair.random.choice([2, 6])

    def wrapped(model):
        model = get_peft_model(model.unload(), lora(r=rank)).eval()
        scramble(model, "default")
        return model

    if pair.config is lora and not any(layer.merged for layer in pair.stock.modules() if isinstance(layer, LoraLayer)):
        models = []
        pair.both(lambda model: models.append(wrapped(model)))
        if len(models) == 2:
            pair.stock, pair.fused = models


# ---- An adapter's layers --------------------------------------------------------------------------------------------


def rescale(pair):
    factor = pair.random.choice([0.25, 3.0])
    pair.change(LoraLayer, lambda layer: layer.scale_layer(factor))


def set_scale(pair):
    name, factor = pair.adapter(), pair.random.choice([0.5, 2.0])
    pair.change(LoraLayer, lambda layer: layer.set_scale(name, factor))


def replace_scalings(pair):
    factor = pair.random.choice([0.5, 2.0])

    def change(layer):
        layer.scaling = {name: factor * value for name, value in layer.scaling.items()}

    pair.change(LoraLayer, change)


def scalings_become_tensors(pair):
    def change(layer):
        for name, value in layer.scaling.items():
            layer.scaling[name] = torch.tensor(float(value))

    pair.change(LoraLayer, change)


def fill_scalings(pair):
    number = pair.random.choice([0.3, 0.7])

    def change(model):
        for layer in model.modules():
            for value in layer.scaling.values() if isinstance(layer, LoraLayer) else ():
                if isinstance(value, torch.Tensor):
                    value.fill_(number)

    pair.both(change)


def resize_adapter(pair):
    """Gives one layer's adapter another rank, under the same parameters' names."""
    name = pair.adapter()

    def change(layer):
        a, b = layer.lora_A[name], layer.lora_B[name]
        a.weight = nn.Parameter(torch.randn(3, a.in_features) * 0.1)
        b.weight = nn.Parameter(torch.randn(b.out_features, 3) * 0.1)
        a.out_features = b.in_features = 3

    pair.change(LoraLayer, change)


def truncate_adapter(pair):
    """Keeps the first ranks, where they are in memory."""
    name = pair.adapter()

    def change(layer):
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
        rank = max(1, a.shape[0] - 1)
        a.data, b.data = a.data[:rank], b.data[:, :rank]

    pair.change(LoraLayer, change)


def replace_module_dict(pair):
    name = pair.random.choice(["lora_A", "lora_B", "lora_dropout"])

    def change(layer):
        setattr(layer, name, copy.deepcopy(getattr(layer, name)))
        for parameter in getattr(layer, name).parameters():
            parameter.data.mul_(0.5)

    pair.change(LoraLayer, change)


def replace_adapter_module(pair):
    name, part = pair.adapter(), pair.random.choice(["lora_A", "lora_B"])

    def change(layer):
        modules = getattr(layer, part)
        old = modules[name]
        modules[name] = nn.Linear(old.in_features, old.out_features, bias=pair_bias).to(old.weight.dtype)

    pair_bias = pair.random.random() < 0.3
    pair.change(LoraLayer, change)


def replace_dropout(pair):
    name, other = pair.adapter(), pair.random.choice([nn.Identity, partial(nn.Dropout, 0.0), nn.ReLU])
    pair.change(LoraLayer, lambda layer: layer.lora_dropout.update({name: other()}))


def forbid_casts(pair):
    wanted = pair.random.random() < 0.5
    pair.change(LoraLayer, lambda layer: setattr(layer, "cast_input_dtype_enabled", wanted))


def unload_variants(pair):
    """A DoRA becomes an ordinary LoRA."""
    pair.change(LoraLayer, lambda layer: setattr(layer, "lora_variant", {}))


def exchange_adapters(pair):
    """Two adapters of a layer change places."""

    def change(layer):
        one, other = sorted(layer.lora_A)[:2]
        for part in (layer.lora_A, layer.lora_B, layer.scaling):
            part[one], part[other] = part[other], part[one]

    if len(pair.stock.peft_config) > 1:
        pair.change(LoraLayer, change)
