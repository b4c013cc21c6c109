"""LoRA on a 4-bit linear layer: checked against fp64, then timed against stock, dense and compiled layers.

Every contender has the same numbers: W is quantised to NF4 with double quantisation, and the dense layers have its
decoded values in bf16. x is bf16; A and B are fp32.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import bitsandbytes as bnb
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from rich.console import Console
from torch import Tensor, nn

import peft_kernels
from benchmarks import options, report, timing
from benchmarks.finetune import saved_bytes
from benchmarks.report import FUSED, Below, Faster, Record, Report, Target, Within
from benchmarks.timing import Contender
from peft_kernels import cpu
from peft_kernels.ops import NF4Weight, lora_linear
from peft_kernels.testing.reference.lora_linear import lora_linear as oracle

RANK = 16
SCALING = 2.0
STOCK, DENSE, DENSE_LORA = "stock", "dense", "LoRA on dense"
OWN_BASE, DEQUANTIZE, FUNCTION = "own base", "dequantize + matmul", "function"
COMPILED_STOCK, COMPILED_DENSE = "compiled stock", "compiled LoRA on dense"
BASELINES = {
    "dense": (DENSE, DENSE_LORA),
    "stock": (STOCK,),
    "dequantize": (DEQUANTIZE,),
    "compiled": (COMPILED_STOCK, COMPILED_DENSE),
}

# Relative rms errors that the roundings of the result explain: bf16 for y and grad_x; the others are fp32.
TOLERANCES = {"y": 4e-3, "x": 4e-3, "lora_A": 1e-5, "lora_B": 1e-5}


# ---- Cases ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A shape and a mode, and what is wanted of it with the processor's fastest instruction set.

    Attributes:
        rows: M, of x [M, K].
        shape: (N, K).
        training: forward and backward with fresh layers; otherwise a forward in eval mode without autograd.
        autocast: under bf16 autocast.
        repeat: calls of each sample, when it is the overhead that counts.
    """

    rows: int
    shape: tuple[int, int]
    training: bool = False
    dropout: float = 0.0
    autocast: bool = False
    repeat: int = 1
    large: bool = False
    wanted: tuple[Target, ...] = ()

    def __str__(self) -> str:
        extras = [f"dropout {self.dropout:g}"] * bool(self.dropout) + ["autocast"] * self.autocast
        extras += ["overhead"] * (self.repeat > 1)
        return " ".join(
            [f"{'train' if self.training else 'eval'} M={self.rows} {self.shape[0]}x{self.shape[1]}", *extras]
        )

    def targets(self, phase: str, isa: str) -> tuple[Target, ...]:
        """What is wanted in a phase; of the slower instruction sets it is less, and the same in every case."""
        wanted = self.wanted if isa == cpu.isas()[-1] else self._of_slower_isas(isa)
        return tuple(target for target in wanted if target.phase == phase)

    def _of_slower_isas(self, isa: str) -> tuple[Target, ...]:
        if isa == "portable" or not self.training or self.rows < 8:
            return ()
        return Faster("both", STOCK, 1.5), Faster("both", DEQUANTIZE, 1.0)


def _square(rows: int, stock: float, dense: float) -> Case:
    wanted = Faster("forward", STOCK, stock), Faster("forward", DENSE, dense)
    return Case(rows, (4096, 4096), wanted=wanted)


def _train(rows: int, dropout: float, *wanted: Target) -> Iterator[Case]:
    yield Case(rows, (4096, 4096), True, dropout, wanted=wanted)
    yield Case(rows, (4096, 4096), True, dropout, autocast=True)


