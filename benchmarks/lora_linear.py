"""LoRA on a 4-bit linear layer: checked against fp64, then timed against stock, dense and compiled layers.

Every contender has the same numbers: W is quantised to NF4 with double quantisation, and the dense layers have its
decoded values in bf16. x is bf16; A and B are fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from benchmarks import options, timing
from benchmarks.lora_layers import (
    COMPILED_DENSE,
    COMPILED_STOCK,
    DENSE,
    DENSE_LORA,
    DEQUANTIZE,
    FUNCTION,
    OWN_BASE,
    RANK,
    STOCK,
    check,
    in_graph,
    make_contender,
    make_problem,
    saved_by,
    stored_bytes,
)
from benchmarks.records import FUSED, Below, Faster, Record, Target, Within
from benchmarks.report import Report, make_console
from peft_kernels import cpu

BASELINES = {
    "dense": (DENSE, DENSE_LORA),
    "stock": (STOCK,),
    "dequantize": (DEQUANTIZE,),
    "compiled": (COMPILED_STOCK, COMPILED_DENSE),
}

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


def run(
    case: Case,
    vs: Sequence[str],
    isas: Sequence[str],
    seconds: float,
    say: Callable[[str], None],
    device: str = "cpu",
) -> list[Record]:
    """Checks and then times a case."""
    torch.compiler.reset()  # past a number of compiled layers torch would silently stop compiling
    problem = make_problem(case, device)
    layer = problem.make[FUSED]()
    errors = check(problem, layer, isas)
    names = [OWN_BASE, *(name for group in vs for name in BASELINES[group])]
    if case.repeat > 1:
        names = [FUNCTION]
    layers = {name: problem.make[name]() for name in names}
    others = [make_contender(problem, name, layers[name], isas[0]) for name in names]
    contenders = [make_contender(problem, FUSED, layer, isa) for isa in isas]
    contenders += timing.runnable(others, BASELINES["compiled"], say)
    if device == "cuda" and not case.training and case.rows <= 32:
        contenders += [in_graph(contender) for contender in contenders if contender.name in (FUSED, STOCK, DENSE)]
    samples = timing.interleaved(contenders, seconds)

    dense_bytes, nf4_bytes = 2 * case.shape[0] * case.shape[1], stored_bytes(problem.weight)
    records = []
    for contender, taken in zip(contenders, samples, strict=True):
        name = contender.name
        name = name.removesuffix(", in a graph")
        fused = contender.name == FUSED
        dense, lora = name in (DENSE, DENSE_LORA, COMPILED_DENSE), name not in (DENSE, DEQUANTIZE, OWN_BASE)
        peak = saved = None
        if case.repeat == 1:
            peak = timing.peak_memory(contender.run, device)
        if case.training and not name.startswith("compiled"):
            saved = saved_by(problem, layer if fused else layers[name])
        for phase, values in taken.items():
            size, flops = work(case, phase, dense_bytes if dense else nf4_bytes, lora)
            records.append(
                Record(
                    str(case), phase, contender.name, contender.isa if fused else "", values, size, flops,
                    errors[contender.isa] if fused else None, peak, saved,
                    wanted=case.targets(phase, contender.isa) if fused and device == "cpu" else (),
                )
            )  # fmt: skip
    return records


def main(arguments: Sequence[str] | None = None) -> None:
    console = make_console()
    chosen, cases = options.parse(
        "lora_linear", __doc__.splitlines()[0], arguments, CASES, list(BASELINES), ["compiled"], console,
        devices=("cpu", "cuda"),
    )  # fmt: skip
    results = Report.begin("lora_linear", chosen, console)
    isas = chosen.isas if chosen.device == "cpu" else chosen.isas[:1]
    for case in cases:
        with console.status(str(case)):
            records = run(case, chosen.vs, isas, chosen.seconds, console.print, chosen.device)
        results.add(records)
    results.finish()


if __name__ == "__main__":
    main()
