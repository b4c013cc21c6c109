"""The models that sequences start from, and how a step changes both of a pair."""

import io
import random
from collections.abc import Callable
from functools import cache

import torch
from decoding_models import make
from peft import IA3Config, LoraConfig, PrefixTuningConfig, get_peft_model
from torch import nn

import peft_kernels

LINEAR = (nn.Linear,)  # PEFT's layers on an nn.Linear do not derive from it
SMALL = ("lora_", "ia3_", "prompt_encoder", "norm")  # parameters beside the frozen weights
ERRORS = (
    ValueError,
    RuntimeError,
    KeyError,
    TypeError,
    AttributeError,
    NotImplementedError,
    AssertionError,
    IndexError,
)


def lora(**options) -> LoraConfig:
    return LoraConfig(
        **{"r": 4, "target_modules": "all-linear", "lora_dropout": 0.0, "task_type": "CAUSAL_LM", **options}
    )


def ia3() -> IA3Config:
    modules = ["k_proj", "v_proj", "down_proj"]
    return IA3Config(target_modules=modules, feedforward_modules=["down_proj"], task_type="CAUSAL_LM")


def prefix() -> PrefixTuningConfig:
    return PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")


# The architecture, the base layers, and the adapters.
TEMPLATES = {
    "4bit": ("llama", "4bit", lora),
    "dense": ("qwen3", "dense", lora),
    "ia3": ("llama", "4bit", ia3),
    "prefix": ("llama", "dense", prefix),
}


@cache
def _saved_pair(template: str) -> bytes:
    """A model and its accelerated copy: reading them takes a fourth of the time that copies take."""
    torch.manual_seed(0)
    name, base, config = TEMPLATES[template]
    model = make(name, base, lora=False)
    nn.init.normal_(model.get_input_embeddings().weight)  # norms of small embeddings would make large gradients
    model = get_peft_model(model, config()).eval()
    scramble(model, "default")
    fused = read(written(model))  # deepcopy would give each 4-bit layer another quantisation state than its weight's
    peft_kernels.optimize(fused)
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
        self.merged: dict[str, list[torch.Tensor]] = {}

    def both(self, change: Callable[[nn.Module], None]) -> None:
        """Changes both models in the same way; each draws the same random numbers."""
        seed = self.random.randrange(1 << 30)
        failures = []
        for model in (self.stock, self.fused):
            torch.default_generator.manual_seed(seed)
            try:
                change(model)
                failures.append(None)
            except ERRORS as error:
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

    def merge(self) -> None:
        self.both(lambda model: model.merge_adapter())
        self.merged = self._numbers_of_merged_adapters()

    def was_merged_with_other_numbers(self) -> bool:
        """Whether a merged adapter has changed since. PEFT takes off what it is by now, which leaves another weight
        than the layer had; an accelerated layer puts the weight back."""
        now = self._numbers_of_merged_adapters()
        known = ((numbers, self.merged.get(name, ())) for name, numbers in now.items())
        return not all(len(one) == len(other) and all(map(torch.equal, one, other)) for one, other in known)

    def _numbers_of_merged_adapters(self) -> dict[str, list[torch.Tensor]]:
        found = {}
        for name, layer in self.stock.named_modules():
            for adapter in getattr(layer, "merged_adapters", ()):
                scaling = getattr(layer, "scaling", {}).get(adapter, 1.0)
                found[f"{name}.{adapter}"] = [torch.as_tensor(scaling)] + [
                    parameter.detach().clone()
                    for key, parameter in layer.named_parameters()
                    if f".{adapter}." in f"{key}." and "base_layer" not in key
                ]
        return found

    def adapter(self) -> str:
        return self.random.choice(sorted(self.stock.peft_config))


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    return model.get_base_model().model.layers


def is_4bit(module: nn.Module) -> bool:
    return any(hasattr(parameter, "quant_state") for parameter in module.parameters())
