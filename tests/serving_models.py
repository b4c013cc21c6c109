"""Small models that a pool serves, and adapters for them in PEFT's folders."""

import copy

import torch
from decoding_models import decode, make
from optional import if_installed
from peft_models import randomize

peft = if_installed("peft")

PROMPT = torch.tensor([[5, 9, 11, 7, 3, 20]])
CONFIGS = {
    "plain": {"r": 4},
    "rslora": {"r": 7, "use_rslora": True, "lora_alpha": 3},
    "patterns": {"r": 2, "rank_pattern": {"layers.1.mlp.up_proj": 5, "q_proj": 1}, "alpha_pattern": {"v_proj": 20}},
    "one layer": {"r": 3, "layers_to_transform": [1], "target_modules": ["q_proj", "down_proj"]},
}


def base_model(kind="dense", name="llama", **config):
    torch.manual_seed(0)
    return make(name, kind, lora=False, **config).requires_grad_(False)


def save_adapter(base, folder, seed=0, **config):
    """Writes an adapter, and returns the stock model that has it alone."""
    torch.manual_seed(100 + seed)
    config = peft.LoraConfig(**{"target_modules": "all-linear", "r": 4, "task_type": "CAUSAL_LM"} | config)
    model = peft.get_peft_model(copy.deepcopy(base), config).eval()
    randomize(model)
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def logits(model, rows=1):
    """[rows, vocabulary] after the same prompt for each row."""
    return model(PROMPT.expand(rows, -1), use_cache=False).logits[:, -1]


__all__ = ["CONFIGS", "PROMPT", "base_model", "decode", "logits", "save_adapter"]
