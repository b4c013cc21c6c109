"""Times linear layers of given shapes against stock, as `optimize` does for a model: python -m peft_kernels.tune

What it finds goes into the file that every later `optimize` reads (see choices.py).
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from . import choices
from .cli.arguments import COUNT, NUMBER, POSITIVE
from .cuda import why_not
from .integrations import LayerReport, Report, optimize
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
    return optimize(model, tune=seconds)


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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--shape",
        nargs=2,
        type=COUNT,
        action="append",
        metavar=("N", "K"),
        help="of a weight; may be repeated (4096 4096)",
    )
    add("--rank", type=NUMBER, default=16, help="of LoRA; 0 for layers without it (16)")
    add("--dtype", choices=_DTYPES, default="bf16", help="of the inputs and the products (bf16)")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--seconds", type=POSITIVE, default=SECONDS, help=f"to time for, at most ({SECONDS:.0f})")


def run(options: argparse.Namespace) -> Iterator[tuple[torch.device, str, Report | None]]:
    """Yields each device, a remark, and what was found, if the device has fused kernels.

    Raises:
        ValueError: torch finds no such device.
    """
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: got cuda, but torch finds no CUDA device")
    shapes, dtype = [(n, k) for n, k in options.shape or [(4096, 4096)]], _DTYPES[options.dtype]
    for index in range(torch.cuda.device_count() if options.device == "cuda" else 1):
        device = torch.device(options.device, index) if options.device == "cuda" else torch.device("cpu")
        if reason := why_not(device):
            yield device, f"{device}: {reason}", None
            continue
        missing = [
            name for name in ("bitsandbytes", *["peft"] * bool(options.rank)) if not importlib.util.find_spec(name)
        ]
        if missing:
            remark = f"without {' and '.join(missing)}: the products alone"
            yield device, remark, tune_products(shapes, dtype, device, options.seconds)
        else:
            yield device, "", tune_layers(shapes, options.rank, dtype, device, options.seconds)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m peft_kernels.tune", description=__doc__.splitlines()[0])
    add_arguments(parser)
    try:
        for _, remark, report in run(parser.parse_args(arguments)):
            if remark:
                print(remark)
            if report:
                Console().print(report)
    except ValueError as error:
        sys.exit(f"peft_kernels.tune: {error}")
    print(f"kept in {choices.path()}")


if __name__ == "__main__":
    main()
