"""Measures on this machine's cards where the library's product overtakes the fused one: python -m peft_kernels.tune

The result goes to a file (see tuned.py) that every later import reads.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _extension, tuned
from .cuda import why_not
from .ops import NF4Weight, lora_linear, quantize_4bit

ROWS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536)
ALWAYS_FUSED, NEVER_FUSED = 2**62, 0


def find_crossover(rows: Sequence[int], fused: Sequence[float], library: Sequence[float]) -> int:
    """The most rows for which the fused product is still faster, between the two measured ones where that changes.

    Where the times of both change places more than once, by noise, the first time counts: beyond it little is lost.
    """
    last = 0
    for m, fused_seconds, library_seconds in zip(rows, fused, library, strict=True):
        if fused_seconds >= library_seconds:
            return (last + m) // 2 if last else 0
        last = m
    return last


def seconds_on_device(call: Callable[[], object], repeat: int = 20, rounds: int = 7) -> float:
    """Of one call, without the host's share: repeated in a CUDA graph; the median of several rounds."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeat):
            call()
    samples = []
    for _ in range(rounds):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        samples.append(begin.elapsed_time(end) / 1e3 / repeat)
    result: float = statistics.median(samples)
    return result


def forward(weight: NF4Weight, x: Tensor) -> Callable[[], object]:
    return lambda: lora_linear(x, weight)


def backward(weight: NF4Weight, x: Tensor) -> Callable[[], object]:
    """dx alone: everything else that a backward computes is the same for both products."""
    grad_y = torch.randn(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
    return lambda: torch.ops.peft_kernels.lora_linear_backward(
        grad_y, None, None, *weight.arguments, (), (), (), True, (), (), compute_dtype=x.dtype, x_dtype=x.dtype
    )


def tune(n: int, k: int, say: Callable[[str], None]) -> None:
    """Measures both directions on the current device, and stores the crossovers."""
    name = torch.cuda.get_device_name()
    say(f"{name}: weight {n} x {k}, NF4, bf16")
    weight = quantize_4bit(torch.randn(n, k, dtype=torch.bfloat16, device="cuda"))
    entry: dict[str, Any] = {"torch": torch.__version__, "shape": [n, k], "seconds": {"rows": ROWS}}
    for direction in (forward, backward):
        times = {}
        for kind, crossover in (("fused", ALWAYS_FUSED), ("library", NEVER_FUSED)):
            tuned.set_crossover(name, crossover, crossover)
            calls = (direction(weight, torch.randn(m, k, dtype=torch.bfloat16, device="cuda")) for m in ROWS)
            times[kind] = [seconds_on_device(call) for call in calls]
        entry[direction.__name__] = find_crossover(ROWS, **times)
        entry["seconds"][direction.__name__] = times
        for m, fused_seconds, library_seconds in zip(ROWS, *times.values(), strict=True):
            say(f"  {direction.__name__} {m:5} rows: {fused_seconds * 1e6:8.1f} µs, {library_seconds * 1e6:8.1f} µs")
        say(f"  {direction.__name__}: the fused product up to {entry[direction.__name__]} rows")
    tuned.set_crossover(name, entry["forward"], entry["backward"])
    say(f"stored in {tuned.save(name, entry)}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m peft_kernels.tune", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--shape", nargs=2, type=int, default=(4096, 4096), metavar=("N", "K"), help="of the weight (4096 4096)")
    given = parser.parse_args(arguments)
    n, k = given.shape
    if n < 1 or k < 1:
        parser.error(f"argument --shape: got {n} {k}, wanted two numbers of at least 1")
    if not _extension.build_info["cuda"]:
        sys.exit("peft_kernels.tune: this build has no CUDA kernels; PEFT_KERNELS_CUDA=1 pip install . makes one")
    if not torch.cuda.is_available():
        sys.exit("peft_kernels.tune: torch finds no CUDA device")
    for device in range(torch.cuda.device_count()):
        if reason := why_not(torch.device("cuda", device)):
            print(f"{torch.cuda.get_device_name(device)}: {reason}")
            continue
        with torch.cuda.device(device):
            tune(n, k, print)


if __name__ == "__main__":
    main()
