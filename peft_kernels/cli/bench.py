"""Times the kernels: the repository's benchmarks where they are, and else a linear layer with LoRA, stock and fused."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import cpu, ops
from ..choices import FUSED, STOCK
from ..integrations.measuring import rounds, typical
from .arguments import COUNT, POSITIVE
from .output import progress

_ROOT = Path(__file__).parent.parent.parent  # of the repository, if the package is not installed without it
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_LEAST_ROUNDS = 3
_STDERR = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("name", nargs="?", help="of one of the repository's benchmarks, with its options after it; by default a layer")
    add("rest", nargs=argparse.REMAINDER, metavar="...", help=argparse.SUPPRESS)
    add("--shape", nargs=2, type=COUNT, default=(4096, 4096), metavar=("N", "K"), help="of the weight (4096 4096)")
    add("--rows", type=COUNT, default=256, help="of the input (256)")
    add("--rank", type=COUNT, default=16, help="of LoRA (16)")
    add("--dtype", choices=_DTYPES, default="bf16", help="(bf16)")
    add("--seconds", type=POSITIVE, default=10.0, help="to time for, about (10)")


def run(options: argparse.Namespace) -> dict[str, Any]:
    return _layer(options) if options.name is None else _of_repository(options)


def _of_repository(options: argparse.Namespace) -> dict[str, Any]:
    if not ((_ROOT / "benchmarks/__main__.py").is_file() and (_ROOT / "csrc").is_dir()):
        raise ValueError(
            f"name: got {options.name}, but benchmarks are in the repository, and this package is installed"
        )
    command = [sys.executable, "-m", "benchmarks", options.name, *options.rest]
    # What it prints goes past this command, and with --json not into what is printed here.
    done = subprocess.run(command, cwd=_ROOT, stdout=_STDERR if options.json else None)
    if done.returncode:
        raise ValueError(f"the benchmark {options.name} ended with the status {done.returncode}")
    return {"ran": " ".join(["python -m benchmarks", options.name, *options.rest])}


def _layer(options: argparse.Namespace) -> dict[str, Any]:
    forwards, grad = _forwards(options)
    reference = forwards[STOCK]().detach().double()
    error = float((forwards[FUSED]().detach().double() - reference).norm() / reference.norm())
    if not error < 0.02:
        raise RuntimeError(f"the fused layer differs from stock by {error:.2g}")
    taken = _rounds({name: partial(_seconds, forward, grad) for name, forward in forwards.items()}, options.seconds)
    found = typical(taken)
    n, k = options.shape
    return {
        "layer": f"NF4 weight of {n}×{k}, LoRA of rank {options.rank}, {options.rows} rows in {options.dtype}",
        "kernels": cpu.isa(),
        "threads": torch.get_num_threads(),
        "rounds": len(taken),
        "difference_of_results": error,
        "forward_and_backward": [
            {"contender": name, "milliseconds": 1e3 * seconds, "speedup": found[STOCK] / seconds}
            for name, seconds in found.items()
        ],
        "said": ["This is the built-in comparison of one layer; the repository has benchmarks of everything."],
    }


def _forwards(options: argparse.Namespace) -> tuple[dict[str, Callable[[], Tensor]], Tensor]:
    """One linear layer in NF4 with LoRA, which stock dequantises for three products; and its output's gradient."""
    n, k = options.shape
    dtype = _DTYPES[options.dtype]
    weight = ops.quantize_4bit(torch.randn(n, k, dtype=dtype), double_quant=True)
    lora_A = nn.Parameter(torch.randn(options.rank, k) / k**0.5)
    lora_B = nn.Parameter(torch.randn(n, options.rank))
    x = torch.randn(options.rows, k, dtype=dtype, requires_grad=True)

    def stock() -> Tensor:
        y = F.linear(x, weight.dequantize())
        return y + 2.0 * F.linear(F.linear(x.to(lora_A.dtype), lora_A), lora_B).to(dtype)

    def fused() -> Tensor:
        return ops.lora_linear(x, weight, None, [lora_A], [lora_B], [2.0])

    return {STOCK: stock, FUSED: fused}, torch.randn(options.rows, n, dtype=dtype)


def _rounds(calls: dict[str, Callable[[], float]], seconds: float) -> list[dict[str, float]]:
    """Rounds of calls, for about so many seconds."""
    taken: list[dict[str, float]] = []
    begin, shown = time.perf_counter(), 0
    with progress("rounds", 100) as advance:
        for each in rounds(calls):
            taken.append(each)
            spent = time.perf_counter() - begin
            due = min(int(100 * spent / seconds), 100)
            for _ in range(shown, due):
                advance()
            shown = due
            if spent >= seconds and len(taken) >= _LEAST_ROUNDS:
                break
    return taken


def _seconds(forward: Callable[[], Tensor], grad: Tensor) -> float:
    begin = time.perf_counter()
    forward().backward(grad)
    return time.perf_counter() - begin