# The targets were set for two cores with AMX; on another machine they say how far from those it is.
CASES = (
    _square(1, 1.4, 2.4),
    _square(8, 4, 2),
    _square(32, 7, 1.3),
    _square(128, 13, 1.25),
    _square(512, 15, 1),
    _square(2048, 16, 1),
    *_train(8, 0, Faster("both", STOCK, 25)),
    *_train(512, 0, Faster("both", STOCK, 4), Faster("both", DENSE, 1)),
    *_train(512, 0.05, Faster("both", STOCK, 5), Within("forward", OWN_BASE, 0.12)),
    *_train(2048, 0.05, Faster("both", STOCK, 4)),
    # The layers of SmolLM2-135M.
    *(Case(1, shape) for shape in ((576, 576), (192, 576), (1536, 576), (576, 1536))),
    *(Case(1024, shape, True, 0.05) for shape in ((576, 576), (192, 576), (1536, 576), (576, 1536))),
    Case(1, (576, 576), repeat=200, wanted=(Below("forward", 15e-6),)),
    *(Case(1, shape, large=True) for shape in ((4096, 14336), (49152, 576))),
    *(Case(512, shape, True, 0.05, large=True) for shape in ((4096, 14336), (49152, 576))),
)


# ---- Layers ---------------------------------------------------------------------------------------------------------


class _OneLinear(nn.Module):
    """The model that PEFT wants around the layer."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear
        self.is_loaded_in_4bit = isinstance(linear, bnb.nn.Linear4bit)


class _Dequantized(nn.Module):
    """What a 4-bit layer costs without a fused product: our dequantisation, then torch's matrix product."""

    def __init__(self, weight: NF4Weight) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.dequantize())


class _Function(nn.Module):
    """`lora_linear` itself, called on the parts of a PEFT layer."""

    def __init__(self, layer: nn.Module, weight: NF4Weight) -> None:
        super().__init__()
        self.arguments = weight, None, *(([part["default"].weight]) for part in (layer.lora_A, layer.lora_B)), [SCALING]

    def forward(self, x: Tensor) -> Tensor:
        return lora_linear(x, *self.arguments)


@dataclass
class Problem:
    """The numbers of a case, and a fresh layer for each contender, by name, made when it is asked for."""

    case: Case
    x: Tensor
    grad_y: Tensor
    weight: NF4Weight
    make: dict[str, Callable[[], nn.Module]]


