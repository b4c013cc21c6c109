"""Where the time of single calls goes: the counters of kernels, and which attention runs."""

from __future__ import annotations

import csv
import io
import os
import sys
from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor

from benchmarks.card.correctness import on, program_within
from benchmarks.card.machine import find_tool
from benchmarks.card.run import FAILED, TAIL, Context, NotHereError, Record

# ---- ncu ------------------------------------------------------------------------------------------------------------

SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "WarpStateStats", "Occupancy", "LaunchStats")
# What is kept of them; the names are ncu's.
METRICS = (
    "Duration", "Compute (SM) Throughput", "Memory Throughput", "DRAM Throughput", "L2 Cache Throughput",
    "L1/TEX Cache Throughput", "L1/TEX Hit Rate", "L2 Hit Rate", "Mem Busy", "Max Bandwidth", "Mem Pipes Busy",
    "Warp Cycles Per Issued Instruction", "Achieved Occupancy", "Theoretical Occupancy", "Registers Per Thread",
    "Waves Per SM", "Grid Size", "Block Size", "SM Frequency", "DRAM Frequency",
)  # fmt: skip


def counters(context: Context) -> None:
    """One launch each of about ten kernels, see `profiled`."""
    program = find_tool("ncu")
    if not program:
        raise NotHereError("ncu is not installed")

    def run() -> Record:
        command = [program, "--profile-from-start", "off", "--target-processes", "all", "--csv", "--page", "details"]
        command += [part for section in SECTIONS for part in ("--section", section)]
        command += [sys.executable, "-m", "benchmarks.card.profile"]
        status, output = program_within(command, context.left(), os.environ | {"PYTHONUNBUFFERED": "1"})
        launches = read_counters(output)
        for launch in launches:
            context.record("launch", **launch)
        if not launches:
            if "ERR_NVGPUCTRPERM" in output:
                raise NotHereError("ncu may not read the counters: ERR_NVGPUCTRPERM, only an administrator may here")
            if status is None:
                raise NotHereError("the step's time was up before it was ready")
            return {"status": FAILED, "reason": f"ncu: exit status {status}", "output": output[-TAIL:]}
        return {"text": f"{len(launches)} launches"}

    context.run("check", [("ncu", run)])


def read_counters(output: str) -> list[Record]:
    """The launches in what ncu prints as CSV: their names, and the metrics that are kept."""
    start = output.find('"ID"')
    found: dict[str, Record] = {}
    for row in csv.DictReader(io.StringIO(output[start:])) if start >= 0 else ():
        name, value = row.get("Metric Name"), row.get("Metric Value")
        if not (row.get("ID") or "").isdigit() or not row.get("Kernel Name"):
            continue
        launch = found.setdefault(row["ID"], {"name": row["Kernel Name"][:200], "metrics": {}})
        if name in METRICS and value is not None:
            with suppress(ValueError):
                launch["metrics"][f"{name} ({row['Metric Unit']})"] = float(value.replace(",", ""))
    return list(found.values())


def profiled() -> list[tuple[str, Callable[[], object]]]:
    """The calls whose launches ncu looks at: decoding, the products of few and of many rows, the passes over memory."""
    from benchmarks.card.hardware import layer
    from peft_kernels.ops import cross_entropy, glu, quantize_4bit, rms_norm

    weight = quantize_4bit(torch.randn(4096, 4096).bfloat16())
    x, w = torch.randn(4096, 4096).bfloat16(), torch.ones(4096).bfloat16()
    logits, targets = torch.randn(1024, 128256).bfloat16(), torch.randint(128256, (1024,))
    calls: dict[str, Callable[[], object]] = {
        f"M={m} 4096x4096": layer(m, 4096, 4096, training=False)[0] for m in (1, 16, 32, 64, 128)
    }
    calls["dequantise"] = weight.dequantize
    calls["backward M=64"] = layer(64, 4096, 4096)[0]
    calls["rms_norm"] = lambda: rms_norm(x, w)
    calls["glu"] = lambda: glu(x, x)
    calls["cross_entropy"] = lambda: cross_entropy(logits, targets)
    return list(calls.items())


def main() -> None:
    """What ncu runs: each call once before it looks, and once while it does."""
    with torch.device("cuda"):
        for _, call in profiled():
            call()
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
            call()
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()


# ---- Attention ------------------------------------------------------------------------------------------------------


def table_of(context: Context, call: Callable[[], object], rows: int = 25) -> tuple[str, list[str]]:
    """torch's profile of a call: its table, and the operations and kernels that are named after attention."""
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (context.device == "cuda")
    with profile(activities=kinds) as profiler:
        call()
        if context.device == "cuda":
            torch.cuda.synchronize()
    averages = profiler.key_averages()
    order = "self_device_time_total" if context.device == "cuda" else "self_cpu_time_total"
    ordered = sorted(averages, key=lambda event: -getattr(event, order))
    lines = [
        f"{getattr(event, order) / 1e3:9.3f} ms {event.count:6} x  {event.key[:110]}"
        for event in ordered[:rows] if getattr(event, order) > 0
    ]  # fmt: skip
    names = sorted({event.key[:160] for event in averages if is_attention(event.key)})
    return "\n".join(lines), names


def is_attention(name: str) -> bool:
    """Of an operation or a kernel; autograd's names for what calls them say nothing more."""
    known = any(word in name.lower() for word in ("attention", "flash", "fmha", "sdpa"))
    return known and not ("autograd::" in name or "Backward" in name or name.startswith("_"))


def backends(context: Context) -> None:
    """Which of torch's attentions run, causal, with a mask, and with grouped heads; and this package's."""
    import torch.nn.functional as F

    from peft_kernels.ops import ia3_attention

    length, dim = (16, 16) if context.is_rehearsal else (1024, 128)

    def heads(count: int) -> Tensor:
        return torch.randn(1, count, length, dim).bfloat16().requires_grad_()

    def run(kv: int, masked: bool, own: bool) -> Record:
        with on(context):
            q, k, v = heads(8), heads(kv), heads(kv)
            mask = torch.ones(length, length, dtype=torch.bool).tril() if masked else None

            def call() -> None:
                if own:
                    out = ia3_attention(q, k, v, causal=True)
                else:
                    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=not masked, enable_gqa=kv != 8)
                out.sum().backward()

            call()
            _, names = table_of(context, call)
        return {"attention": names}

    context.run("backend", {
        "causal": lambda: run(8, False, False),
        "causal, grouped heads": lambda: run(2, False, False),
        "with a mask": lambda: run(8, True, False),
        "with a mask, grouped heads": lambda: run(2, True, False),
        "this package's, grouped heads": lambda: run(2, False, True),
    }.items())  # fmt: skip


if __name__ == "__main__":
    main()
