"""A call of every family on numbers of its own: what is checked, what the sanitizers see, and what is timed.

None needs PEFT, bitsandbytes or transformers. Shapes are those of Llama-3 8B and small odd ones, or with `tiny` those
of a rehearsal.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import adapter, adapter_fusion, cross_entropy, dropout, glu, rms_norm, rotary
from benchmarks.card.case import BF16, FP16, FP32, SHORT, Case, Tolerance, problem, tolerances
from benchmarks.card.linear_cases import linears, other_linears, pairs, weight4bit
from benchmarks.functions import Problem, Tensors
from peft_kernels.ops import AdapterWeights, adapter_grouped, combine, combine_products, ia3_attention, quantize_4bit
from peft_kernels.ops.combine import METHODS
from peft_kernels.testing.reference import attention as attention_reference
from peft_kernels.testing.reference import combine as combine_reference
from peft_kernels.testing.reference import nf4 as nf4_reference
from peft_kernels.testing.reference.adapter import adapter_grouped as adapter_grouped_oracle

# ---- 4-bit weights --------------------------------------------------------------------------------------------------


def dequantize(n: int, k: int, kind: str, dtype: torch.dtype, blocksize: int = 64, timed: bool = False) -> Case:
    """Bit for bit, so the error has to be zero."""

    def make() -> Problem:
        weight = weight4bit(n, k, kind, blocksize, dtype)

        def oracle(t: Tensors) -> Tensor:
            on_cpu = [each.cpu() for each in (weight.codes, weight.absmax)]
            nested = tuple(each.cpu() for each in weight.nested)
            with torch.device("cpu"):
                y = nf4_reference.dequantize_4bit(*on_cpu, (n, k), dtype, blocksize, weight.quant_type, nested)
            return y.to(weight.codes.device)

        return problem({"unused": torch.ones(1)}, (n, k), lambda t: weight.dequantize(), oracle,
                       work=(n * k * (0.5 + dtype.itemsize), 0.0))  # fmt: skip

    name = f"dequantise {n}x{k} {kind} b{blocksize} {SHORT[dtype]}"
    return Case("nf4", name, make, lambda name, out: 0.0, False, timed)


def quantize(n: int, k: int, kind: str, dtype: torch.dtype, blocksize: int = 64, timed: bool = False) -> Case:
    """Codes and statistics, which have to be equal."""

    def make() -> Problem:
        tensor = torch.randn(n, k).to(dtype)

        def fused(t: Tensors) -> tuple[Tensor, ...]:
            weight = quantize_4bit(tensor, blocksize, kind)
            return weight.codes, weight.absmax

        def oracle(t: Tensors) -> tuple[Tensor, ...]:
            with torch.device("cpu"):
                found = nf4_reference.quantize_4bit(tensor.cpu(), blocksize, kind)
            return tuple(each.to(tensor.device) for each in found)

        return problem({"unused": torch.ones(1)}, (n, k), fused, oracle, work=(n * k * (0.5 + dtype.itemsize), 0.0))

    name = f"quantise {n}x{k} {kind} b{blocksize} {SHORT[dtype]}"
    return Case("nf4", name, make, lambda name, out: 0.0, False, timed)


def _weights(tiny: bool) -> Iterator[Case]:
    if tiny:
        yield dequantize(16, 128, "nested", BF16)
        yield quantize(16, 128, "nf4", FP32)
        return
    yield dequantize(4096, 4096, "nested", BF16, timed=True)
    for kind, dtype in product(("nf4", "fp4", "nested"), (BF16, FP16, FP32)):
        yield dequantize(33, 517, kind, dtype, 128)
    for kind, dtype, blocksize in product(("nf4", "fp4"), (BF16, FP16, FP32), (32, 64, 256, 4096)):
        yield quantize(1000, 576, kind, dtype, blocksize)
    yield quantize(4096, 4096, "nf4", BF16, timed=True)


# ---- What the families' own benchmarks have -------------------------------------------------------------------------


def of(family: str, case, make, tolerance: Tolerance, dtype: torch.dtype = BF16, timed: bool = False) -> Case:
    """A case of a family's own benchmark, with its leaves in another dtype."""

    def converted() -> Problem:
        # Nothing of this is called compiled, and to ask for it would load Inductor, which takes seconds.
        with mock.patch("torch.compile", lambda function, **options: function):
            own = make(case)
        return replace(own, leaves={name: leaf.to(dtype) for name, leaf in own.leaves.items()})

    return Case(family, f"{case} {SHORT[dtype]}", converted, tolerance, True, timed)


