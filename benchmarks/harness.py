"""What every benchmark does with a case: its contenders are checked, timed in turn and weighed, and recorded.

A contender that would take more than a minute a call is left out, which is found out by parts of the case.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from benchmarks import timing
from benchmarks.records import FUSED, Record, Target, duration
from benchmarks.timing import Contender

Sized = TypeVar("Sized", bound="Rows")
Say = Callable[[str], None]


class Rows:
    """A case whose time grows with its rows, or with another of its fields."""

    grows_with: ClassVar[str] = "rows"

    @property
    def size(self) -> float:
        """What the time of a call is proportional to, about."""
        return getattr(self, self.grows_with)

    def part(self: Sized, share: float) -> Sized:
        """About that share of the case, or the least of it that makes sense."""
        whole = getattr(self, self.grows_with)
        return replace(self, **{self.grows_with: max(1, round(share * whole))})


class Problem(ABC):
    """The numbers of a case, and what competes on them.

    Attributes:
        name: of the case.
        optional: names of contenders that may fail, as a compiler does.
        weighed: whether memory is measured.
        tokens: that a call handles; zero where there are none.
    """

    name: str
    optional: Collection[str] = ()
    weighed: bool = True
    tokens: int = 0

    @abstractmethod
    def contender(self, name: str, isa: str = "") -> Contender:
        """The calls of one of the contenders."""

    @abstractmethod
    def check(self, isas: Sequence[str]) -> Mapping[str, float | None]:
        """The largest relative rms error of the fused contender with each instruction set, if it has any.

        Raises:
            ArithmeticError: an error that the roundings don't explain.
        """

    def error(self, name: str) -> float | None:
        """Of a contender other than the fused one, where a target is set beside it."""
        return None

    def work(self, phase: str, name: str) -> tuple[float, float]:
        """Bytes and operations that a contender can't do without in a phase; zeros if that says nothing."""
        return 0.0, 0.0

    def saved(self, name: str) -> int | None:
        """Bytes that a contender's forward keeps for its backward."""
        return None

    def targets(self, isa: str) -> tuple[Target, ...]:
        """What is wanted of the fused contender with an instruction set."""
        return ()

    def variants(self, contenders: Sequence[Contender]) -> list[Contender]:
        """The same calls in other ways."""
        return []


def measure(
    make_problem: Callable[[Any], Problem],
    case: Rows,
    names: Sequence[str],
    isas: Sequence[str],
    seconds: float,
    say: Say,
    device: str = "cpu",
    least: int = 3,
) -> list[Record]:
    """Checks and then times the fused contender, with each instruction set, and the others."""
    torch.compiler.reset()  # past a number of compiled functions torch would silently stop compiling
    entrants = [(FUSED, isa) for isa in isas] + [(name, isas[0]) for name in names]
    make = cache(make_problem)
    too_long = left_out(make, case, entrants, say)
    problem = make(case)
    errors = problem.check([isa for isa in isas if (FUSED, isa) not in too_long])
    contenders = [problem.contender(*entrant) for entrant in entrants if entrant not in too_long]
    contenders = timing.runnable(contenders, problem.optional, say)
    contenders += problem.variants(contenders)
    records = []
    samples = timing.interleaved(contenders, seconds, least)
    for contender, taken in zip(contenders, samples, strict=True):
        name, fused = contender.name, contender.name == FUSED
        peak = timing.peak_memory(contender.run, device) if problem.weighed else None
        saved = problem.saved(name)
        wanted = problem.targets(contender.isa) if fused else ()
        for phase, values in taken.items():
            records.append(
                Record(
                    problem.name, phase, name, contender.isa if fused else "", values, *work(problem, phase, name),
                    errors[contender.isa] if fused else problem.error(name), peak, saved, problem.tokens,
                    tuple(target for target in wanted if target.phase == phase),
                )
            )  # fmt: skip
    for (name, isa), estimates in too_long.items():
        for phase, estimate in timing.with_sum(estimates).items():
            records.append(
                Record(problem.name, phase, name, isa if name == FUSED else "", (), estimate=estimate)
            )  # fmt: skip
    return records


def left_out(
    make: Callable[[Any], Problem], case: Rows, entrants: Sequence[tuple[str, str]], say: Say
) -> dict[tuple[str, str], dict[str, float]]:
    """The entrants, of a name and an instruction set, that take too long, with the seconds that their phases would."""
    found = {}
    for name, isa in entrants:

        def part(share: float, name: str = name, isa: str = isa) -> tuple[Contender, float]:
            some = case if share >= 1 else case.part(share)
            return make(some).contender(name, isa), some.size / case.size

        try:
            # What would be compiled has the same products when it is not, and each part would be compiled anew.
            with torch.compiler.set_stance("force_eager"):
                seconds = timing.estimate(part)
        except Exception:  # the call itself says why, if it fails as well
            continue
        if sum(seconds.values()) > timing.LIMIT:
            found[name, isa] = seconds
            say(f"{name}: left out, a call takes about {duration(sum(seconds.values()))}")
    return found


def work(problem: Problem, phase: str, name: str) -> tuple[float, float]:
    """Bytes and operations of a phase, or of both."""
    parts = [problem.work(part, name) for part in (("forward", "backward") if phase == "both" else (phase,))]
    size, flops = (sum(part) for part in zip(*parts, strict=True))
    return size, flops


def runner(make_problem: Callable[[Any], Problem], baselines: dict[str, str]) -> Callable[..., list[Record]]:
    """What `report.command` calls for each case of a family: measures its problem, beside the contenders that the names
    on the command line stand for."""

    def run(
        case: Any, vs: Sequence[str], isas: Sequence[str], seconds: float, say: Say, device: str = "cpu"
    ) -> list[Record]:
        return measure(make_problem, case, [baselines[name] for name in vs], isas, seconds, say, device)

    return run


def relative_error(value: Tensor, wanted: Tensor) -> float:
    """rms of the difference, relative to the rms of what is wanted."""
    return ((value.double() - wanted).norm() / wanted.norm()).item()