def make_problem(case: Case) -> Problem:
    n, k = case.shape
    torch.manual_seed(0)
    linear = bnb.nn.Linear4bit(k, n, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    linear.weight = bnb.nn.Params4bit(
        (torch.randn(n, k) / k**0.5).bfloat16(), requires_grad=False, quant_type="nf4", compress_statistics=True
    )
    linear = linear.to("cpu")  # quantises it
    weight = NF4Weight.from_params4bit(copy.deepcopy(linear.weight))
    lora_A, lora_B = torch.randn(RANK, k) / k**0.5, torch.randn(n, RANK) / RANK**0.5

    def dense() -> nn.Module:
        layer = nn.Linear(k, n, bias=False, device="meta")
        layer.weight = nn.Parameter(weight.dequantize(), requires_grad=False)
        return layer

    def with_lora(base: nn.Module) -> nn.Module:
        config = LoraConfig(
            r=RANK, lora_alpha=int(SCALING * RANK), lora_dropout=case.dropout, target_modules=["linear"]
        )
        layer = get_peft_model(_OneLinear(base), config).base_model.model.linear
        layer.lora_A["default"].weight = nn.Parameter(lora_A.clone())
        layer.lora_B["default"].weight = nn.Parameter(lora_B.clone())
        return layer.train(case.training)

    def fused(layer: nn.Module) -> nn.Module:
        model = nn.Sequential(layer)
        converted = peft_kernels.accelerate(model)
        if converted.left_alone:
            raise RuntimeError(f"a layer that should have been fused was not: {converted}")
        return model[0]

    def own(linear: nn.Module = linear) -> nn.Module:
        return copy.deepcopy(linear).train(case.training)

    make: dict[str, Callable[[], nn.Module]] = {
        FUSED: lambda: fused(with_lora(own())),
        OWN_BASE: lambda: fused(own()),
        FUNCTION: lambda: _Function(with_lora(own()), weight),
        STOCK: lambda: with_lora(own()),
        DENSE: dense,
        DENSE_LORA: lambda: with_lora(dense()),
        DEQUANTIZE: lambda: _Dequantized(weight),
        COMPILED_STOCK: lambda: torch.compile(with_lora(own()), dynamic=False),
        COMPILED_DENSE: lambda: torch.compile(with_lora(dense()), dynamic=False),
    }
    x, grad_y = torch.randn(case.rows, k).bfloat16(), torch.randn(case.rows, n).bfloat16()
    return Problem(case, x, grad_y, weight, make)


def make_contender(problem: Problem, name: str, layer: nn.Module, isa: str = "") -> Contender:
    """Calls of a layer in the mode of the case."""
    case = problem.case

    def forward(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16) if case.autocast else nullcontext():
            return layer(x)

    if not case.training:
        call = torch.no_grad()(partial(layer if not case.autocast else forward, problem.x))
        return Contender(name, {"forward": call}, isa=isa, repeat=case.repeat)
    x = problem.x.detach().requires_grad_()
    results = []

    def reset() -> None:
        x.grad = None
        layer.zero_grad()

    phases = {
        "forward": lambda: results.append(forward(x)),
        "backward": lambda: results.pop().backward(problem.grad_y),
    }
    return Contender(name, phases, reset, isa)


# ---- Checks ---------------------------------------------------------------------------------------------------------


def expected(problem: Problem, layer: nn.Module, seeds: Tensor) -> dict[str, Tensor]:
    """y and, in training, the gradients, in fp64."""
    leaves = {
        "x": problem.x.double(),
        "lora_A": layer.lora_A["default"].weight.detach().double(),
        "lora_B": layer.lora_B["default"].weight.detach().double(),
    }
    for leaf in leaves.values():
        leaf.requires_grad_(problem.case.training)
    y = oracle(
        leaves["x"], problem.weight.dequantize(), None, [leaves["lora_A"]], [leaves["lora_B"]], [SCALING],
        [problem.case.dropout], seeds,
    )  # fmt: skip
    if not problem.case.training:
        return {"y": y}
    y.backward(problem.grad_y.double())
    return {"y": y.detach()} | {name: leaf.grad for name, leaf in leaves.items()}


def actual(problem: Problem, layer: nn.Module) -> tuple[dict[str, Tensor], Tensor]:
    """The same from the fused layer, and the seeds of the dropout that it drew."""
    case = problem.case
    x = problem.x.detach().requires_grad_(case.training)
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16) if case.autocast else nullcontext():
        y = layer(x)
    torch.manual_seed(1)
    seeds = torch.randint(torch.iinfo(torch.int64).max, (1,))
    if not case.training:
        return {"y": y.detach()}, seeds
    y.backward(problem.grad_y)
    results = {"y": y.detach(), "x": x.grad}
    for name in ("lora_A", "lora_B"):
        results[name] = getattr(layer, name)["default"].weight.grad
    layer.zero_grad()
    return results, seeds


def relative_error(value: Tensor, wanted: Tensor) -> float:
    """rms of the difference, relative to the rms of what is wanted."""
    return ((value.double() - wanted).norm() / wanted.norm()).item()


def check(problem: Problem, layer: nn.Module, isas: Sequence[str]) -> dict[str, float]:
    """The largest error of each instruction set.

    Raises:
        ArithmeticError: an error that the roundings of the result don't explain.
    """
    errors = {}
    wanted = None
    for isa in isas:
        with cpu.use_isa(isa):
            results, seeds = actual(problem, layer)
        wanted = wanted or expected(problem, layer, seeds)
        found = {name: relative_error(results[name], value) for name, value in wanted.items()}
        for name, error in found.items():
            if not error <= TOLERANCES[name]:  # a NaN is not, either
                raise ArithmeticError(
                    f"{problem.case}, {isa}: got {name} with an error of {error:.2g}, wanted {TOLERANCES[name]:g} at most"
                )
        errors[isa] = max(found.values())
    return errors


# ---- Measurements ---------------------------------------------------------------------------------------------------


