"""Times the kernels: the repository's benchmarks where they are, and else a linear layer with LoRA, stock and fused."""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import cpu, ops
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
    """Forward and backward of one linear layer in NF4 with LoRA; stock dequantises it and computes three products."""
    n, k = options.shape
    dtype = _DTYPES[options.dtype]
    weight = ops.quantize_4bit(torch.randn(n, k, dtype=dtype), double_quant=True)
    lora_A = nn.Parameter(torch.randn(options.rank, k) / k**0.5)
    lora_B = nn.Parameter(torch.randn(n, options.rank))
    x = torch.randn(options.rows, k, dtype=dtype, requires_grad=True)
    grad = torch.randn(options.rows, n, dtype=dtype)

    def stock() -> Tensor:
        y = nn.functional.linear(x, weight.dequantize())
        return y + 2.0 * nn.functional.linear(nn.functional.linear(x.to(lora_A.dtype), lora_A), lora_B).to(dtype)

    def fused() -> Tensor:
        return ops.lora_linear(x, weight, None, [lora_A], [lora_B], [2.0])

    reference = stock().detach().double()
    error = float((fused().detach().double() - reference).norm() / reference.norm())
    if not error < 0.02:
        raise RuntimeError(f"the fused layer differs from stock by {error:.2g}")
    forwards: dict[str, Callable[[], Tensor]] = {"stock": stock, "fused": fused}
    times: dict[str, list[float]] = {name: [] for name in forwards}
    begin = time.perf_counter()
    with progress("rounds", 100) as advance:
        shown = 0
        while (spent := time.perf_counter() - begin) < options.seconds or len(times["fused"]) < _LEAST_ROUNDS:
            for name, forward in forwards.items():  # which take turns, so that a busy machine is so for both
                start = time.perf_counter()
                forward().backward(grad)
                times[name].append(time.perf_counter() - start)
            while shown < 100 * spent / options.seconds:
                advance()
                shown += 1
    medians = {name: statistics.median(each) for name, each in times.items()}
    return {
        "layer": f"NF4 weight of {n}×{k}, LoRA of rank {options.rank}, {options.rows} rows in {options.dtype}",
        "kernels": cpu.isa(),
        "threads": torch.get_num_threads(),
        "rounds": len(times["fused"]),
        "difference_of_results": error,
        "forward_and_backward": [
            {"contender": name, "milliseconds": 1e3 * seconds, "speedup": medians["stock"] / seconds}
            for name, seconds in medians.items()
        ],
        "said": ["This is the built-in comparison of one layer; the repository has benchmarks of everything."],
    }
