"""What the sequences of `test_accelerate_sequences` are made of: models, steps that change them, and forwards."""

import copy
import io
import random
import tempfile
import warnings
from collections.abc import Callable
from functools import cache, partial

import bitsandbytes as bnb
import torch
from comparison import error
from decoding_models import CACHE, make
from peft import (
    IA3Config,
    LoraConfig,
    PrefixTuningConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.hotswap import hotswap_adapter_from_state_dict
from torch import nn
from torch.nn.utils import parametrize, prune
from transformers import DynamicCache

import peft_kernels

# In fp32 both models' outputs err by some 1e-6, and every step changes them by far more than this. Of gradients that
# nearly cancel, the stock model's have been seen to err by 1e-3 against fp64.
SAME = 1e-4
SAME_GRADIENTS = 1e-2
SAME_IN_16_BITS = 0.1
NAMES = ("default", "second", "third")
LINEAR = (nn.Linear,)  # PEFT's layers on it are none


# ---- Models ---------------------------------------------------------------------------------------------------------


def _lora(**options) -> LoraConfig:
    return LoraConfig(
        **{"r": 4, "target_modules": "all-linear", "lora_dropout": 0.0, "task_type": "CAUSAL_LM", **options}
    )


def _ia3() -> IA3Config:
    modules = ["k_proj", "v_proj", "down_proj"]
    return IA3Config(target_modules=modules, feedforward_modules=["down_proj"], task_type="CAUSAL_LM")


def _prefix() -> PrefixTuningConfig:
    return PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")


# The architecture, the base layers, and the adapters.
TEMPLATES = {
    "4bit": ("llama", "4bit", _lora),
    "dense": ("qwen3", "dense", _lora),
    "ia3": ("llama", "4bit", _ia3),
    "prefix": ("llama", "dense", _prefix),
}


@cache
def _saved_pair(template: str) -> bytes:
    """A model and its accelerated copy: reading them takes a fourth of the time that copies take."""
    torch.manual_seed(0)
    name, base, config = TEMPLATES[template]
    model = make(name, base, lora=False)
    nn.init.normal_(model.get_input_embeddings().weight)  # of small ones, norms would make large gradients
    model = get_peft_model(model, config()).eval()
    scramble(model, "default")
    fused = copy.deepcopy(model)
    peft_kernels.accelerate(fused)
    return written((model, fused))


def written(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def read(data: bytes) -> object:
    return torch.load(io.BytesIO(data), weights_only=False)


def scramble(model: nn.Module, adapter: str) -> None:
    """Gives a new adapter numbers of a size that matters."""
    for name, parameter in model.named_parameters():
        if f".{adapter}." in f"{name}." and ("lora_" in name or "ia3_" in name or "prompt_encoder" in name):
            near = 1 if "ia3_" in name or "magnitude" in name else 0
            parameter.data = near + torch.randn(parameter.shape) * (0.2 if "lora_B" in name else 0.15)


class Pair:
    """A model and its accelerated copy, and what the steps may need to know."""

    def __init__(self, template: str) -> None:
        self.stock, self.fused = read(_saved_pair(template))
        self.config = TEMPLATES[template][2]
        self.random = random.Random()

    def both(self, change: Callable[[nn.Module], None]) -> None:
        """Changes both models in the same way; each draws the same random numbers."""
        seed = self.random.randrange(1 << 30)
        failures = []
        for model in (self.stock, self.fused):
            torch.default_generator.manual_seed(seed)
            try:
                change(model)
                failures.append(None)
            except _ERRORS as error:
                failures.append(type(error))
        assert failures[0] == failures[1], f"stock: {failures[0]}, accelerated: {failures[1]}"

    def change(self, kind: type | tuple[type, ...], change: Callable[[nn.Module], None]) -> None:
        """Changes one of the modules of a class in both models; nothing if there is none."""
        names = [name for name, module in self.stock.named_modules() if isinstance(module, kind)]
        if names:
            name = self.random.choice(names)
            self.both(lambda model: change(model.get_submodule(name)))

    def change_parameter(self, words: tuple[str, ...], change: Callable[[nn.Module, str], None]) -> None:
        """Changes a floating-point parameter with one of these words in its name, given its module and its name."""
        names = [
            name
            for name, parameter in self.stock.named_parameters()
            if parameter.is_floating_point() and any(word in name for word in words)
        ]
        if names:
            owner, _, name = self.random.choice(names).rpartition(".")
            self.both(lambda model: change(model.get_submodule(owner), name))

    def adapter(self) -> str:
        return self.random.choice(sorted(self.stock.peft_config))


_ERRORS = (
    ValueError,
    RuntimeError,
    KeyError,
    TypeError,
    AttributeError,
    NotImplementedError,
    AssertionError,
    IndexError,
)
SMALL = ("lora_", "ia3_", "prompt_encoder", "norm")  # parameters beside the frozen weights


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    return model.get_base_model().model.layers


def is_4bit(module: nn.Module) -> bool:
    return any(hasattr(parameter, "quant_state") for parameter in module.parameters())


# ---- Steps: adapters -------------------------------------------------------------------------------------------------


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
            model.add_adapter(name, _lora(**options) if pair.config is _lora else pair.config())
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

    if pair.config is _lora:
        pair.both(change)


def weighted_adapter(pair):
    names = sorted(pair.stock.peft_config)

    def change(model):
        if "third" not in names:
            model.add_weighted_adapter(names, [0.7] * len(names), "third", combination_type="cat")
            model.set_adapter("third")

    if pair.config is _lora:
        pair.both(change)


def load_state_dict(pair):
    assign = pair.random.random() < 0.5

    def change(model):
        state = {
            key: (value * 0.9 if any(word in key for word in SMALL) else value).clone()
            for key, value in model.state_dict().items()
        }
        if not any("quant" in key for key in state):  # bitsandbytes' layers load no state of theirs into themselves
            model.load_state_dict(state, assign=assign)

    pair.both(change)


def merge(pair):
    # PEFT quantises a merged 4-bit weight anew, and accelerated layers put the original back, with less loss.
    if not is_4bit(pair.stock):
        pair.both(lambda model: model.merge_adapter())


def unmerge(pair):
    # PEFT refuses to unmerge (IA)³ from 4-bit weights, and accelerated layers do it.
    if pair.config is not _ia3:
        pair.both(lambda model: model.unmerge_adapter())


def wrap_anew(pair):
    """Takes the adapters off, and puts another one on."""
    rank = pair.random.choice([2, 6])

    def wrapped(model):
        model = get_peft_model(model.unload(), _lora(r=rank)).eval()
        scramble(model, "default")
        return model

    if pair.config is _lora and not any(layer.merged for layer in pair.stock.modules() if isinstance(layer, LoraLayer)):
        models = []
        pair.both(lambda model: models.append(wrapped(model)))
        if len(models) == 2:
            pair.stock, pair.fused = models


# ---- Steps: an adapter's layers --------------------------------------------------------------------------------------


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


# ---- Steps: numbers, memory and parameters ---------------------------------------------------------------------------


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
    """As `nn.utils.weight_norm` and its like make it."""

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

    if pair.config is _lora:
        pair.both(change)


def add_bias(pair):
    """To an adapter's matrix, or a layer's frozen weight."""

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


# ---- Steps: frozen layers --------------------------------------------------------------------------------------------


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


# ---- Steps: modules --------------------------------------------------------------------------------------------------


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


# ---- Steps: the whole model ------------------------------------------------------------------------------------------


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
    peft_kernels.accelerate(pair.fused)


def restore(pair):
    peft_kernels.restore(pair.fused)


STEPS = tuple(
    step
    for step in list(globals().values())
    if callable(step) and getattr(step, "__code__", None) and step.__code__.co_varnames[:1] == ("pair",)
)


# ---- Forwards --------------------------------------------------------------------------------------------------------


def one_token(model: nn.Module, seed: int) -> torch.Tensor:
    return model(ids(seed, 1)).logits


def one_pass(model: nn.Module, seed: int) -> torch.Tensor:
    return model(ids(seed, 7)).logits


def padded(model: nn.Module, seed: int) -> torch.Tensor:
    padding = torch.ones(2, 6, dtype=torch.long)
    padding[0, :2] = 0
    return model(ids(seed, 6), attention_mask=padding).logits[padding.bool()]


def decode(model: nn.Module, seed: int) -> torch.Tensor:
    """A prompt, then a token."""
    tokens, kept = ids(seed, 4), DynamicCache()
    parts = [tokens[:, :3], tokens[:, 3:]]
    return torch.cat([model(part, **{CACHE: kept}, use_cache=True).logits for part in parts], 1)


def in_inference_mode(model: nn.Module, seed: int) -> torch.Tensor:
    with torch.inference_mode():
        return model(ids(seed, 1)).logits.clone()


def without_adapters(model: nn.Module, seed: int) -> torch.Tensor:
    with model.disable_adapter():
        return model(ids(seed, 1)).logits


def with_other_parameters(model: nn.Module, seed: int) -> torch.Tensor:
    """As torch.func has a module called with tensors in its parameters' place."""
    others = {
        name: 0.5 * parameter.detach()
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point() and any(word in name for word in SMALL)
    }
    return torch.func.functional_call(model, others, (ids(seed, 1),)).logits


def hidden_states(model: nn.Module, seed: int) -> torch.Tensor:
    return torch.stack(model(ids(seed, 2), output_hidden_states=True).hidden_states)


def mixed(model: nn.Module, seed: int) -> torch.Tensor:
    """Each sample with an adapter of its own."""
    names = [sorted(model.peft_config)[0], "__base__"]
    return model(ids(seed, 3), adapter_names=names).logits


def ids(seed: int, length: int) -> torch.Tensor:
    return torch.randint(3, 60, (2, length), generator=torch.Generator().manual_seed(seed))


def gradients(model: nn.Module, seed: int) -> torch.Tensor:
    """The loss, and the gradients of whatever is trained."""
    tokens = ids(seed, 7)
    with torch.enable_grad():
        loss = model(tokens, labels=tokens).loss
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not trained or not loss.requires_grad:
            return loss.detach()[None]
        found = torch.autograd.grad(loss, trained, allow_unused=True)
    return torch.cat([loss.detach()[None].float(), *(grad.flatten().float() for grad in found if grad is not None)])


# Those that find the most, as they run from what layers keep, come more than once.
FORWARDS = (
    one_token, one_token, one_token, decode, decode, one_pass, padded, in_inference_mode, without_adapters,
    with_other_parameters, hidden_states, mixed, gradients,
)  # fmt: skip


def outcome(forward: Callable, model: nn.Module, seed: int) -> torch.Tensor | type:
    """What a forward computes, or the class of its error."""
    try:
        with torch.no_grad():
            return forward(model, seed).detach().float()
    except _ERRORS as error:
        return type(error)


def in_16_bits(model: nn.Module) -> bool:
    dtypes = {parameter.dtype for parameter in model.parameters()}
    dtypes |= {module.compute_dtype for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)}
    return bool(dtypes & {torch.bfloat16, torch.float16})


def in_fp32(model: nn.Module) -> nn.Module:
    """A copy that computes in fp32."""
    model = copy.deepcopy(model).float()
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.compute_dtype = torch.float32
    return model


def check_sequence(template: str, steps: list[tuple[Callable, Callable, int]]) -> None:
    """Runs steps, and holds the accelerated model to the stock one after each."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pair = Pair(template)
        for step, forward, seed in steps:
            pair.random.seed(seed)
            step(pair)
            wanted, got = (outcome(forward, model, seed) for model in (pair.stock, pair.fused))
            if isinstance(wanted, type):
                continue  # The kernels take mixtures of dtypes that torch refuses.
            where = f"{step.__name__}, {forward.__name__}"
            assert isinstance(got, torch.Tensor), f"{where}: {got.__name__}, and the stock model gives a result"
            if wanted.isfinite().all():
                check_result(pair, forward, seed, got, wanted, where)


def check_result(pair: Pair, forward: Callable, seed: int, got: torch.Tensor, wanted: torch.Tensor, where: str) -> None:
    measured = error(got, wanted)
    if not in_16_bits(pair.stock):
        assert measured <= (SAME_GRADIENTS if forward is gradients else SAME), f"{where}: {measured:.2g}"
    elif measured > SAME_IN_16_BITS:  # The stock model may be the one that errs.
        exact = outcome(forward, in_fp32(pair.stock), seed)
        ours, stock = error(got, exact), error(wanted, exact)
        # Stale results are looked for here. Of two roundings of one forward either may be twice as far off by chance.
        assert ours <= 2 * max(stock, SAME_IN_16_BITS), f"{where}: {ours:.2g} from fp32, and stock {stock:.2g}"
