"""A model of transformers with the adapters of a method, by its configuration alone.

It is built on the meta device, where tensors have shapes and no numbers. `with_stand_ins` then gives it torch's fake
tensors: they say that they are on a CPU, so each layer takes the way that it takes there, and nothing is computed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from ..bitfit import biases_of, train_biases_only
from ..checkpoints.peft_folder import read_json

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
BLOCKSIZE, NESTED_BLOCKSIZE = 64, 256  # bitsandbytes' own, which transformers leaves as they are
_HEADS = {
    "CAUSAL_LM": "AutoModelForCausalLM", "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification", "TOKEN_CLS": "AutoModelForTokenClassification",
}  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """What is made of a model, and what a step of training has.

    Attributes:
        method: "lora", "qlora", "dora", "qdora", "lora-fa", "ia3", "prefix", "prompt", "bitfit", "houlsby", "pfeiffer"
            or "full".
        rank: or the length of a prefix or a prompt, or the bottleneck of an adapter.
        head: the part of PEFT's task types that the model's last layers are for.
        four_bit: whether the linear layers are in NF4 with double quantisation, as QLoRA has them.
        targets: PEFT's, of LoRA; "all-linear" has a mixture's experts among them.
    """

    method: str
    rank: int
    rows: int
    tokens: int
    head: str = "CAUSAL_LM"
    dtype: torch.dtype = torch.bfloat16
    four_bit: bool = False
    checkpointing: bool = False
    dropout: float = 0.0
    targets: str | tuple[str, ...] = "all-linear"


def read_model_config(path: Path) -> Any:
    """The configuration of a model in transformers' format, of a folder or a file. Nothing of it is run.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is none of transformers'.
    """
    from transformers import CONFIG_MAPPING

    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"model: got {path}, wanted a folder with a config.json, or such a file")
    entries = read_json(file, "a model's configuration")
    kind = entries.pop("model_type", None)
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise ValueError(f"{file}: got model_type {kind!r}, wanted one that transformers has a class for")
    entries.pop("quantization_config", None)  # of the checkpoint; what is planned says its own
    try:
        return CONFIG_MAPPING[kind](**entries)
    except Exception as error:  # whatever another library raises for what a file says
        raise ValueError(f"{file}: got a configuration that transformers refuses: {in_a_line(error)}") from error


def with_layers(config: Any, count: int) -> Any:
    """The configuration of the same model with fewer layers."""
    config = copy.deepcopy(config)
    before = config.num_hidden_layers
    config.num_hidden_layers = count
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == before:
            setattr(config, name, value[:count])
    return config


def build(config: Any, recipe: Recipe) -> nn.Module:
    """The model on the meta device, with what the recipe adds to it.

    Raises:
        ValueError: the model can't be built, or the method does not fit it.
    """
    import transformers

    config = copy.deepcopy(config)
    config.use_cache = False
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = 0  # which a head for classification asks for
    try:
        with torch.device("meta"):
            model = getattr(transformers, _HEADS[recipe.head]).from_config(config, dtype=recipe.dtype)
    except Exception as error:  # whatever another library raises for what a file says
        raise ValueError(f"model: transformers can't build it: {in_a_line(error)}") from error
    if recipe.four_bit:
        _quantize(model, recipe.dtype)
    try:
        with torch.device("meta"):
            model = _adapt(model, recipe)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"method: {recipe.method} does not fit this model: {in_a_line(error)}") from error
    if recipe.checkpointing:
        if not getattr(model, "supports_gradient_checkpointing", True):
            raise ValueError(f"checkpointing: {type(model).__name__} does not support it")
        model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    result: nn.Module = model.train()
    return result


def with_stand_ins(model: nn.Module) -> list[Tensor]:
    """Puts fake tensors in the place of a model's parameters and buffers; to be called within a FakeTensorMode.

    Returns:
        All of them, with those of 4-bit weights' states.
    """
    made: dict[int, Any] = {}
    kept = list(model.parameters()) + list(model.buffers())  # so that no id is used twice
    tensors: list[Tensor] = []

    def stand_in(tensor: Tensor) -> Tensor:
        tensors.append(torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu"))
        return tensors[-1]

    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in made:
                if _is_4bit(parameter):
                    made[id(parameter)] = _quantized_stand_in(parameter, stand_in)
                else:
                    made[id(parameter)] = nn.Parameter(stand_in(parameter), parameter.requires_grad)
            module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = stand_in(buffer)
        for name, value in vars(module).items():  # tensors that a module has beside these, as PEFT's prompts do
            if isinstance(value, Tensor):
                vars(module)[name] = stand_in(value)
            elif isinstance(value, dict) and name not in ("_parameters", "_buffers"):
                for key, each in value.items():
                    value[key] = stand_in(each) if isinstance(each, Tensor) else each
    del kept
    return tensors


def weight_sizes(model: nn.Module) -> Iterator[tuple[str, Tensor, int]]:
    """Name, parameter or buffer, and bytes of each, in 4 bits those of its statistics as well."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        parts = [tensor, *(getattr(*where) for where in _states(tensor))] if _is_4bit(tensor) else [tensor]
        yield name, tensor, sum(part.numel() * part.element_size() for part in parts)


