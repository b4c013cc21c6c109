"""What the CUDA kernels do, counted by the emulator of the tests: no card is needed, and no time is measured.

`python -m benchmarks --emulated` for every family, `python -m benchmarks nf4 --emulated` for one.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import from_tests
from benchmarks.options import expression, names
from peft_kernels.ops import (
    adapter,
    combine,
    combine_products,
    cross_entropy,
    dropout,
    glu,
    ia3_linear,
    lora_linear,
    lora_linear_grouped,
    quantize_4bit,
    rms_norm,
    rotary,
)
from peft_kernels.ops.lora_linears import lora_linears_unchecked
from peft_kernels.ops.projections import Projection

ROOT = Path(__file__).parent.parent


ptx_emulator = from_tests.load("ptx_emulator")
ops, report = (importlib.import_module(f"ptx_emulator.{name}") for name in ("ops", "report"))

CARDS = ("sm_80", "sm_86", "sm_89", "sm_90")


class Case(NamedTuple):
    """A call of an op of one family, by a name for --filter."""

    family: str
    name: str
    prepare: Callable[[], Callable[[], object]]  # makes the operands, and the call


def dequantize(shape: tuple[int, int], dtype: str, nested: bool = False) -> Case:
    def prepare() -> Callable[[], object]:
        return quantize_4bit(torch.randn(shape).to(getattr(torch, dtype)), double_quant=nested).dequantize

    return Case("nf4", f"{shape[0]}x{shape[1]} {dtype}{' nested' if nested else ''}", prepare)


def quantize(shape: tuple[int, int], dtype: str, blocksize: int) -> Case:
    def prepare() -> Callable[[], object]:
        return functools.partial(quantize_4bit, torch.randn(shape).to(getattr(torch, dtype)), blocksize)

    return Case("nf4", f"quantise {shape[0]}x{shape[1]} {dtype} by {blocksize}", prepare)


def layer(m: int, n: int, k: int, rank: int = 0, training: bool = False, dropout: float = 0.0) -> Case:
    """A bf16 linear on nested NF4, with or without an adapter in fp32: its forward, or its forward and backward."""

    def prepare() -> Callable[[], object]:
        weight = quantize_4bit(torch.randn(n, k).bfloat16(), double_quant=True)
        x = torch.randn(m, k).bfloat16().requires_grad_(training)
        adapters = range(bool(rank))
        lora_A = [torch.randn(rank, k).requires_grad_(training) for _ in adapters]
        lora_B = [torch.randn(n, rank).requires_grad_(training) for _ in adapters]
        forward = functools.partial(
            lora_linear, x, weight, None, lora_A, lora_B, [1.0 for _ in adapters], [dropout for _ in adapters]
        )
        return (lambda: forward().sum().backward()) if training else forward

    extras = f" rank={rank}" * bool(rank) + f" dropout={dropout:g}" * bool(dropout) + " backward" * training
    return Case("lora_linear", f"m={m} n={n} k={k}{extras}", prepare)


def layers(m: int, features: Sequence[int], k: int, rank: int) -> Case:
    """bf16 linears of the same x on nested NF4, each with an adapter in fp32: their forward in the launches of one."""

    def prepare() -> Callable[[], object]:
        x = torch.randn(m, k).bfloat16()
        weights = [quantize_4bit(torch.randn(n, k).bfloat16(), double_quant=True) for n in features]
        adapters = [([torch.randn(rank, k)], [torch.randn(n, rank)], [1.0]) for n in features]
        projections = [Projection(weight, None, *adapter) for weight, adapter in zip(weights, adapters, strict=True)]
        return functools.partial(lora_linears_unchecked, x, projections, x.dtype, x.dtype)

    return Case("lora_linear", f"m={m} n={'+'.join(map(str, features))} k={k} rank={rank} together", prepare)


def batch(m: int, n: int, k: int, adapters: int, rank: int, training: bool = False) -> Case:
    """A bf16 linear on nested NF4 whose rows have bf16 adapters of their own: its forward, or forward and backward."""

    def prepare() -> Callable[[], object]:
        weight = quantize_4bit(torch.randn(n, k).bfloat16(), double_quant=True)
        x = torch.randn(m, k).bfloat16().requires_grad_(training)
        lora_A = [torch.randn(rank, k).bfloat16().requires_grad_(training) for _ in range(adapters)]
        lora_B = [torch.randn(n, rank).bfloat16().requires_grad_(training) for _ in range(adapters)]
        index = torch.randint(adapters, (m,))
        forward = functools.partial(lora_linear_grouped, x, weight, None, lora_A, lora_B, [1.0] * adapters, index)
        return (lambda: forward().sum().backward()) if training else forward

    name = f"m={m} n={n} k={k} adapters={adapters} rank={rank}" + " backward" * training
    return Case("lora_linear_grouped", name, prepare)


def fuse(m: int, widths: list[int], shared: bool) -> Case:
    """AdapterFusion's attention over bf16 outputs or bottlenecks of several adapters: its forward and backward."""

    def prepare() -> Callable[[], object]:
        columns = widths[0] if shared else sum(widths)
        t = torch.randn(m, columns).bfloat16() / columns**0.5
        adapters = [torch.randn(m, width).bfloat16() for width in widths]
        options = shared, None, 1.0, 0.0, None

        def call() -> None:
            pooled, probabilities = torch.ops.peft_kernels.adapter_fusion_forward(t, adapters, *options)
            torch.ops.peft_kernels.adapter_fusion_backward(
                pooled, None, t, adapters, probabilities, shared, *options[1:], [True] * len(adapters)
            )

        return call

    kind = "outputs" if shared else "bottlenecks"
    return Case("adapter_fusion", f"m={m} n={len(widths)} {kind} of {widths[0]} backward", prepare)


