"""Checkpoints and adapters on disk, and what the stock model of them computes with."""

from pathlib import Path

import torch
from optional import if_installed
from safetensors.torch import load_file
from tiny_models import tiny
from torch import Tensor, nn

peft, transformers = map(if_installed, ("peft", "transformers"))

PROMPT = torch.tensor([[5, 9, 11, 7, 3, 20]])
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def save_base(folder: Path, model: nn.Module | str = "llama", dtype=torch.bfloat16, shards=4, **config) -> Path:
    """Writes a model, in about as many files, and returns the folder."""
    torch.manual_seed(0)
    model = tiny(model, **config) if isinstance(model, str) else model
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.1, 0.3)
    model = model.to(dtype)
    size = sum(parameter.nbytes for parameter in model.parameters())
    model.save_pretrained(folder, max_shard_size=size // shards)
    return folder


def save_adapter(base: Path, folder: Path, config=None, seed=1, **options) -> Path:
    """Writes an adapter that changes what it can."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = config or peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": LINEAR} | options)
    model = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            near_one = "ia3_l" in name or "magnitude" in name
            parameter.data.mul_(1 + 0.3 * noise) if near_one else parameter.data.add_(0.2 * noise)
    model.save_pretrained(folder)
    return folder


def stock(base: Path, *adapters: Path, dtype=torch.float64) -> nn.Module:
    """PEFT's model of a checkpoint with its adapters active, not merged."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=dtype, attn_implementation="eager")
    for i, folder in enumerate(adapters):
        if i == 0:
            model = peft.PeftModel.from_pretrained(model, folder, adapter_name="0", autocast_adapter_dtype=False)
        else:
            model.load_adapter(folder, str(i), autocast_adapter_dtype=False)
    if len(adapters) > 1:
        model.base_model.set_adapter([str(i) for i in range(len(adapters))])
    return model.to(dtype).eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(PROMPT, use_cache=False).logits


def load(folder: Path, dtype=torch.float64, **options) -> nn.Module:
    options = {"dtype": dtype, "attn_implementation": "eager"} | options
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options)


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@torch.no_grad()
def effective(model: nn.Module) -> dict[str, Tensor]:
    """The weights and biases that each layer of an unmerged model multiplies with, found by what it gives for e_i."""
    found: dict[str, Tensor] = {}
    for name, module in model.base_model.model.named_modules():
        base = getattr(module, "base_layer", None)
        if isinstance(module, peft.tuners.lora.layer.ParamWrapper):
            with module._activate_lora(module.active_adapters):
                found[f"{name.replace('.base_layer', '')}.{module.parameter_name}"] = module.get_param().clone()
        elif isinstance(base, nn.Embedding):
            found[f"{name}.weight"] = module(torch.arange(base.num_embeddings))
        elif base is not None and base.weight.dim() == 2:
            is_conv1d = not isinstance(base, nn.Linear)
            width = base.weight.shape[0 if is_conv1d else 1]
            bias = module(torch.zeros(1, width, dtype=base.weight.dtype))[0]
            weight = module(torch.eye(width, dtype=base.weight.dtype)) - bias
            found[f"{name}.weight"] = weight if is_conv1d else weight.T
            if base.bias is not None:
                found[f"{name}.bias"] = bias
    return found


def assert_rounded_once(actual: Tensor, exact: Tensor, name: str = "") -> None:
    """Whether each number is one of the two that are nearest to the exact one, and as good as the nearest."""
    info = torch.finfo(actual.dtype)
    assert actual.shape == exact.shape, name
    unit = torch.ldexp(torch.ones_like(exact), torch.frexp(exact)[1] - 1) * info.eps
    excess = ((actual.double() - exact).abs() / unit.clamp(min=info.tiny * info.eps)).max().item()
    assert excess <= 0.5 + 1e-3, f"{name}: {excess} units in the last place"