def bytes_of_4bit(count: int) -> int:
    """Of a weight with so many elements: codes, 8-bit absmax, their absmax, both code books, and the offset."""
    blocks = -(-count // BLOCKSIZE)
    return -(-count // 2) + blocks + 4 * -(-blocks // NESTED_BLOCKSIZE) + 4 * (16 + 256 + 1)


def elements(tensor: Any) -> int:
    """Of a weight, also where it is packed."""
    count: int = tensor.quant_state.shape.numel() if _is_4bit(tensor) else tensor.numel()
    return count


def layers_of(model: nn.Module) -> list[nn.Module]:
    """Those that a model's depth counts: the longest list of modules."""
    lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len, default=[])


def _is_4bit(tensor: Tensor) -> bool:
    return type(tensor).__name__ == "Params4bit"


def _quantize(model: Any, dtype: torch.dtype) -> None:
    from bitsandbytes.nn.modules import Params4bit
    from transformers import BitsAndBytesConfig
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import get_keys_to_not_convert

    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    shapes = {name: module.weight.shape for name, module in model.named_modules() if type(module) is nn.Linear}
    shapes |= {name: module.weight.shape[::-1] for name, module in model.named_modules() if type(module) is Conv1D}
    # As transformers' own quantiser leaves them out.
    kept = [*get_keys_to_not_convert(model), *(getattr(model, "_keep_in_fp32_modules", None) or ())]
    replace_with_bnb_linear(model, kept, config)
    model.is_loaded_in_4bit = True  # PEFT asks the model
    for name, shape in shapes.items():
        layer: Any = model.get_submodule(name)
        shape = torch.Size(shape)
        if _is_4bit(layer.weight):
            layer.weight = Params4bit(
                torch.empty(-(-shape.numel() // 2), 1, dtype=torch.uint8, device="meta"), requires_grad=False,
                quant_type="nf4", quant_state=_quant_state(shape, dtype), bnb_quantized=True, module=layer,
            )  # fmt: skip
            layer.quant_state = layer.weight.quant_state


def _quant_state(shape: torch.Size, dtype: torch.dtype) -> Any:
    """What bitsandbytes keeps beside the codes of a weight, on the meta device."""
    from bitsandbytes.functional import QuantState

    blocks = -(-shape.numel() // BLOCKSIZE)
    state: Any = QuantState
    with torch.device("meta"):
        nested = state(
            absmax=torch.empty(-(-blocks // NESTED_BLOCKSIZE)), code=torch.empty(256), blocksize=NESTED_BLOCKSIZE,
            dtype=torch.float32,
        )  # fmt: skip
        return state(
            absmax=torch.empty(blocks, dtype=torch.uint8), shape=shape, code=torch.empty(16), blocksize=BLOCKSIZE,
            quant_type="nf4", dtype=dtype, offset=torch.empty(()), state2=nested,
        )  # fmt: skip


class _Fake4bit(FakeTensor):
    pass


_Fake4bit.__name__ = "Params4bit"


def _states(weight: Any) -> Iterator[tuple[Any, str]]:
    """Where a 4-bit weight has its tensors beside the codes."""
    state = weight.quant_state
    yield from ((state, "absmax"), (state, "code"), (state, "offset"), (state.state2, "absmax"), (state.state2, "code"))


def _quantized_stand_in(weight: Any, stand_in: Callable[[Tensor], Tensor]) -> nn.Parameter:
    """A fake tensor with the name of Params4bit's class, by which PEFT knows it, and what one has."""
    made: Any = nn.Parameter(stand_in(weight), requires_grad=False)
    made.__class__ = _Fake4bit
    for name in ("bnb_quantized", "quant_type", "blocksize", "compress_statistics", "quant_storage"):
        setattr(made, name, getattr(weight, name))
    made.quant_state = weight.quant_state
    for owner, name in _states(weight):
        setattr(owner, name, stand_in(getattr(owner, name)))
    result: nn.Parameter = made
    return result


def _adapt(model: Any, recipe: Recipe) -> Any:
    method = {"qlora": "lora", "qdora": "dora", "lora-fa": "lora"}.get(recipe.method, recipe.method)
    if method == "full":
        return model.requires_grad_(True)
    if method == "bitfit":
        if not biases_of(model):
            raise ValueError("it has no biases to train")
        train_biases_only(model)
        return model
    if method in ("houlsby", "pfeiffer"):
        from ..adapters import insert_adapters

        insert_adapters(model, method, bottleneck=recipe.rank, dropout=recipe.dropout)
        return model
    import peft

    task: dict[str, Any] = {"task_type": recipe.head}
    if method in ("lora", "dora"):
        targets = recipe.targets if isinstance(recipe.targets, str) else list(recipe.targets)
        if recipe.head in ("SEQ_CLS", "TOKEN_CLS"):  # PEFT trains such a head as it is, and counts it among all-linear
            task["exclude_modules"] = ["classifier", "score"]
        config: Any = peft.LoraConfig(
            r=recipe.rank, lora_alpha=2 * recipe.rank, lora_dropout=recipe.dropout, target_modules=targets,
            use_dora=method == "dora", **task,
        )  # fmt: skip
    elif method == "ia3":
        config = peft.IA3Config(**task)
    elif method == "prefix":
        config = peft.PrefixTuningConfig(num_virtual_tokens=recipe.rank, **task)
    else:
        config = peft.PromptTuningConfig(num_virtual_tokens=recipe.rank, **task)
    model = peft.get_peft_model(model, config)
    if recipe.method == "lora-fa":
        for name, parameter in model.named_parameters():
            if ".lora_A." in name:
                parameter.requires_grad_(False)
    return model


def in_a_line(error: Exception) -> str:
    """An error of another library in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