def scaled_layer(m: int, n: int, k: int, side: str) -> Case:
    """A bf16 linear on nested NF4 under (IA)³: the forward and backward of one of its sides."""

    def prepare() -> Callable[[], object]:
        weight = quantize_4bit(torch.randn(n, k).bfloat16(), double_quant=True)
        x = torch.randn(m, k).bfloat16().requires_grad_()
        scale = torch.ones(k if side == "l_in" else n, requires_grad=True)
        return lambda: ia3_linear(x, weight, **{side: scale}).sum().backward()

    return Case("ia3_linear", f"m={m} n={n} k={k} {side} backward", prepare)


def bottleneck(m: int, d: int, rank: int, dtype: str = "bfloat16", norm: bool = False, training: bool = False) -> Case:
    """A series adapter in x's dtype: its forward, or its forward and backward."""

    def prepare() -> Callable[[], object]:
        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape).to(getattr(torch, dtype)).requires_grad_(training)

        x = random(m, d)
        weights = random(rank, d), random(rank), random(d, rank), random(d)
        layer_norm = (random(d), random(d), 1e-5) if norm else None
        forward = functools.partial(adapter, x, *weights, residual=x, layer_norm=layer_norm)
        return (lambda: forward().sum().backward()) if training else forward

    return Case("adapter", f"m={m} d={d} rank={rank} {dtype}" + " norm" * norm + " backward" * training, prepare)


def attend(queries: int, heads: tuple[int, int], dim: int, prefix: int = 0, training: bool = False) -> Case:
    """Causal attention of bf16 heads and key heads with (IA)³ scales: its forward, or its forward and backward."""

    def prepare() -> Callable[[], object]:
        def rows(count: int) -> torch.Tensor:
            return torch.randn(1, queries, count, dim).bfloat16().transpose(1, 2)

        q, k, v = rows(heads[0]), rows(heads[1]), rows(heads[1])
        scales = [1 + 0.3 * torch.randn(count * dim) for count in (heads[0], heads[1], heads[1])]
        prefixes = [torch.randn(heads[1], prefix, dim) for _ in range(2)] if prefix else [None, None]
        common = (q, k, v, *scales, dim**-0.5, True, 0, None, None, *prefixes, None, None, 0.0, None)

        def call() -> None:
            out, out_real, lse = torch.ops.peft_kernels.attention_forward(*common, training)
            if training:
                wants = [True] * 6 + [prefix > 0] * 2
                torch.ops.peft_kernels.attention_backward(
                    out.transpose(1, 2), *common, out if prefix else None, out_real, lse, wants
                )

        return call

    name = f"S={queries} heads={heads[0]}/{heads[1]} D={dim}" + f" prefix={prefix}" * bool(prefix)
    return Case("attention", name + " backward" * training, prepare)


