"""(IA)³ in attention: checked against fp64, then timed against scalings and torch's attention, and that alone.

Everything is bf16 but the scales, which are fp32, as PEFT keeps them. Stock multiplies q, k and v, puts a prefix in
front of the keys, and calls torch's scaled_dot_product_attention.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import harness
from benchmarks.harness import relative_error
from benchmarks.records import FUSED, Faster, Target
from benchmarks.report import command
from benchmarks.timing import Contender, saved_bytes
from peft_kernels import cpu
from peft_kernels.ops import ia3_attention
from peft_kernels.testing.reference.attention import ia3_attention as oracle
from peft_kernels.testing.reference.attention import scaled, visible

STOCK, PLAIN, COMPILED = "stock", "without (IA)3", "compiled stock"
BASELINES = {"stock": STOCK, "plain": PLAIN, "compiled": COMPILED}


# ---- Cases ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case(harness.Rows):
    """A shape and a mode, and what is wanted of it with the processor's fastest instruction set.

    Attributes:
        queries: how many of the last positions ask; all of them by default.
        scales: whether there are l_q, l_k and l_v.
        prefix: its length.
        dropout: of the weights; checked without it, since torch draws another mask.
        training: forward and backward; otherwise a forward without autograd.
    """

    batch: int
    heads: int
    kv_heads: int
    keys: int
    head_dim: int
    queries: int = 0
    scales: bool = True
    prefix: int = 0
    dropout: float = 0.0
    training: bool = False
    large: bool = False
    wanted: tuple[Target, ...] = ()

    @property
    def num_queries(self) -> int:
        return self.queries or self.keys

    @property
    def size(self) -> float:
        return self.batch * self.heads * self.num_queries * self.keys

    def part(self, share: float) -> Case:
        """Fewer samples, then fewer heads, and in the end fewer positions."""
        group = self.heads // self.kv_heads
        samples = max(1, int(share * self.batch))
        share = min(1.0, share * self.batch / samples)
        kv_heads = max(1, int(share * self.kv_heads))
        share = min(1.0, share * self.kv_heads / kv_heads)
        keys = max(1, round(self.keys * (share if self.queries else share**0.5)))
        queries = min(self.queries, keys)
        return replace(self, batch=samples, heads=group * kv_heads, kv_heads=kv_heads, keys=keys, queries=queries)

    def __str__(self) -> str:
        heads = f"H={self.heads}" + (f"/{self.kv_heads}" if self.kv_heads != self.heads else "")
        parts = ["train" if self.training else "eval", f"B={self.batch}", heads, f"S={self.keys}", f"D={self.head_dim}"]
        parts += [f"queries={self.queries}"] * bool(self.queries) + [f"prefix={self.prefix}"] * bool(self.prefix)
        return " ".join(parts + ["unscaled"] * (not self.scales) + [f"dropout={self.dropout}"] * bool(self.dropout))


# The targets were set for two cores with AMX; on another machine they say how far from those it is.
CASES = (
    Case(4, 32, 32, 1024, 64, wanted=(Faster("forward", PLAIN, 2),)),
    Case(4, 32, 32, 1024, 64, training=True, wanted=(Faster("both", STOCK, 2.5),)),
    Case(4, 9, 3, 256, 64, training=True),
    Case(8, 12, 12, 512, 64, scales=False, training=True),
    Case(8, 12, 12, 512, 64, scales=False, dropout=0.1, training=True),
    Case(2, 32, 8, 1024, 128, training=True),
    Case(1, 32, 8, 4096, 128, queries=1),
    Case(4, 9, 3, 512, 64, queries=1),
    Case(1, 32, 8, 4096, 128, large=True),
    Case(1, 32, 8, 4096, 128, training=True, large=True),
)
PREFIX_CASES = (
    Case(4, 32, 32, 1024, 64, scales=False, prefix=32, training=True, wanted=(Faster("both", STOCK, 3),)),
    Case(4, 32, 32, 1024, 64, scales=False, prefix=32),
    Case(4, 9, 3, 256, 64, scales=False, prefix=32, training=True),
    Case(4, 9, 3, 256, 64, prefix=32, training=True),
    Case(2, 32, 8, 1024, 128, scales=False, prefix=128, training=True),
    Case(1, 32, 8, 4096, 128, scales=False, prefix=32, queries=1),
)


# ---- Problems -------------------------------------------------------------------------------------------------------


class Problem(harness.Problem):
    """The tensors of a case; those in `tensors` are arguments with gradients."""

    optional = (COMPILED,)

    def __init__(self, case: Case) -> None:
        self.case, self.name = case, str(case)
        torch.manual_seed(0)
        shape = {"q": (case.num_queries, case.heads), "k": (case.keys, case.kv_heads), "v": (case.keys, case.kv_heads)}
        self.tensors = {
            name: torch.randn(case.batch, rows, heads, case.head_dim).bfloat16().transpose(1, 2)
            for name, (rows, heads) in shape.items()
        }
        if case.scales:
            for name, (_, heads) in shape.items():
                self.tensors[f"l_{name}"] = 1 + 0.3 * torch.randn(heads * case.head_dim)
        if case.prefix:
            for name in ("prefix_k", "prefix_v"):
                self.tensors[name] = torch.randn(case.kv_heads, case.prefix, case.head_dim).bfloat16()
        for tensor in self.tensors.values():
            tensor.requires_grad_(case.training)
        self.grad_out = torch.randn(case.batch, case.num_queries, case.heads, case.head_dim).bfloat16().transpose(1, 2)

    def function(self, name: str) -> Callable[[Problem], Tensor]:
        if name == COMPILED:
            return torch.compile(stock, dynamic=False)
        return {FUSED: fused, STOCK: stock, PLAIN: plain}[name]

    def contender(self, name: str, isa: str = "") -> Contender:
        out: list[Tensor] = []
        function = self.function(name)

        def forward() -> None:
            out.append(function(self))

        def backward() -> None:
            out[-1].backward(self.grad_out)

        def reset() -> None:
            out.clear()
            for tensor in self.tensors.values():
                tensor.grad = None

        phases = {"forward": forward} | ({"backward": backward} if self.case.training else {})
        return Contender(name, phases, reset, isa, grad=self.case.training)

    def check(self, isas: Sequence[str]) -> dict[str, float]:
        """On a part of the case that fp64 can afford; a gradient counts as well as the result.

        Raises:
            ArithmeticError: one is further from fp64 than stock's, by more than 5 %.
        """
        group = self.case.heads // self.case.kv_heads
        small = Problem(replace(self.case, batch=1, heads=group, kv_heads=1, dropout=0.0))
        doubles = copy.copy(small)
        doubles.tensors = {
            name: tensor.detach().double().requires_grad_(self.case.training) for name, tensor in small.tensors.items()
        }
        wanted = _results(doubles, lambda p: oracle(**p.tensors, causal=True))
        theirs = _results(small, stock)
        errors = {}
        for isa in isas:
            with cpu.use_isa(isa):
                found = _results(small, fused)
            for name, value in wanted.items():
                got, limit = relative_error(found[name], value), 1.05 * relative_error(theirs[name], value)
                if not got <= limit:
                    text = f"got an error of {got:.3g}, wanted at most {limit:.3g}"
                    raise ArithmeticError(f"{self.case}, {isa}: {name}: {text}")
            errors[isa] = relative_error(found["out"], wanted["out"])
        return errors

    def work(self, phase: str, name: str) -> tuple[float, float]:
        return work(self.case, phase, name != PLAIN)

    def saved(self, name: str) -> int | None:
        if not self.case.training or name == COMPILED:
            return None
        return saved_bytes(nn.ParameterList(self.tensors.values()), lambda: self.function(name)(self))

    def targets(self, isa: str) -> tuple[Target, ...]:
        """Nothing of the slower instruction sets."""
        return self.case.wanted if isa == cpu.isas()[-1] else ()


def fused(problem: Problem) -> Tensor:
    return ia3_attention(**problem.tensors, causal=True, dropout=problem.case.dropout)


def stock(problem: Problem) -> Tensor:
    tensors = problem.tensors
    q, k, v = (scaled(tensors[name], tensors.get(f"l_{name}")) for name in "qkv")
    return _attend(problem.case, q, k, v, tensors.get("prefix_k"), tensors.get("prefix_v"))


def plain(problem: Problem) -> Tensor:
    """Neither scales nor prefix."""
    return _attend(replace(problem.case, prefix=0), *(problem.tensors[name] for name in "qkv"), None, None)


def _attend(case: Case, q, k, v, prefix_k, prefix_v) -> Tensor:
    mask = None
    if prefix_k is not None:
        k, v = (
            torch.cat([prefix.expand(case.batch, -1, -1, -1), x], dim=2) for prefix, x in ((prefix_k, k), (prefix_v, v))
        )
        if case.num_queries > 1:
            mask = F.pad(visible(case.num_queries, case.keys, True, None), (case.prefix, 0), value=True)
    causal = mask is None and case.num_queries > 1
    grouped = case.kv_heads != case.heads
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=case.dropout, is_causal=causal, enable_gqa=grouped
    )


def _results(problem: Problem, call: Callable[[Problem], Tensor]) -> dict[str, Tensor]:
    out = call(problem)
    if not problem.case.training:
        return {"out": out.detach()}
    names, leaves = zip(*problem.tensors.items(), strict=True)
    grads = torch.autograd.grad(out, leaves, problem.grad_out.to(out.dtype))
    return {"out": out.detach(), **dict(zip(names, grads, strict=True))}


# ---- Measurements ---------------------------------------------------------------------------------------------------


def work(case: Case, phase: str, prefix: bool) -> tuple[int, int]:
    """Bytes and operations that a phase can't do without: each operand is moved once, hidden keys are not looked at."""
    seen = case.num_queries * (2 * case.keys - case.num_queries + 1) // 2
    seen += case.num_queries * case.prefix if prefix else 0
    product = 2 * case.batch * case.heads * seen * case.head_dim
    queries = 2 * case.batch * case.heads * case.num_queries * case.head_dim
    keys = 2 * case.batch * case.kv_heads * case.keys * case.head_dim
    if phase == "forward":
        return 2 * queries + 2 * keys, 2 * product
    return 4 * queries + 4 * keys, 5 * product  # q, out, their gradients; k, v, their gradients


run = harness.runner(Problem, BASELINES)
main = command("attention", __doc__, CASES, BASELINES, run)
