"""(IA)³ in attention: checked against fp64, then timed against scalings and torch's attention, and that alone.

Everything is bf16 but the scales, which are fp32, as PEFT keeps them. Stock multiplies q, k and v, puts a prefix in
front of the keys, and calls torch's scaled_dot_product_attention.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import timing
from benchmarks.finetune import saved_bytes
from benchmarks.records import FUSED, Faster, Record, Target
from benchmarks.report import benchmark
from benchmarks.timing import Contender
from peft_kernels import cpu
from peft_kernels.ops import ia3_attention
from peft_kernels.testing.reference.ia3_attention import ia3_attention as oracle
from peft_kernels.testing.reference.ia3_attention import scaled, visible

STOCK, PLAIN, COMPILED = "stock", "without (IA)3", "compiled stock"
BASELINES = {"stock": STOCK, "plain": PLAIN, "compiled": COMPILED}


# ---- Cases ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
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

    def __str__(self) -> str:
        heads = f"H={self.heads}" + (f"/{self.kv_heads}" if self.kv_heads != self.heads else "")
        parts = ["train" if self.training else "eval", f"B={self.batch}", heads, f"S={self.keys}", f"D={self.head_dim}"]
        parts += [f"queries={self.queries}"] * bool(self.queries) + [f"prefix={self.prefix}"] * bool(self.prefix)
        return " ".join(parts + ["unscaled"] * (not self.scales) + [f"dropout={self.dropout}"] * bool(self.dropout))

    def targets(self, phase: str, isa: str) -> tuple[Target, ...]:
        """What is wanted in a phase; nothing of the slower instruction sets."""
        return tuple(target for target in self.wanted if target.phase == phase and isa == cpu.isas()[-1])


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


@dataclass(frozen=True)
class Problem:
    case: Case
    tensors: dict[str, Tensor]  # the arguments with gradients
    grad_out: Tensor


def make_problem(case: Case) -> Problem:
    torch.manual_seed(0)
    shape = {"q": (case.num_queries, case.heads), "k": (case.keys, case.kv_heads), "v": (case.keys, case.kv_heads)}
    tensors = {
        name: torch.randn(case.batch, rows, heads, case.head_dim).bfloat16().transpose(1, 2)
        for name, (rows, heads) in shape.items()
    }
    if case.scales:
        for name, (_, heads) in shape.items():
            tensors[f"l_{name}"] = 1 + 0.3 * torch.randn(heads * case.head_dim)
    if case.prefix:
        for name in ("prefix_k", "prefix_v"):
            tensors[name] = torch.randn(case.kv_heads, case.prefix, case.head_dim).bfloat16()
    for tensor in tensors.values():
        tensor.requires_grad_(case.training)
    grad_out = torch.randn(case.batch, case.num_queries, case.heads, case.head_dim).bfloat16().transpose(1, 2)
    return Problem(case, tensors, grad_out)


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


def check(case: Case, isas: Sequence[str]) -> dict[str, float]:
    """The relative rms error of the result by instruction set, on a part of the case that fp64 can afford.

    Raises:
        ArithmeticError: the result or, in training, a gradient is further from fp64 than stock's, by more than 5 %.
    """
    group = case.heads // case.kv_heads
    small = replace(case, batch=1, heads=group, kv_heads=1, dropout=0.0)
    problem = make_problem(small)
    doubles = {name: tensor.detach().double().requires_grad_(case.training) for name, tensor in problem.tensors.items()}
    wanted = _results(Problem(small, doubles, problem.grad_out), lambda p: oracle(**p.tensors, causal=True))
    theirs = _results(problem, stock)
    errors = {}
    for isa in isas:
        with cpu.use_isa(isa):
            ours = _results(problem, fused)
        for name, value in wanted.items():
            got, limit = _error(ours[name], value), 1.05 * _error(theirs[name], value)
            if not got <= limit:
                raise ArithmeticError(f"{case}, {isa}: {name}: got an error of {got:.3g}, wanted at most {limit:.3g}")
        errors[isa] = _error(ours["out"], wanted["out"])
    return errors


def _results(problem: Problem, call: Callable[[Problem], Tensor]) -> dict[str, Tensor]:
    out = call(problem)
    if not problem.case.training:
        return {"out": out.detach()}
    names, leaves = zip(*problem.tensors.items(), strict=True)
    grads = torch.autograd.grad(out, leaves, problem.grad_out.to(out.dtype))
    return {"out": out.detach(), **dict(zip(names, grads, strict=True))}


def _error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


# ---- Measurements ---------------------------------------------------------------------------------------------------


def work(case: Case, phase: str, prefix: bool) -> tuple[int, int]:
    """Bytes and operations that a phase can't do without: each operand is moved once, hidden keys are not looked at."""
    if phase == "both":
        parts = [work(case, part, prefix) for part in ("forward", "backward")]
        return sum(size for size, _ in parts), sum(flops for _, flops in parts)
    seen = case.num_queries * (2 * case.keys - case.num_queries + 1) // 2
    seen += case.num_queries * case.prefix if prefix else 0
    product = 2 * case.batch * case.heads * seen * case.head_dim
    queries = 2 * case.batch * case.heads * case.num_queries * case.head_dim
    keys = 2 * case.batch * case.kv_heads * case.keys * case.head_dim
    if phase == "forward":
        return 2 * queries + 2 * keys, 2 * product
    return 4 * queries + 4 * keys, 5 * product  # q, out, their gradients; k, v, their gradients


def make_contender(problem: Problem, name: str, call: Callable[[Problem], Tensor], isa: str = "") -> Contender:
    out: list[Tensor] = []

    def forward() -> None:
        out.append(call(problem))

    def backward() -> None:
        out[-1].backward(problem.grad_out)

    def reset() -> None:
        out.clear()
        for tensor in problem.tensors.values():
            tensor.grad = None

    phases = {"forward": forward} | ({"backward": backward} if problem.case.training else {})
    return Contender(name, phases, reset, isa, grad=problem.case.training)


def run(case: Case, vs: Sequence[str], isas: Sequence[str], seconds: float, say: Callable[[str], None]) -> list[Record]:
    """Checks and then times a case."""
    torch.compiler.reset()  # past a number of compiled functions torch would silently stop compiling
    errors = check(case, isas)
    problem = make_problem(case)
    calls = {STOCK: stock, PLAIN: plain, COMPILED: torch.compile(stock, dynamic=False)}
    contenders = [make_contender(problem, FUSED, fused, isa) for isa in isas]
    others = [make_contender(problem, BASELINES[group], calls[BASELINES[group]]) for group in vs]
    contenders += timing.runnable(others, [COMPILED], say)
    samples = timing.interleaved(contenders, seconds)
    records = []
    for contender, taken in zip(contenders, samples, strict=True):
        name, is_fused = contender.name, contender.name == FUSED
        call = fused if is_fused else calls[name]
        saved = None
        if case.training and name != COMPILED:
            saved = saved_bytes(nn.ParameterList(problem.tensors.values()), lambda call=call: call(problem))
        peak = timing.peak_memory(contender.run)
        for phase, values in taken.items():
            records.append(
                Record(
                    str(case), phase, name, contender.isa, values, *work(case, phase, name != PLAIN),
                    errors[contender.isa] if is_fused else None, peak, saved,
                    wanted=case.targets(phase, contender.isa) if is_fused else (),
                )
            )  # fmt: skip
    return records


def main(arguments: Sequence[str] | None = None) -> None:
    benchmark("ia3_attention", __doc__.splitlines()[0], CASES, BASELINES, run, arguments)


if __name__ == "__main__":
    main()