def loss(m: int, classes: int) -> Case:
    """The cross-entropy of bf16 logits: its forward and backward."""

    def prepare() -> Callable[[], object]:
        logits, targets = torch.randn(m, classes).bfloat16().requires_grad_(), torch.randint(classes, (m,))
        return lambda: cross_entropy(logits, targets).sum().backward()

    return Case("cross_entropy", f"m={m} classes={classes} backward", prepare)


def rotate(length: int, heads: tuple[int, int], dim: int) -> Case:
    """The rotary embedding of bf16 heads and key heads."""

    def prepare() -> Callable[[], object]:
        q, k = (torch.randn(1, length, count, dim).bfloat16().transpose(1, 2) for count in heads)
        angles = torch.randn(1, length, dim).bfloat16()
        return lambda: rotary(q, k, angles.cos(), angles.sin())

    return Case("rotary", f"S={length} heads={heads[0]}/{heads[1]} D={dim}", prepare)


def normalised(m: int, d: int, training: bool = False) -> Case:
    """RMSNorm in bf16: its forward, or forward and backward with the weight's gradient."""

    def prepare() -> Callable[[], object]:
        x, weight = (torch.randn(shape).bfloat16().requires_grad_(training) for shape in ((m, d), (d,)))
        return (lambda: rms_norm(x, weight).sum().backward()) if training else lambda: rms_norm(x, weight)

    return Case("rms_norm", f"m={m} d={d}" + " backward" * training, prepare)


def gated(m: int, n: int) -> Case:
    """A SwiGLU in bf16, forward and backward."""

    def prepare() -> Callable[[], object]:
        gate, up = (torch.randn(m, n).bfloat16().requires_grad_() for _ in range(2))
        return lambda: glu(gate, up).sum().backward()

    return Case("glu", f"m={m} n={n} backward", prepare)


def dropped(m: int, n: int, dtype: str) -> Case:
    """Dropout, forward and backward."""

    def prepare() -> Callable[[], object]:
        x = torch.randn(m, n).to(getattr(torch, dtype)).requires_grad_()
        return lambda: dropout(x, 0.1).sum().backward()

    return Case("dropout", f"m={m} n={n} {dtype} backward", prepare)


def combined(n: int, k: int, rank: int = 0, dtype: str = "float32") -> Case:
    """TIES of eight matrices, or of products of a rank."""

    def prepare() -> Callable[[], object]:
        weights, scaling, adapters = [1.0] * 8, [2.0] * 8, range(8)
        if not rank:
            deltas = [torch.randn(n, k).to(getattr(torch, dtype)) for _ in adapters]
            return functools.partial(combine, deltas, weights, density=0.2)
        lora_A, lora_B = ([torch.randn(shape) for _ in adapters] for shape in ((rank, k), (n, rank)))
        return functools.partial(combine_products, lora_A, lora_B, scaling, weights, density=0.2)

    return Case("combine", f"n={n} k={k} " + (f"products rank={rank}" if rank else dtype), prepare)