def one_rounding(name: str, out: torch.dtype) -> float:
    return tolerances.FP32_SUM + 2 * tolerances.ROUNDING[out]


def _elementwise(tiny: bool) -> Iterator[Case]:
    shapes = {
        "rms_norm": (rms_norm, [(4096, 4096, True), (7, 576, True), (1, 4096, False)], (3, 40, True)),
        "glu": (glu, [(4096, 14336), (7, 1001), (5, 64, "gelu_tanh")], (3, 40)),
        "rotary": (rotary, [(1, 4096, 32, 8, 128), (2, 33, 9, 3, 64)], (1, 5, 2, 1, 16)),
        "cross_entropy": (cross_entropy, [(2048, 128256), (7, 50257)], (3, 70)),
        "dropout": (dropout, [(4096, 4096), (7, 1001)], (3, 40)),
    }
    for family, (module, real, rehearsed) in shapes.items():
        for number, shape in enumerate([rehearsed] if tiny else real):
            for dtype in (BF16,) if tiny or number == 0 else (BF16, FP16, FP32):
                case = module.Case(*shape)
                yield of(family, case, module.make_problem, one_rounding, dtype, timed=number == 0)


def attend(
    queries: int, keys: int, heads: tuple[int, int], dim: int, dtype: torch.dtype = BF16, prefix: int = 0,
    scales: bool = True, batch: int = 1, timed: bool = False,
) -> Case:  # fmt: skip
    """Causal attention with (IA)³ scales, a prefix, or both."""

    def make() -> Problem:
        leaves = {
            name: torch.randn(batch, rows, count, dim).to(dtype).transpose(1, 2)
            for name, rows, count in (("q", queries, heads[0]), ("k", keys, heads[1]), ("v", keys, heads[1]))
        }
        if scales:
            leaves |= {f"l_{name}": 1 + 0.3 * torch.randn(leaves[name].shape[1] * dim) for name in ("q", "k", "v")}
        if prefix:
            leaves |= {f"prefix_{name}": torch.randn(heads[1], prefix, dim) for name in ("k", "v")}

        def stock(t: Tensors) -> Tensor:
            q, k, v = (attention_reference.scaled(t[name], t.get(f"l_{name}")).to(dtype) for name in ("q", "k", "v"))
            mask = None
            if prefix:
                k, v = (
                    torch.cat([t[f"prefix_{name}"].to(dtype).expand(batch, -1, -1, -1), x], 2)
                    for name, x in (("k", k), ("v", v))
                )
                mask = F.pad(attention_reference.visible(queries, keys, True, None, q.device), (prefix, 0), value=True)
            elif queries != keys:
                mask = attention_reference.visible(queries, keys, True, None, q.device)
            return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=True)

        return problem(leaves, (batch, heads[0], queries, dim), lambda t: ia3_attention(**t, causal=True),
                       lambda t: attention_reference.ia3_attention(**t, causal=True), stock,
                       work=(2 * dim * batch * (2 * heads[0] * queries + 2 * heads[1] * keys),
                             4 * dim * batch * heads[0] * queries * (keys - queries / 2)))  # fmt: skip

    name = f"B={batch} H={heads[0]}/{heads[1]} S={queries}x{keys} D={dim} {SHORT[dtype]}"
    name += f" prefix={prefix}" * bool(prefix) + " scales" * scales
    return Case("attention", name, make, lambda name, out: tolerances.attention(dtype), True, timed)


