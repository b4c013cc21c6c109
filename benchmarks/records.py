"""What the benchmarks measure and what they want, and on which machine."""

from __future__ import annotations

import datetime
import math
import os
import platform
import statistics
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.timing import Roofline

RESULTS = Path(__file__).parent / "results"
FUSED = "fused"  # this package's contender, in every benchmark


# ---- Targets --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Faster:
    """Wanted: the fused contender is at least so many times as fast as another."""

    phase: str
    versus: str
    times: float

    def met(self, seconds: dict[str, float]) -> bool | None:
        """Whether the medians, by contender, show it; None if the other was not measured."""
        return seconds[self.versus] / seconds[FUSED] >= self.times if self.versus in seconds else None

    def __str__(self) -> str:
        return f"≥ {self.times:g}× {self.versus}"


@dataclass(frozen=True)
class Within:
    """Wanted: the fused contender takes at most this share longer than another."""

    phase: str
    versus: str
    share: float

    def met(self, seconds: dict[str, float]) -> bool | None:
        return seconds[FUSED] / seconds[self.versus] <= 1 + self.share if self.versus in seconds else None

    def __str__(self) -> str:
        return f"≤ {self.share:.0%} over {self.versus}"


@dataclass(frozen=True)
class Below:
    """Wanted: the fused contender takes at most so many seconds."""

    phase: str
    seconds: float

    def met(self, seconds: dict[str, float]) -> bool | None:
        return seconds[FUSED] <= self.seconds

    def __str__(self) -> str:
        return f"≤ {self.seconds * 1e6:g} µs"


@dataclass(frozen=True)
class Nearer:
    """Wanted: the fused contender's error is at most this share of another's."""

    phase: str
    versus: str
    share: float

    def met(self, errors: dict[str, float]) -> bool | None:
        """Whether the errors, by contender, show it; None if the other's is not known."""
        return errors[FUSED] <= self.share * errors[self.versus] if self.versus in errors else None

    def __str__(self) -> str:
        return f"error ≤ {self.share:.2g} of {self.versus}'s"


Target = Faster | Within | Below | Nearer


# ---- Records --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Record:
    """One contender in one phase of one case.

    Attributes:
        isa: of the fused contender; empty for the others.
        samples: seconds, one a round.
        size, flops: bytes and operations that the contender can't do without; zero if that says nothing.
        error: relative rms error against the oracle.
        peak, saved: bytes of memory, see `timing.peak_memory` and `timing.saved_bytes`.
        tokens: that a call handles; zero where there are none.
        wanted: targets of the fused contender.
        estimate: seconds that it would take; it was left out, and has no samples.
    """

    case: str
    phase: str
    contender: str
    isa: str
    samples: Sequence[float]
    size: float = 0.0
    flops: float = 0.0
    error: float | None = None
    peak: int | None = None
    saved: int | None = None
    tokens: int = 0
    wanted: tuple[Target, ...] = ()
    estimate: float | None = None

    @property
    def median(self) -> float:
        """NaN for what was left out."""
        return statistics.median(self.samples) if self.samples else math.nan

    @property
    def quartiles(self) -> tuple[float, float]:
        if len(self.samples) < 2:
            return self.median, self.median
        first, _, third = statistics.quantiles(self.samples, n=4, method="inclusive")
        return first, third

    @property
    def label(self) -> str:
        return self.case if self.phase in self.case.split() else f"{self.case}, {self.phase}"


def beside(record: Record, records: Iterable[Record]) -> dict[str, Record]:
    """What was measured in the record's case and phase, by contender: the first of each, but the record itself."""
    found: dict[str, Record] = {}
    for other in records:
        if (other.case, other.phase) == (record.case, record.phase):
            found.setdefault(other.contender, other)
    return found | {record.contender: record}


def judge(record: Record, records: Iterable[Record]) -> list[tuple[Target, bool | None]]:
    """Each target of a record, and whether it was met."""
    found = beside(record, records)
    medians = {name: other.median for name, other in found.items() if other.samples}
    errors = {name: other.error for name, other in found.items() if other.error is not None}
    return [(target, target.met(errors if isinstance(target, Nearer) else medians)) for target in record.wanted]


def duration(seconds: float) -> str:
    """Three digits, in the unit that suits: 12.3 µs, 4.56 ms, 7.89 s."""
    for unit, scale in (("µs", 1e-6), ("ms", 1e-3)):
        if seconds < 999.5 * scale:
            return f"{_three_digits(seconds / scale)} {unit}"
    return f"{_three_digits(seconds)} s"


def _three_digits(value: float) -> str:
    return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f}"


def rate(record: Record, roofline: Roofline) -> tuple[float, float, float]:
    """GB/s, TFLOP/s, and the share of what the roofline allows."""
    floor = roofline.seconds(record.size, record.flops)
    return record.size / record.median / 1e9, record.flops / record.median / 1e12, floor / record.median


# ---- Machine: torch is imported by what asks it alone, so that saved records can be read and drawn without it -------


def describe_run(device: str = "cpu") -> dict[str, str]:
    """Machine, versions, commit and date."""
    return {
        "machine": describe_machine(device),
        "torch_isa": torch_isa(),
        "versions": describe_versions(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def describe_machine(device: str) -> str:
    import torch

    from peft_kernels import cpu

    if device == "cuda":
        processor = torch.cuda.get_device_name()
    else:
        info = Path("/proc/cpuinfo")
        lines = info.read_text().splitlines() if info.exists() else []
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        processor = f"{(names or [platform.machine()])[0]}, {torch.get_num_threads()} threads"
    return f"{processor}, kernels for {cpu.isa()}"


def describe_versions() -> str:
    import torch

    others = (f"{name} {version(name)}" for name in ("peft", "bitsandbytes", "transformers"))
    return ", ".join([f"torch {torch.__version__}", *others])  # with what it was built for, which a package may not say


def torch_isa() -> str:
    """What torch's own kernels and those of oneDNN are held to; both are set from outside, at the start."""
    import torch

    capability = torch.backends.cpu.get_cpu_capability()
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA")
    return f"{capability}, ONEDNN_MAX_CPU_ISA={limit}" if limit else capability


def commit() -> str:
    """The checkout's commit, with a + if tracked files differ from it; empty outside a checkout."""
    try:
        command = ["git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"]
        return subprocess.run(
            command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