def work(case: Case, phase: str, weight_bytes: int, lora: bool) -> tuple[int, int]:
    """Bytes and operations that a phase can't do without: each operand is moved once, in bf16, the adapters in fp32."""
    if phase == "both":
        parts = [work(case, part, weight_bytes, lora) for part in ("forward", "backward")]
        return sum(size for size, _ in parts), sum(flops for _, flops in parts)
    m, (n, k) = case.rows, case.shape
    adapter = RANK * (n + k) if lora else 0
    if phase == "forward":
        return weight_bytes + 2 * m * (n + k) + 4 * adapter, 2 * m * (n * k + adapter)
    # grad_y in, grad_x out; x once more for A; the adapters in and their gradients out
    size = weight_bytes + 2 * m * (n + k) + (2 * m * k if lora else 0) + 8 * adapter
    return size, 2 * m * (n * k + 2 * adapter)


def run(case: Case, vs: Sequence[str], isas: Sequence[str], seconds: float, say: Callable[[str], None]) -> list[Record]:
    """Checks and then times a case."""
    torch.compiler.reset()  # past a number of compiled layers torch would silently stop compiling
    problem = make_problem(case)
    layer = problem.make[FUSED]()
    errors = check(problem, layer, isas)
    names = [OWN_BASE, *(name for group in vs for name in BASELINES[group])]
    if case.repeat > 1:
        names = [FUNCTION]
    layers = {name: problem.make[name]() for name in names}
    contenders = [make_contender(problem, FUSED, layer, isa) for isa in isas]
    for name, other in layers.items():
        contender = make_contender(problem, name, other, isas[0])
        try:
            contender.run()
        except Exception as error:
            if not name.startswith("compiled"):
                raise
            say(f"{name}: skipped for {case}: {type(error).__name__}: {str(error).splitlines()[0]}")
            continue
        contenders.append(contender)
    samples = timing.interleaved(contenders, seconds)

    dense_bytes, nf4_bytes = 2 * case.shape[0] * case.shape[1], weight_size(problem.weight)
    records = []
    for contender, taken in zip(contenders, samples, strict=True):
        name = contender.name
        fused = name == FUSED
        dense, lora = name in (DENSE, DENSE_LORA, COMPILED_DENSE), name not in (DENSE, DEQUANTIZE, OWN_BASE)
        peak = saved = None
        if case.repeat == 1:
            peak = timing.peak_memory(contender.run)
        if case.training and not name.startswith("compiled"):
            saved = saved_by(problem, layer if fused else layers[name])
        for phase, values in taken.items():
            size, flops = work(case, phase, dense_bytes if dense else nf4_bytes, lora)
            records.append(
                Record(
                    str(case), phase, name, contender.isa if fused else "", values, size, flops,
                    errors[contender.isa] if fused else None, peak, saved,
                    case.targets(phase, contender.isa) if fused else (),
                )
            )  # fmt: skip
    return records


def weight_size(weight: NF4Weight) -> int:
    return sum(tensor.nbytes for tensor in (weight.codes, weight.absmax, *weight.nested))


def saved_by(problem: Problem, layer: nn.Module) -> int:
    """Bytes that a forward keeps for its backward; x itself counts, for it would be freed otherwise."""
    x = problem.x.detach().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16) if problem.case.autocast else nullcontext():
        return saved_bytes(layer, lambda: layer(x))


def main(arguments: Sequence[str] | None = None) -> None:
    console = Console()
    chosen, cases = options.parse(
        "lora_linear", __doc__.splitlines()[0], arguments, CASES, list(BASELINES), ["compiled"], console
    )
    rooflines = {n: timing.measure_roofline(n) for n in sorted({1, chosen.threads})}
    console.print(report.heading(rooflines), highlight=False)
    results = Report("lora_linear", rooflines, chosen.threads)
    for case in cases:
        with console.status(str(case)):
            results.records += run(case, chosen.vs, chosen.isas, chosen.seconds, console.print)
    report.publish(results, chosen.output, chosen.quick, console)


if __name__ == "__main__":
    main()
