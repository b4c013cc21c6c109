"""Times linear layers of given shapes against stock, as `accelerate` does for a model: python -m peft_kernels.tune

What it finds goes into the file that every later `accelerate` reads (see choices.py).
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from . import choices
from .cuda import why_not
from .integrations import LayerReport, Report, accelerate
from .integrations.measuring import SECONDS, measure, name_of
from .integrations.registry import Trial
from .nn import LoRALinear

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class _Dequantized(nn.Module):
    """What bitsandbytes computes, where it is not installed."""

    def __init__(self, layer: LoRALinear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        weight: Any = self.layer.base_weight()
        return F.linear(x, weight.dequantize())


def tune_layers(shapes: Sequence[tuple[int, int]], rank: int, dtype: torch.dtype, device: torch.device,
                seconds: float) -> Report:  # fmt: skip
    """Times bitsandbytes' `Linear4bit`, with PEFT's LoRA on it unless the rank is 0."""
    from bitsandbytes.nn.modules import Linear4bit

    make: Any = Linear4bit
    layers = [make(k, n, bias=False, compute_dtype=dtype, quant_type="nf4") for n, k in shapes]
    model: Any = nn.Sequential(*layers).to(dtype).to(device)
    if rank:
        from peft import LoraConfig, inject_adapter_in_model

        model.is_loaded_in_4bit = True  # PEFT asks the model
        names = [str(number) for number in range(len(layers))]
        model = inject_adapter_in_model(LoraConfig(r=rank, target_modules=names), model)
    return accelerate(model, tune=seconds)


def tune_products(shapes: Sequence[tuple[int, int]], dtype: torch.dtype, device: torch.device,
                  seconds: float) -> Report:  # fmt: skip
    """Times the products alone, which the CUDA kernels have two ways to make."""
    trials = {}
    for n, k in shapes:
        layer = LoRALinear(k, n, 1, bias=False, quantize="nf4", device=device, dtype=dtype)
        trial = Trial(layer, k, dtype, device, (n, k), _Dequantized(layer))
        trials[name_of(trial)] = trial
    machine, entries = choices.machine_of(device), measure(trials, seconds)
    choices.save(machine, entries)
    choices.decide(machine, entries)
    speeds = {
        name: choices.choice_of(entry, trials[name].width, dtype, device.type == "cuda").speed
        for name, entry in entries.items()
    }
    return Report(tuple(LayerReport(name, "", True, "", speed) for name, speed in speeds.items()), "")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m peft_kernels.tune", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add(
        "--shape",
        nargs=2,
        type=int,
        action="append",
        metavar=("N", "K"),
        help="of a weight; may be repeated (4096 4096)",
    )
    add("--rank", type=int, default=16, help="of LoRA; 0 for layers without it (16)")
    add("--dtype", choices=_DTYPES, default="bf16", help="of the inputs and the products (bf16)")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--seconds", type=float, default=SECONDS, help=f"to time for, at most ({SECONDS:.0f})")
    given = parser.parse_args(arguments)
    shapes = given.shape or [(4096, 4096)]
    for n, k in shapes:
        if n < 1 or k < 1:
            parser.error(f"argument --shape: got {n} {k}, wanted two numbers of at least 1")
    if given.rank < 0:
        parser.error(f"argument --rank: got {given.rank}, wanted a number of at least 0")
    if not given.seconds > 0:
        parser.error(f"argument --seconds: got {given.seconds}, wanted a number above 0")
    if given.device == "cuda" and not torch.cuda.is_available():
        sys.exit("peft_kernels.tune: torch finds no CUDA device")
    dtype = _DTYPES[given.dtype]
    for index in range(torch.cuda.device_count() if given.device == "cuda" else 1):
        device = torch.device(given.device, index) if given.device == "cuda" else torch.device("cpu")
        if reason := why_not(device):
            print(f"{device}: {reason}")
            continue
        missing = [
            name for name in ("bitsandbytes", *["peft"] * bool(given.rank)) if not importlib.util.find_spec(name)
        ]
        if missing:
            print(f"without {' and '.join(missing)}: the products alone")
            report = tune_products(shapes, dtype, device, given.seconds)
        else:
            report = tune_layers(shapes, given.rank, dtype, device, given.seconds)
        Console().print(report)
    print(f"kept in {choices.path()}")


if __name__ == "__main__":
    main()