CASES = (
    quantize((576, 576), "bfloat16", 64),
    quantize((576, 576), "float32", 4096),
    dequantize((576, 576), "bfloat16"),
    dequantize((576, 576), "bfloat16", nested=True),
    dequantize((1536, 576), "bfloat16", nested=True),
    dequantize((576, 576), "float32"),
    dequantize((33, 517), "float16"),
    *(layer(m, 1024, 4096) for m in (1, 8, 32, 64, 128, 256)),
    layer(1, 576, 576, rank=16),
    layers(1, (576, 192, 192), 576, rank=16),
    layer(96, 576, 576, rank=16),
    layer(128, 1024, 1024, training=True),
    layer(1024, 256, 512, rank=16, training=True, dropout=0.05),
    batch(32, 1024, 1024, 32, 16),
    batch(512, 256, 512, 4, 16, training=True),
    fuse(64, [768] * 8, shared=True),
    fuse(8, [4096] * 8, shared=True),
    fuse(64, [64] * 8, shared=False),
    *(scaled_layer(m, 576, 576, side) for m in (96, 1024) for side in ("l_in", "l_out")),
    *(bottleneck(512, d, 64, norm=norm, training=True) for d in (768, 1536) for norm in (False, True)),
    bottleneck(512, 768, 64, "float32", training=True),
    attend(512, (2, 2), 64, training=True),
    attend(512, (4, 1), 128, prefix=32, training=True),
    loss(16, 49152),
    loss(8, 50257),
    rotate(128, (9, 3), 64),
    rotate(128, (32, 8), 128),
    normalised(64, 576),
    normalised(64, 4096, training=True),
    gated(64, 1536),
    *(dropped(64, 768, dtype) for dtype in ("bfloat16", "float32")),
    *(combined(16, 4096, dtype=dtype) for dtype in ("bfloat16", "float32")),
    combined(256, 1024, rank=16),
)


# The folders of csrc/ whose kernels a family launches, where they are not its own and common's.
FOLDERS = {
    "ia3_linear": ("matmul", "nf4", "common"),
    "lora_linear": ("lora", "matmul", "nf4", "common"),
    "lora_linear_grouped": ("lora", "matmul", "nf4", "common"),
}


def resources_of(family: str, card: str) -> dict[str, report.Resources]:
    """What ptxas makes of the kernels that a family launches."""
    used = {}
    for folder in FOLDERS.get(family, (family, "common")):
        for source in sorted((ROOT / "csrc" / folder / "cuda").glob("*.cu")):
            if not source.name.startswith("hopper_"):
                used |= report.resources(source, card, (ROOT / "csrc",))
            elif card == "sm_90":
                used |= report.resources(source, "sm_90a", (ROOT / "csrc",))
    return used


def columns(case: Case, card: str, used: dict[str, report.Resources]) -> list[dict[str, str]]:
    """One line for each launch."""
    torch.manual_seed(0)
    call = case.prepare()
    with ptx_emulator.profile(card), ops.emulated() as launches:
        call()
        return [{"case": case.name} | report.row(record, used.get(record["kernel"])) for record in launches()]


def main(arguments: Sequence[str] | None = None) -> None:
    families = tuple(dict.fromkeys(case.family for case in CASES))
    parser = argparse.ArgumentParser(prog="python -m benchmarks --emulated", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("families", nargs="*", metavar="FAMILY", help=f"of {', '.join(families)}")
    add("--filter", type=expression, default=re.compile(""), metavar="REGEX", help="only cases whose name has a match")
    add("--card", type=names(CARDS), default=("sm_80",), metavar="NAMES", help=f"of {','.join(CARDS)} (sm_80)")
    given = parser.parse_args(arguments)
    for family in given.families:
        if family not in families:
            parser.error(f"got the family '{family}', wanted one with CUDA kernels: {', '.join(families)}")
    cases = [case for case in CASES if case.family in (given.families or families) and given.filter.search(case.name)]
    if not cases:
        parser.error(f"argument --filter: got '{given.filter.pattern}', wanted one that some case matches")
    if reason := ptx_emulator.missing():
        sys.exit(f"python -m benchmarks --emulated: {reason}")
    for card in given.card:
        for family in dict.fromkeys(case.family for case in cases):
            used = resources_of(family, card)
            chosen = [case for case in cases if case.family == family]
            print(f"\n{family} on {card}\n")
            print(report.table([column for case in chosen for column in columns(case, card, used)]))
