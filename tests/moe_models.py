"""Tiny mixtures of experts: models of transformers by their configurations, and their layers of experts alone."""

import importlib
import re
from types import SimpleNamespace
from typing import Any

import torch
from optional import if_installed
from torch import Tensor, nn

bnb, peft, transformers = map(if_installed, ("bitsandbytes", "peft", "transformers"))

VOCABULARY = 60
EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 5, 2, 64, 128

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "num_experts_per_tok": TOP_K,
}
_MOE = _SIZES | {"intermediate_size": 48, "moe_intermediate_size": INTERMEDIATE}
_LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
           "num_key_value_heads": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
           "n_routed_experts": EXPERTS, "n_shared_experts": 1, "num_local_experts": EXPERTS}  # fmt: skip
# The configuration of a causal language model, by its type.
CONFIGS: dict[str, dict[str, Any]] = {
    "mixtral": {**_SIZES, "intermediate_size": INTERMEDIATE, "num_local_experts": EXPERTS},
    "qwen2_moe": {**_MOE, "num_experts": EXPERTS, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {**_MOE, "num_experts": EXPERTS, "head_dim": 8},
    "olmoe": {**_SIZES, "intermediate_size": INTERMEDIATE, "num_experts": EXPERTS},
    "deepseek_v2": {**_MOE, **_LATENT},
    "deepseek_v3": {**_MOE, **_LATENT},
    "gpt_oss": {**_SIZES, "intermediate_size": INTERMEDIATE, "num_local_experts": EXPERTS, "head_dim": 8},
    "granitemoe": {**_SIZES, "intermediate_size": INTERMEDIATE, "num_local_experts": EXPERTS},
    "phimoe": {**_SIZES, "intermediate_size": INTERMEDIATE, "num_local_experts": EXPERTS},
    "glm4_moe": {**_MOE, "n_routed_experts": EXPERTS, "num_local_experts": EXPERTS, "n_shared_experts": 1,
                 "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "head_dim": 8},
    "llama4_text": {**_SIZES, "intermediate_size": INTERMEDIATE, "intermediate_size_mlp": 48, "head_dim": 8,
                    "num_local_experts": EXPERTS, "num_experts_per_tok": 1},
    "jetmoe": {**_SIZES, "intermediate_size": INTERMEDIATE, "num_local_experts": EXPERTS, "kv_channels": 32},
}  # fmt: skip


def tiny_moe(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> nn.Module:
    """A causal language model in evaluation mode, with weights that matter in every part."""
    config = transformers.AutoConfig.for_model(name, **(CONFIGS[name] | changes))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.7 * parameter.shape[-1] ** -0.5)
    return model.to(dtype)


def targets(name: str) -> list[str]:
    """PEFT's names of the stacks of a model."""
    if name == "jetmoe":
        return ["input_linear.weight", "output_linear.weight"]
    return ["experts.gate_up_proj", "experts.down_proj"]


def experts_of(model: nn.Module) -> list[nn.Module]:
    """The layers of experts of a model."""
    return [module for module in model.modules() if re.search("Experts$", type(module).__name__)]


def experts_layer(name: str, implementation: str = "grouped_mm", dtype: torch.dtype = torch.float32) -> nn.Module:
    """A layer of experts by itself, from 'model:class', with random weights."""
    model, _, class_name = name.partition(":")
    cls = getattr(importlib.import_module(f"transformers.models.{model}.modeling_{model}"), class_name)
    sizes = {
        "hidden_size": HIDDEN,
        "moe_hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "moe_intermediate_size": INTERMEDIATE,
        "moe_latent_size": None,
    }
    counts = dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), EXPERTS)
    gates = {
        "hidden_act": "silu",
        "hidden_activation": "gelu_pytorch_tanh",
        "mlp_hidden_act": "relu2",
        "swiglu_limit": 1.5,
        "swiglu_alpha": 1.7,
        "mlp_gate_softcap": 4.0,
        "mlp_up_softcap": 4.0,
    }
    config = SimpleNamespace(**sizes, **counts, **gates, post_norm_eps=1e-6, _experts_implementation=implementation)
    layer = cls(EXPERTS, HIDDEN, INTERMEDIATE) if model == "jetmoe" else cls(config)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=HIDDEN**-0.5)
    return layer.to(dtype)


def routed(tokens: int = 9, dtype: torch.dtype = torch.float32, top_k: int = TOP_K) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs of a layer of experts, the last of which has no tokens."""
    index = torch.rand(tokens, EXPERTS - 1).argsort(1)[:, :top_k]
    return torch.randn(tokens, HIDDEN).to(dtype), index, torch.rand(tokens, top_k).to(dtype)


def inputs_of(
    layer: nn.Module, tokens: int = 9, dtype: torch.dtype = torch.float32, top_k: int = TOP_K
) -> tuple[Any, ...]:
    """What a layer of experts is called with."""
    x, index, weights = routed(tokens, dtype, top_k)
    name = type(layer).__name__.removeprefix("Parametrized")
    if name == "Llama4TextExperts":
        return (torch.randn(tokens * EXPERTS, HIDDEN).to(dtype),)
    if name == "JetMoeParallelExperts":
        return x, torch.bincount(index[:, 0], minlength=EXPERTS).tolist()
    return x, index, weights


def differentiate(
    layer: nn.Module, inputs: tuple[Any, ...], autocast: bool = False, seed: int = 3
) -> dict[str, Tensor]:
    """The output of a layer, under autocast or not, and the gradients of its inputs and of its parameters."""
    layer.zero_grad()
    inputs = tuple(
        value.detach().clone().requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value
        for value in inputs
    )
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = layer(*inputs)
    grad_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed))
    y.backward(grad_y.to(y.dtype))
    results = {"y": y.detach()}
    results |= {f"input {i}": value.grad for i, value in enumerate(inputs) if getattr(value, "grad", None) is not None}
    return results | {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}


def step(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """The loss, the logits and every gradient, by name; what a router draws is the same each time."""
    torch.manual_seed(2)
    model.zero_grad()
    outputs = model(input_ids=ids, labels=ids)
    outputs.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": outputs.loss.detach(), "logits": outputs.logits.detach(), **gradients}


def token_ids(batch: int = 2, length: int = 9) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, length))
