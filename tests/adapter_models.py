"""Tiny models with random weights for each make of layer that adapters are inserted into, and AdapterHub's files."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaForTokenClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

HUB = Path(__file__).parent / "adapterhub"
ADAPTER = "adapter_config.json", "adapter.safetensors"
FUSION = "adapter_fusion_config.json", "model_adapter_fusion.safetensors"

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TEXT = {"vocab_size": 40, "max_position_embeddings": 32}
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}

MAKERS = {
    "bert": lambda: BertForSequenceClassification(BertConfig(**SIZES, **TEXT)),
    "roberta": lambda: RobertaForTokenClassification(RobertaConfig(**SIZES, **TEXT)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, **TEXT, **GROUPED)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, **TEXT, **GROUPED)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, **TEXT, **GROUPED)),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=40, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
    ),
    "vit": lambda: ViTForImageClassification(ViTConfig(**SIZES, image_size=8, patch_size=4)),
}


def make_model(name: str) -> nn.Module:
    """A model in evaluation mode."""
    return MAKERS[name]().eval()


def make_inputs(name: str, rows: int = 3) -> dict[str, torch.Tensor]:
    if name == "vit":
        return {"pixel_values": torch.randn(rows, 3, 8, 8)}
    inputs = {"input_ids": torch.randint(3, 40, (rows, 6))}
    return inputs | ({"decoder_input_ids": torch.randint(3, 40, (rows, 4))} if name == "t5" else {})


def randomize(model: nn.Module, *names: str, std: float = 0.3) -> None:
    """Gives the layers of adapters and fusions values that are not zero."""
    for path, parameter in model.named_parameters():
        if any(f"adapters.{name}." in path or f"fusions.{name}." in path for name in names):
            nn.init.normal_(parameter, std=std)


def hub_model(name: str, folder: Path) -> nn.Module:
    """The model that AdapterHub's file is of, in today's transformers."""
    tensors = {
        key.removeprefix("model/"): value
        for key, value in load_file(HUB / f"{name}.safetensors").items()
        if key.startswith("model/")
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(hub_texts(name)["model"])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return AutoModel.from_pretrained(folder, config=AutoConfig.from_pretrained(folder)).eval()


def hub_texts(name: str) -> dict[str, str]:
    with safe_open(HUB / f"{name}.safetensors", "pt") as file:
        return file.metadata()


def hub_part(name: str, part: str) -> dict[str, torch.Tensor]:
    """The inputs, the outputs, or an adapter's weights of AdapterHub's file."""
    tensors = load_file(HUB / f"{name}.safetensors")
    return {key.removeprefix(f"{part}/"): value for key, value in tensors.items() if key.startswith(f"{part}/")}


def hub_checkpoint(name: str, adapter: str, folder: Path, **changes) -> Path:
    """A folder as AdapterHub saved it, with changes to its configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    config, weights = FUSION if adapter == "fusion" else ADAPTER
    described = json.loads(hub_texts(name)[adapter])
    described["config"] |= changes
    (folder / config).write_text(json.dumps(described))
    save_file(hub_part(name, adapter), folder / weights)
    return folder