def _attention(tiny: bool) -> Iterator[Case]:
    if tiny:
        yield attend(9, 9, (2, 1), 16, prefix=2)
        return
    yield attend(2048, 2048, (32, 8), 128, timed=True)
    yield attend(1, 1024, (32, 8), 128)
    for dtype, dim in product((BF16, FP16), (40, 64, 96, 128)):  # fp32 is torch's
        yield attend(200, 230, (4, 2), dim, dtype, prefix=13, batch=2)
    yield attend(1024, 1024, (32, 8), 128, prefix=32, scales=False, timed=True)


def grouped_adapters(batch: int, length: int, d: int, r: int, dtype: torch.dtype = BF16, post: bool = False) -> Case:
    """An adapter for each example but every third; with `post` a LayerNorm of the result."""

    def make() -> Problem:
        leaves = {"x": torch.randn(batch, length, d).to(dtype)}
        if post:
            leaves |= {"norm_weight": 1 + torch.randn(d).to(dtype) / 4, "norm_bias": torch.randn(d).to(dtype) / 4}
        for i in range(2):
            leaves |= {
                f"down{i}": (torch.randn(r, d) / d**0.5).to(dtype), f"down_bias{i}": torch.randn(r).to(dtype),
                f"up{i}": (torch.randn(d, r) / r**0.5).to(dtype), f"up_bias{i}": torch.randn(d).to(dtype),
            }  # fmt: skip
        index = [i % 3 - 1 for i in range(batch)]
        parts = ("down_weight", "down"), ("down_bias", "down_bias"), ("up_weight", "up"), ("up_bias", "up_bias")

        def weights(t: Tensors, i: int) -> dict[str, Tensor]:
            return {argument: t[f"{name}{i}"] for argument, name in parts}

        def options(t: Tensors) -> dict:
            norm = (t["norm_weight"], t["norm_bias"], 1e-5) if post else None
            return {"residual": t["x"], "post_layer_norm": norm}

        return problem(
            leaves, (batch, length, d),
            lambda t: adapter_grouped(t["x"], [AdapterWeights(**weights(t, i)) for i in range(2)], index, **options(t)),
            lambda t: adapter_grouped_oracle(t["x"], [weights(t, i) for i in range(2)], index, **options(t)),
        )  # fmt: skip

    name = f"grouped B={batch} S={length} d={d} r={r}{' layernorm behind' * post} {SHORT[dtype]}"
    return Case("adapter", name, make, lambda name, out: tolerances.product(dtype, out))


def _adapters(tiny: bool) -> Iterator[Case]:
    def one(case: adapter.Case, dtype: torch.dtype = BF16, timed: bool = False) -> Case:
        return of(
            "adapter", case, adapter.make_problem, lambda name, out: tolerances.product(dtype, dtype), dtype, timed
        )

    def fuse(case: adapter_fusion.Case, dtype: torch.dtype = BF16, timed: bool = False) -> Case:
        make, tolerance = adapter_fusion.make_problem, lambda name, out: 3 * tolerances.product(dtype, dtype)
        return of("adapter_fusion", case, make, tolerance, dtype, timed)

    if tiny:
        yield one(adapter.Case(9, 40, 8, norm=True))
        yield grouped_adapters(3, 4, 40, 8)
        yield grouped_adapters(3, 4, 40, 8, post=True)
        yield fuse(adapter_fusion.Case(5, 32, 3))
        return
    yield one(adapter.Case(4096, 4096, 64, norm=True), timed=True)
    for dtype in (BF16, FP16, FP32):
        yield one(adapter.Case(200, 768, 64, norm=True, dropout=0.1), dtype)
        yield one(adapter.Case(33, 1032, 20, activation="relu"), dtype)
        yield grouped_adapters(7, 40, 768, 48, dtype)
        yield grouped_adapters(7, 40, 768, 48, dtype, post=True)
    yield one(adapter.Case(100, 4096, 512))
    yield fuse(adapter_fusion.Case(2048, 768, 8), timed=True)
    for dtype in (BF16, FP16, FP32):
        yield fuse(adapter_fusion.Case(70, 96, 3), dtype)
        yield fuse(adapter_fusion.Case(70, 96, 3, rank=16), dtype)
    yield fuse(adapter_fusion.Case(8, 4096, 8))


