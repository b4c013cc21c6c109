"""A model of four layers with random weights: a training step and decoding, stock and accelerated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.card.clock import host_seconds
from benchmarks.card.correctness import emulating
from benchmarks.card.machine import has, need
from benchmarks.card.profile import table_of
from benchmarks.card.run import FAILED, TAIL, Context, NotHereError, Record

LLAMA_8B = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 4,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192,
}  # fmt: skip
TINY = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
RANK = 16
TOLERANCE = 0.05  # of the logits, which both make of several layers in bf16, in other orders


class Stock(nn.Module):
    """What a LoRALinear computes, spelled out in torch: for machines without bitsandbytes or PEFT."""

    def __init__(self, fused: nn.Module) -> None:
        super().__init__()
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        layer = self.fused
        branch = F.linear(F.linear(x.float(), layer.lora_A), layer.lora_B)
        return F.linear(x, layer.base_weight().dequantize()) + layer.scaling * branch.to(x.dtype)


def is_stock_there() -> bool:
    return has("bitsandbytes") and has("peft")


def make_model(sizes: dict[str, Any], device: str) -> nn.Module:
    """A Llama in 4 bits under LoRA: of bitsandbytes' and PEFT's layers, or where they are missing of `Stock`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig(**sizes, attn_implementation="sdpa")).bfloat16().requires_grad_(False)
    make = quantized if is_stock_there() else spelled_out
    for module in list(model.model.layers.modules()):
        for name, linear in list(module.named_children()):
            if type(linear) is nn.Linear:
                setattr(module, name, make(linear))
    if is_stock_there():
        from peft import LoraConfig, get_peft_model

        model.is_loaded_in_4bit = True
        config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # as after some training: zeros would hide A's gradient
            nn.init.normal_(parameter, std=0.02)
    return model


def quantized(linear: nn.Linear) -> nn.Module:
    import bitsandbytes as bnb

    n, k = linear.weight.shape
    layer = bnb.nn.Linear4bit(k, n, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", device="meta")
    layer.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4",
                                     compress_statistics=True)  # fmt: skip
    return layer.to(linear.weight.device)


def spelled_out(linear: nn.Linear) -> nn.Module:
    from peft_kernels.nn import LoRALinear

    return Stock(LoRALinear.from_linear(linear, RANK, 2 * RANK, quantize="nf4", double_quant=True))


def optimize(model: nn.Module) -> str:
    """What the package says of it."""
    import peft_kernels

    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Stock):
                setattr(module, name, child.fused)
    return str(peft_kernels.optimize(model))


def measure(context: Context) -> None:
    """A training step and decoding of a model, stock and then accelerated, and whether both give the same."""
    need("transformers")
    tiny = context.is_rehearsal
    device = context.tensors_on
    batch, length, generated = (2, 9, 3) if tiny else (2, 2048, 32)
    context.record("note", name="stock", text="bitsandbytes and PEFT" if is_stock_there() else "spelled out in torch")
    made = make_model(TINY if tiny else LLAMA_8B, device)
    optimizer = torch.optim.SGD([p for p in made.parameters() if p.requires_grad], lr=0.0)
    ids = torch.randint(TINY["vocab_size"], (batch, length), device=device)
    prompt, last = ids[:1, : length // 8 + 1], {}

    def step() -> None:
        made(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def logits() -> Tensor:
        with torch.no_grad():
            return made(input_ids=ids[:1], logits_to_keep=64).logits.double()

    def decode() -> None:
        with torch.inference_mode():
            made.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=generated,
                          min_new_tokens=generated, do_sample=False, pad_token_id=0)  # fmt: skip

    def run(name: str, what: str, call: Callable[[], object], each: int) -> Record:
        with emulating(context):
            made.train(what == "training step")
            call()
            seconds = host_seconds(call, context.device, 1 if tiny else 3)
            if context.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
                call()
                torch.cuda.synchronize()
            table, attention = table_of(context, call)
            if what == "training step":
                last[name] = logits()
        fields: Record = {"contender": name, "what": what, "median": sorted(seconds)[len(seconds) // 2],
                          "tokens": each, "table": table, "attention": attention}  # fmt: skip
        if context.device == "cuda":
            fields["peak_bytes"] = torch.cuda.max_memory_allocated()
        return fields

    def both(name: str) -> Sequence[tuple[str, Callable[[], Record]]]:
        return [
            (f"training step, {name}", lambda: run(name, "training step", step, batch * length)),
            (f"decoding, {name}", lambda: run(name, "decoding", decode, generated)),
        ]

    def compare() -> Record:
        if last.keys() != {"stock", "accelerated"}:
            raise NotHereError("one of the two has no logits")
        error = float((last["accelerated"] - last["stock"]).norm() / last["stock"].norm())
        if not error <= TOLERANCE:
            return {"status": FAILED, "reason": f"logits that differ by {error:.3g}, wanted {TOLERANCE:g} at most"}
        return {"text": f"logits that differ by {error:.3g}"}

    done = [("optimize", lambda: {"text": optimize(made)[-TAIL:]}), *both("accelerated"), ("same logits", compare)]
    context.run("model", [*both("stock"), *done])
