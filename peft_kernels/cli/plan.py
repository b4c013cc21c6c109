"""What fine-tuning a model would take: parameters, and memory with and without the fused kernels. Needs no weights."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..planning.advice import GOALS, TASKS, advise
from .arguments import COUNT, POSITIVE, require
from .output import Bytes, Share, progress

if TYPE_CHECKING:
    from ..planning.model import Recipe

_METHODS = ("lora", "qlora", "dora", "qdora", "lora-fa", "ia3", "prefix", "prompt", "bitfit", "houlsby", "pfeiffer",
            "full")  # fmt: skip
_RANKS = {"prefix": 32, "prompt": 32, "houlsby": 64, "pfeiffer": 64}
_HEADS = {"classification": "SEQ_CLS", "sentiment": "SEQ_CLS", "entities": "TOKEN_CLS"}
# Bytes of states for a parameter with so many bytes and elements; bitsandbytes' 8-bit states have an absmax for 256.
_OPTIMIZERS: dict[str, Callable[[int, int], int]] = {
    "adamw": lambda size, count: 2 * size,
    "adamw8bit": lambda size, count: 2 * (count + 4 * -(-count // 256)) if count >= 4096 else 8 * count,
    "sgd": lambda size, count: 0,
    "momentum": lambda size, count: size,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL", help="a folder with a config.json, or such a file; weights are not read")
    add("--method", choices=_METHODS, default="lora", help="(lora); qlora and qdora have the weights in 4 bits")
    add("--rank", type=COUNT, help="of LoRA (16); the length of a prefix or prompt (32), the width of an adapter (64)")
    add("--targets", metavar="NAMES", default="all-linear", help="LoRA's layers, with commas between (all-linear)")
    add("--tokens", type=COUNT, default=1024, help="of a row (1024)")
    add("--batch", type=COUNT, default=1, help="rows of a step (1)")
    add("--dropout", type=float, default=0.0, help="of the adapters (0)")
    add(
        "--dtype", choices=("bf16", "fp16", "fp32"), default="bf16", help="of the weights that are not in 4 bits (bf16)"
    )
    add("--four-bit", action="store_true", help="linear layers in 4 bits, whatever the method")
    add("--optimizer", choices=_OPTIMIZERS, default="adamw", help="(adamw)")
    add("--checkpointing", action="store_true", help="recompute each layer in the backward")
    add("--memory", type=POSITIVE, metavar="GB", help="how much there is: say what fits")
    add("--task", choices=TASKS, help="what the model is to learn: for advice, and for its head")
    add("--goal", choices=GOALS, help="what matters most: for advice")


def run(options: argparse.Namespace) -> dict[str, Any]:
    require("transformers", "peft", *["bitsandbytes"] * (options.four_bit or options.method in ("qlora", "qdora")))
    if not 0 <= options.dropout < 1:
        raise ValueError(f"dropout: got {options.dropout}, wanted a number from 0 to below 1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other libraries' about what is only planned
        return _plan(options)


def _plan(options: argparse.Namespace) -> dict[str, Any]:
    from ..planning.memory import depths_of, measure
    from ..planning.model import build, elements, read_model_config, weight_sizes

    config = read_model_config(options.model)
    recipe = _recipe(options, config)
    model = build(config, recipe)
    sizes = list(weight_sizes(model))
    trained = [(tensor, size) for _, tensor, size in sizes if tensor.requires_grad]
    base = sum(size for _, tensor, size in sizes if not tensor.requires_grad)
    adapter = sum(size for _, size in trained)
    states = sum(_OPTIMIZERS[options.optimizer](size, tensor.numel()) for tensor, size in trained)
    depths = depths_of(config, model)
    with progress("a step on stand-ins", 2) as advance:
        steps = {}
        for name in ("stock", "fused"):
            steps[name] = measure(config, recipe, depths, name == "fused")
            advance()
    totals = {name: base + adapter + states + step.peak for name, step in steps.items()}

    def row(part: str, stock: int, fused: int | None = None) -> dict[str, Any]:
        return {"part": part, "stock": Bytes(stock), "fused": Bytes(stock if fused is None else fused)}

    memory = Bytes(options.memory * 2**30) if options.memory else None
    count, trainable = sum(elements(tensor) for _, tensor, _ in sizes), sum(tensor.numel() for tensor, _ in trained)
    return {
        "model": f"{config.model_type}, {getattr(config, 'num_hidden_layers', '?')} layers",
        "method": options.method,
        "rank": recipe.rank,
        "rows": options.batch,
        "tokens": options.tokens,
        "parameters": count,
        "trainable_parameters": trainable,
        "share": Share(trainable / count),
        "file": Bytes(adapter),
        "fused_layers": steps["fused"].fused,
        "stock_layers": steps["fused"].left,
        "memory": [
            row("frozen weights", base),
            row("trained weights", adapter),
            row("optimizer", states),
            row("gradients", adapter),
            row("kept for the backward", steps["stock"].kept, steps["fused"].kept),
            row("activations and gradients at their peak", steps["stock"].peak, steps["fused"].peak),
            row("in all, at the peak of a step", totals["stock"], totals["fused"]),
        ],
        **({"available": memory, "fits": {name: total <= memory for name, total in totals.items()}} if memory else {}),
        "advice": [
            *_about_memory(options, recipe.four_bit, memory, totals),
            *advise(options.method, recipe.rank, options.task, options.goal, memory),
        ],
        "not_counted": [
            "what torch, the libraries and a CUDA context take (0.5 to 1 GiB), and buffers inside of kernels",
            *_about_experts(base, [each[1:] for each in sizes if recipe.four_bit and each[1].dim() == 3]),
        ],
    }  # fmt: skip


def _recipe(options: argparse.Namespace, config: Any) -> Recipe:
    """What is to be trained of a model with this config, and how.

    Raises:
        ValueError: an option does not fit the model, or another one.
    """
    from ..planning.model import DTYPES, Recipe

    four_bit = options.four_bit or options.method in ("qlora", "qdora")
    if four_bit and options.method == "full":
        raise ValueError(
            "method: got full with weights in 4 bits, which can't be trained; wanted another, or no --four-bit"
        )
    longest = getattr(config, "max_position_embeddings", None)
    if longest and options.tokens > longest:
        raise ValueError(f"tokens: got {options.tokens}, wanted at most the model's {longest}")
    rank = options.rank or _RANKS.get(options.method, 16)
    generates = "SEQ_2_SEQ_LM" if getattr(config, "is_encoder_decoder", False) else "CAUSAL_LM"
    return Recipe(
        options.method, rank, options.batch, options.tokens, head=_HEADS.get(options.task, generates),
        dtype=DTYPES[options.dtype], four_bit=four_bit, checkpointing=options.checkpointing, dropout=options.dropout,
        targets=options.targets if options.targets == "all-linear" else tuple(options.targets.split(",")),
    )  # fmt: skip


def _about_experts(base: int, stacks: list[tuple[Any, int]]) -> list[str]:
    """What transformers leaves as it is when it loads a model in 4 bits."""
    from ..planning.model import bytes_of_4bit

    saved = sum(size - bytes_of_4bit(stack.numel()) for stack, size in stacks if not stack.requires_grad)
    if not saved:
        return []
    return [
        "the experts' stacks are in 4 bits only after bitsandbytes' replace_parameter_4bit, and are counted without "
        f"it: with it, the frozen weights take {Bytes(base - saved)}"
    ]


def _about_memory(
    options: argparse.Namespace, four_bit: bool, memory: Bytes | None, totals: dict[str, int]
) -> list[str]:
    if memory is None:
        return []
    if totals["fused"] > memory:
        ways = ["--method qlora"] * (not four_bit) + ["--checkpointing"] * (not options.checkpointing)
        ways += ["fewer rows with gradient accumulation"] * (options.batch > 1) + ["fewer --tokens"]
        return [f"It does not fit into {memory}: try {', or '.join(ways)}."]
    if totals["stock"] > memory:
        return [f"It fits into {memory} with the fused kernels, and does not without them."]
    return []
