"""Calls of the families of linear layers: LoRA, DoRA, (IA)³, many adapters, and experts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.card.case import BF16, FP16, FP32, SHORT, Case, Tolerance, problem, tolerances
from benchmarks.functions import Problem, Tensors
from peft_kernels.ops import (
    NF4Weight,
    dora_linear,
    grouped_linear,
    ia3_linear,
    lora_linear,
    lora_linear_grouped,
    quantize_4bit,
)
from peft_kernels.ops.lora_linears import lora_linears_unchecked
from peft_kernels.ops.projections import Projection
from peft_kernels.testing.reference.dora_linear import dora_linear as dora_linear_oracle
from peft_kernels.testing.reference.grouped_linear import grouped_linear as experts_oracle
from peft_kernels.testing.reference.ia3_linear import ia3_linear as ia3_linear_oracle
from peft_kernels.testing.reference.lora_linear import lora_linear as lora_linear_oracle
from peft_kernels.testing.reference.lora_linear_grouped import lora_linear_grouped as grouped_oracle


def weight4bit(n: int, k: int, kind: str = "nested", blocksize: int = 64, dtype: torch.dtype = BF16) -> NF4Weight:
    weight = (torch.randn(n, k) / k**0.5).to(dtype)
    return quantize_4bit(weight, blocksize, "fp4" if kind == "fp4" else "nf4", double_quant=kind == "nested")


def linear(
    m: int,
    n: int,
    k: int,
    ranks: Sequence[int] = (),
    dtype: torch.dtype = BF16,
    kind: str = "nested",
    blocksize: int = 64,
    bias: bool = False,
    drop: float = 0.0,
    training: bool = False,
    timed: bool = False,
) -> Case:
    """lora_linear on a 4-bit weight, or on a dense one where kind is "dense"."""

    def make() -> Problem:
        dense = kind == "dense"
        weight = (torch.randn(n, k) / k**0.5).to(dtype) if dense else weight4bit(n, k, kind, blocksize, dtype)
        leaves = {"x": torch.randn(m, k).to(dtype)} | ({"bias": torch.randn(n)} if bias else {})
        leaves |= pairs(n, k, ranks)
        scaling, each = [2.0 / (1 + i) for i in range(len(ranks))], range(len(ranks))
        seeds = torch.arange(7, 7 + len(ranks)) if drop else None
        values = weight if dense else weight.dequantize()

        def arguments(t: Tensors) -> tuple:
            adapters = [t[f"lora_A{i}"] for i in each], [t[f"lora_B{i}"] for i in each]
            return t.get("bias"), *adapters, scaling, [drop] * len(ranks) if drop else []

        def stock(t: Tensors) -> Tensor:
            y = F.linear(t["x"], values if dense else weight.dequantize())
            for i in each:
                dropped = F.dropout(t["x"], drop) if drop else t["x"]
                y = y + scaling[i] * F.linear(F.linear(dropped.float(), t[f"lora_A{i}"]), t[f"lora_B{i}"]).to(dtype)
            return y if not bias else y + t["bias"].to(dtype)

        return problem(
            leaves, (m, n), lambda t: lora_linear(t["x"], weight, *arguments(t), seeds=seeds),
            lambda t: lora_linear_oracle(t["x"], values.double(), *arguments(t), seeds=seeds), stock,
        )  # fmt: skip

    what = [SHORT[dtype], kind] + [f"b{blocksize}"] * (blocksize != 64) + ["bias"] * bias
    what += [f"r={'+'.join(map(str, ranks))}"] * bool(ranks) + [f"dropout {drop:g}"] * bool(drop)
    name = " ".join([f"M={m} {n}x{k}", *what, *(["backward"] * training)])

    def tolerance(name: str, out: torch.dtype) -> float:
        return tolerances.product(dtype, out) if name in ("result 0", "x") else tolerances.adapter_gradient(out)

    return Case("lora_linear", name, make, tolerance, training, timed)


def linears_of_one_x(m: int, features: Sequence[int], k: int, rank: int = 0, dtype: torch.dtype = BF16) -> Case:
    """Layers of the same x, as queries, keys and values are, in the launches of one; without gradients."""

    def make() -> Problem:
        weights, each = [weight4bit(n, k, dtype=dtype) for n in features], range(len(features))
        leaves = {"x": torch.randn(m, k).to(dtype)}
        for i, n in enumerate(features) if rank else ():
            leaves |= {f"lora_A{i}": torch.randn(rank, k) / k**0.5, f"lora_B{i}": torch.randn(n, rank) / rank**0.5}

        def adapter(t: Tensors, i: int) -> tuple:
            return ([t[f"lora_A{i}"]], [t[f"lora_B{i}"]], [2.0]) if rank else ((), (), ())

        def fused(t: Tensors) -> Tensor:
            layers = [Projection(weights[i], None, *adapter(t, i)) for i in each]
            return torch.cat(lora_linears_unchecked(t["x"], layers, dtype, dtype), -1)

        def oracle(t: Tensors) -> Tensor:
            values = [weight.dequantize().double() for weight in weights]
            return torch.cat([lora_linear_oracle(t["x"], values[i], None, *adapter(t, i)) for i in each], -1)

        return problem(leaves, (m, sum(features)), fused, oracle)

    name = f"M={m} {'+'.join(map(str, features))}x{k} {SHORT[dtype]}" + f" r={rank}" * bool(rank)
    return Case("lora_linear", name, make, lambda name, out: tolerances.product(dtype, out), training=False)


def linears(tiny: bool) -> Iterator[Case]:
    if tiny:
        yield linears_of_one_x(5, (64, 32, 32), 128, 4)
        yield linear(1, 64, 128)
        yield linear(9, 64, 128, (8,), FP16, "nf4")
        yield linear(40, 64, 128, (16, 4), drop=0.25, bias=True, training=True)
        yield linear(70, 64, 128, (8,), training=True)
        yield linear(3, 48, 128, dtype=FP32, kind="fp4")
        return
    # Each row count takes another kernel, or divides the work otherwise.
    rows = (1, 2, 5, 8, 9, 16, 24, 32, 33, 48, 64, 65, 100, 128, 160, 200, 256, 300, 512, 1000, 4096)
    for m in rows:
        yield linear(m, 4096, 4096, (16,))
    for m in (1, 8, 16, 32):
        yield linears_of_one_x(m, (4096, 1024, 1024), 4096, 16)
        yield linears_of_one_x(m, (14336, 14336), 4096, dtype=FP16)
    for m in (1, 16, 32, 64, 128, 160, 256, 512):
        yield linear(m, 4096, 4096, training=True)
        yield linear(m, 4096, 4096, (16,), drop=0.05, training=True, bias=True)
        yield linear(m, 14336, 4096, (16,), FP16, "nf4", training=True)
        yield linear(m, 4096, 14336)
    for m, kind in product((1, 40, 200), ("fp4", "nf4", "dense")):
        yield linear(m, 1000, 1088, (5, 64), kind=kind, training=True)
    for m, blocksize in product((3, 70), (32, 64, 128, 4096)):
        yield linear(m, 66, 256, (128,), blocksize=blocksize, training=True)
    for m in (1, 17, 300):
        yield linear(m, 1024, 2048, (16,), FP32, training=True)
    yield linear(40, 64, 4096)  # one tile, which many CTAs share
    yield linear(64, 8192, 28672, (16,))


def dora(m: int, n: int, k: int, r: int = 16, drop: float = 0.0, timed: bool = False) -> Case:
    def make() -> Problem:
        weight = weight4bit(n, k)
        values = weight.dequantize()
        leaves = {
            "x": torch.randn(m, k).to(BF16), "lora_A": torch.randn(r, k) / k**0.5, "lora_B": torch.randn(n, r) / r,
            "magnitude": 1 + torch.rand(n),
        }  # fmt: skip
        seed = torch.tensor([7])

        def call(function, t: Tensors, w) -> Tensor:
            return function(t["x"], w, None, t["lora_A"], t["lora_B"], t["magnitude"], 2.0, drop, seed=seed)

        def stock(t: Tensors) -> Tensor:
            w = weight.dequantize()
            gain = t["magnitude"] / (w + 2.0 * t["lora_B"] @ t["lora_A"]).norm(dim=1).detach()
            base = F.linear(t["x"], w)
            branch = 2.0 * F.linear(F.linear(t["x"].float(), t["lora_A"]), t["lora_B"])
            return (gain * (base.float() + branch)).to(BF16)

        return problem(leaves, (m, n), lambda t: call(dora_linear, t, weight),
                       lambda t: call(dora_linear_oracle, t, values.double()), stock)  # fmt: skip

    name = f"M={m} {n}x{k} r={r}" + f" dropout {drop:g}" * bool(drop) + " backward"
    # The base product is rounded before it is scaled, and dmagnitude is a sum of its products.
    return Case("dora_linear", name, make, lambda name, out: 2 * tolerances.product(BF16, BF16), True, timed)


def ia3(m: int, n: int, k: int, side: str, timed: bool = False) -> Case:
    def make() -> Problem:
        weight = weight4bit(n, k)
        values = weight.dequantize()
        leaves = {"x": torch.randn(m, k).to(BF16), side: 1 + 0.3 * torch.randn(k if side == "l_in" else n)}

        def stock(t: Tensors) -> Tensor:
            x = t["x"] * t["l_in"].to(BF16) if side == "l_in" else t["x"]
            y = F.linear(x, weight.dequantize())
            return y if side == "l_in" else y * t["l_out"].to(BF16)

        return problem(leaves, (m, n), lambda t: ia3_linear(t["x"], weight, **{side: t[side]}),
                       lambda t: ia3_linear_oracle(t["x"], values.double(), **{side: t[side]}), stock)  # fmt: skip

    tolerance = lambda name, out: 2 * tolerances.product(BF16, BF16)  # noqa: E731  # y is rounded before l_out's gradient
    return Case("ia3_linear", f"M={m} {n}x{k} {side} backward", make, tolerance, True, timed)


def grouped(batch: int, length: int, n: int, k: int, adapters: int, r: int = 16, timed: bool = False) -> Case:
    """A LoRA adapter for each sample of a batch."""

    def make() -> Problem:
        weight, each = weight4bit(n, k), range(adapters)
        values = weight.dequantize()
        index, scaling = [i % (adapters + 1) - 1 for i in range(batch)], [2.0] * adapters
        leaves = {"x": torch.randn(batch, length, k).to(BF16)} | pairs(n, k, [r] * adapters)

        def matrices(t: Tensors) -> tuple[list[Tensor], list[Tensor]]:
            return [t[f"lora_A{i}"] for i in each], [t[f"lora_B{i}"] for i in each]

        def stock(t: Tensors) -> Tensor:
            y = list(F.linear(t["x"], weight.dequantize()))
            for b, i in enumerate(index):
                if i >= 0:
                    branch = F.linear(F.linear(t["x"][b].float(), t[f"lora_A{i}"]), t[f"lora_B{i}"])
                    y[b] = y[b] + 2.0 * branch.to(BF16)
            return torch.stack(y)

        return problem(
            leaves, (batch, length, n),
            lambda t: lora_linear_grouped(t["x"], weight, None, *matrices(t), scaling, index),
            lambda t: grouped_oracle(t["x"], values.double(), None, *matrices(t), scaling, index), stock,
        )  # fmt: skip

    name = f"B={batch} S={length} {n}x{k} of {adapters} adapters backward"
    # The base is rounded to bf16 before the branches are added.
    return Case("lora_linear_grouped", name, make, with_adapters(2), True, timed)


def experts(m: int, n: int, k: int, count: int, r: int = 16, dense: bool = False, timed: bool = False) -> Case:
    """The products of a mixture's experts, on a stack in 4 bits or in bf16, with a LoRA adapter on it; one expert has
    no rows."""

    def make() -> Problem:
        values = (torch.randn(count, n, k) / k**0.5).to(BF16)
        weight = values if dense else quantize_4bit(values)
        values = values if isinstance(weight, Tensor) else weight.dequantize()
        ends = [0, *(m * (i + 1) // (count - 1) for i in range(count - 1))]
        offsets = torch.tensor(ends)
        leaves = {"x": torch.randn(m, k).to(BF16)} | pairs(n, k, [r * count])

        def arguments(t: Tensors) -> tuple:
            return None, [t["lora_A0"]], [t["lora_B0"]], [2.0], offsets

        def stock(t: Tensors) -> Tensor:
            stack, rows = weight if isinstance(weight, Tensor) else weight.dequantize(), []
            for e, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
                x, a, b = t["x"][begin:end], t["lora_A0"][e * r : (e + 1) * r], t["lora_B0"][:, e::count]
                rows.append(F.linear(x, stack[e]) + 2.0 * F.linear(F.linear(x.float(), a), b).to(BF16))
            return torch.cat(rows)

        return problem(
            leaves, (m, n), lambda t: grouped_linear(t["x"], weight, *arguments(t)),
            lambda t: experts_oracle(t["x"], values.double(), *arguments(t)), stock,
        )  # fmt: skip

    return Case(
        "grouped_linear", f"M={m} {count}x{n}x{k} r={r}{' dense' * dense} backward", make, with_adapters(2), True, timed
    )


def pairs(n: int, k: int, ranks: Sequence[int]) -> Tensors:
    """A and B of an adapter for each rank."""
    leaves: Tensors = {}
    for i, r in enumerate(ranks):
        leaves |= {f"lora_A{i}": torch.randn(r, k) / k**0.5, f"lora_B{i}": torch.randn(n, r) / r**0.5}
    return leaves


def with_adapters(times: float) -> Tolerance:
    """For y and grad_x, whose base product is rounded by itself, and for the gradients of A and B."""

    def tolerance(name: str, out: torch.dtype) -> float:
        return times * tolerances.product(BF16, out) if name in ("result 0", "x") else tolerances.adapter_gradient(out)

    return tolerance


def other_linears(tiny: bool) -> list[Case]:
    if tiny:
        found = [dora(3, 48, 128, 4), ia3(3, 48, 128, "l_in"), ia3(40, 48, 128, "l_out"), grouped(3, 2, 48, 128, 2, 4)]
        found += [experts(12, 48, 128, 3, 4, dense) for dense in (False, True)]
    else:
        found = [dora(4096, 4096, 4096, timed=True), dora(3, 1000, 1088), dora(100, 1024, 2048, drop=0.1)]
        found += [ia3(m, 4096, 4096, side, timed=m == 4096) for m in (1, 33, 4096) for side in ("l_in", "l_out")]
        found += [grouped(33, 1, 4096, 4096, 8, timed=True), grouped(5, 100, 1000, 1088, 3)]
        found += [experts(1024, 1024, 1024, 32, timed=True), experts(100, 1000, 1088, 5)]
        found.append(experts(100, 1024, 1024, 5, dense=True))
    return found