def combined(
    method: str, rows: int, columns: int, rank: int = 0, dtype: torch.dtype = FP32, count: int = 8, timed: bool = False
) -> Case:  # fmt: skip
    """Matrices combined into one, or products of a rank."""
    weights, density = [0.25 * i - 0.5 for i in range(count)], 0.2
    elects, trims, drops = METHODS[method]

    def make() -> Problem:
        if rank:
            leaves = pairs(rows, columns, [rank] * count)
        else:
            leaves = {f"delta{i}": torch.randn(rows, columns).to(dtype) for i in range(count)}
        seeds = torch.arange(7, 7 + count)
        options = {"weights": weights, "method": method, "density": density, "seeds": seeds}

        def matrices(t: Tensors) -> tuple[list[Tensor], list[Tensor]]:
            return [t[f"lora_A{i}"] for i in range(count)], [t[f"lora_B{i}"] for i in range(count)]

        def fused(t: Tensors) -> Tensor:
            if rank:
                return combine_products(*matrices(t), [2.0] * count, **options)
            return combine([t[f"delta{i}"] for i in range(count)], **options)

        def oracle(t: Tensors) -> Tensor:
            if rank:  # whose order in fp32 decides what is kept
                factors = [(a.float().cpu(), b.float().cpu()) for a, b in zip(*matrices(t), strict=True)]
                deltas = [combine_products([a], [b], [2.0], [1.0], "linear").to(seeds.device) for a, b in factors]
            else:
                deltas = [t[f"delta{i}"] for i in range(count)]
            if trims:
                deltas = [combine_reference.trim(delta, int(density * delta.numel())) for delta in deltas]
            deltas = [delta.double() for delta in deltas]
            if drops:
                deltas = [
                    combine_reference.drop(delta, 1 - density, seed, of_product=rank > 0)
                    for delta, seed in zip(deltas, seeds.split(1), strict=True)
                ]
            return combine_reference.combine(deltas, weights, "total" if elects else "none")

        def stock(t: Tensors) -> Tensor:
            """TIES as PEFT has it."""
            given = [2.0 * b @ a for a, b in zip(*matrices(t), strict=True)] if rank else [*t.values()]
            deltas = torch.stack(given).flatten(1)
            found = deltas.abs().topk(int(density * deltas.shape[1]), dim=1).indices
            kept = torch.zeros_like(deltas).scatter_(1, found, deltas.gather(1, found))
            agrees = kept.sign() == torch.where(kept.sum(0) >= 0, 1, -1)
            total = (kept * agrees * kept.new_tensor(weights)[:, None]).sum(0)
            return (total / agrees.sum(0).clamp(min=1)).view(rows, columns)

        read = sum(leaf.nbytes for leaf in leaves.values())
        return problem(leaves, (rows, columns), fused, oracle, stock,
                       work=(read + rows * columns * dtype.itemsize, 2.0 * rank * count * rows * columns))  # fmt: skip

    name = f"{method} of {count} {f'products r={rank}' if rank else 'matrices'} {rows}x{columns} {SHORT[dtype]}"
    return Case("combine", name, make, one_rounding, False, timed)


def _combined(tiny: bool) -> Iterator[Case]:
    if tiny:
        yield combined("ties", 3, 40)
        yield combined("dare_linear", 5, 130, rank=4)
        return
    yield combined("ties", 4096, 4096, rank=16, timed=True)
    yield combined("ties", 16, 4096, timed=True)
    for method, dtype in product(METHODS, (BF16, FP16, FP32)):
        yield combined(method, 33, 1001, dtype=dtype)
    for method in METHODS:
        yield combined(method, 33, 1001, rank=20, count=3)
    yield combined("dare_ties", 70, 40, count=70)


def cases(tiny: bool) -> list[Case]:
    """The most used families first."""
    groups = linears, _weights, _elementwise, _attention, other_linears, _adapters, _combined
    return [case for group in groups for case in group(tiny)]


FAMILIES = (
    "lora_linear", "nf4", "rms_norm", "glu", "rotary", "cross_entropy", "dropout", "attention", "dora_linear",
    "ia3_linear", "lora_linear_grouped", "grouped_linear", "adapter", "adapter_fusion", "combine",
)  # fmt: skip
