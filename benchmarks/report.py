"""What the benchmarks measured, as a table, a CSV file and a plot, and whether it is what was wanted."""

from __future__ import annotations

import csv
import datetime
import os
import statistics
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from benchmarks.demo import describe_machine, describe_versions
from benchmarks.options import Options
from benchmarks.timing import Roofline, measure_roofline

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


Target = Faster | Within | Below


# ---- Records --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Record:
    """One contender in one phase of one case.

    Attributes:
        isa: of the fused contender; empty for the others.
        samples: seconds, one a round.
        size, flops: bytes and operations that the contender can't do without; zero if that says nothing.
        error: relative rms error against the oracle.
        peak, saved: bytes of memory, see `timing.peak_memory` and `finetune.saved_bytes`.
        tokens: that a call handles; zero where there are none.
        wanted: targets of the fused contender.
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

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        if len(self.samples) < 2:
            return self.median, self.median
        first, _, third = statistics.quantiles(self.samples, n=4, method="inclusive")
        return first, third


@dataclass
class Report:
    """Everything that one run of a benchmark measured."""

    benchmark: str
    rooflines: dict[int, Roofline]  # by threads
    threads: int
    records: list[Record] = field(default_factory=list)

    @classmethod
    def begin(cls, benchmark: str, options: Options, console: Console) -> Report:
        """Measures the roofline, and prints it below the machine and the versions."""
        with console.status("Measuring the roofline"):
            rooflines = {threads: measure_roofline(threads) for threads in sorted({1, options.threads})}
        lines = [f"{describe_machine('cpu')}; {describe_versions()}", *map(str, rooflines.values())]
        console.print("\n".join(lines), highlight=False)
        return cls(benchmark, rooflines, options.threads)

    @property
    def roofline(self) -> Roofline:
        return self.rooflines[self.threads]

    def add(self, records: Sequence[Record], console: Console) -> None:
        """Takes the records of one case, and prints them."""
        self.records += records
        console.print(case_table(records, self.roofline))

    def beside(self, record: Record) -> dict[str, Record]:
        """What was measured in the record's case and phase, by contender; of the fused ones it is the record's own."""
        same = (r for r in self.records if (r.case, r.phase) == (record.case, record.phase))
        own = record if record.contender == FUSED else None
        found: dict[str, Record] = {}
        for other in same:
            found.setdefault(other.contender, other)
        return found | ({FUSED: own} if own else {})

    def lines(self) -> Iterator[tuple[Record, dict[str, Record]]]:
        """Each fused record, and what stands beside it."""
        return ((record, self.beside(record)) for record in self.records if record.contender == FUSED)

    def publish(self, options: Options, console: Console) -> Path:
        """Sums up, and writes the files; a quick run's have other names, and never replace a thorough one's.

        Returns:
            The files' path without its suffix.
        """
        verdicts = [met for record in self.records for _, met in judge(record, self.beside(record))]
        if decided := [met for met in verdicts if met is not None]:
            console.print(f"{sum(decided)} of {len(decided)} targets met")
        stem = options.output / (self.benchmark + ("-quick" if options.quick else ""))
        write_csv(self, stem.with_suffix(".csv"))
        draw(self, stem.with_suffix(".png"))
        console.print(f"Saved: {stem}.csv, {stem}.png", soft_wrap=True)
        return stem


def judge(record: Record, beside: dict[str, Record]) -> list[tuple[Target, bool | None]]:
    """Each target of a record, and whether it was met."""
    medians = {name: other.median for name, other in beside.items()}
    return [(target, target.met(medians)) for target in record.wanted]


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


def torch_isa() -> str:
    """What torch's own kernels and those of oneDNN are held to; both are set from outside, at the start."""
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


# ---- Output ---------------------------------------------------------------------------------------------------------


def make_console() -> Console:
    """The terminal; or a file, in which lines may be longer."""
    console = Console()
    return console if console.is_terminal else Console(width=130)


def case_table(records: Sequence[Record], roofline: Roofline) -> Table:
    """A line for each contender: medians of the phases, what they make of the machine, memory; then what was wanted.

    Beside a baseline's time stands how many times as fast the (first) fused contender is.
    """
    phases = list(dict.fromkeys(record.phase for record in records))
    fused = {record.phase: record.median for record in reversed(records) if record.contender == FUSED}
    by_contender: dict[tuple[str, str], dict[str, Record]] = {}
    for record in records:
        by_contender.setdefault((record.contender, record.isa), {})[record.phase] = record
    rows = []
    for (name, isa), by_phase in by_contender.items():
        cells = {"median": f"{name}, {isa}" if isa else name}
        for phase in phases:
            ratio = "" if name == FUSED else f" {by_phase[phase].median / fused[phase]:.2f}×"
            cells[phase] = duration(by_phase[phase].median) + ratio
        rows.append(cells | _extras(by_phase[phases[-1]], roofline))
    table = Table(title=records[0].case, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    headings = [heading for heading in rows[0] if any(row[heading] for row in rows)]
    for heading in headings:
        first = heading == "median"
        table.add_column(heading, justify="left" if first else "right", min_width=22 if first else None, no_wrap=True)
    for row in rows:
        table.add_row(*(row[heading] for heading in headings))
    table.caption, table.caption_justify, table.caption_style = "\n".join(_verdicts(records)), "left", ""
    return table


def _extras(record: Record, roofline: Roofline) -> dict[str, str]:
    gigabytes, teraflops, share = rate(record, roofline)
    return {
        "tokens/s": f"{record.tokens / record.median:.1f}" if record.tokens else "",
        "GB/s": f"{gigabytes:.1f}" if record.size else "",
        "TFLOP/s": f"{teraflops:.3f}" if record.flops else "",
        "roofline": f"{share:.0%}" if record.size else "",
        "peak MB": "" if record.peak is None else f"{record.peak / 1e6:.2f}",
        "saved MB": "" if record.saved is None else f"{record.saved / 1e6:.2f}",
    }


def _verdicts(records: Sequence[Record]) -> Iterator[str]:
    for record in records:
        beside = {other.contender: other for other in records if other.phase == record.phase} | {
            record.contender: record
        }
        for target, met in judge(record, beside):
            mark = "?" if met is None else "[green]✓[/]" if met else "[red]✗[/]"
            yield f"{mark} wanted: {record.phase} {target}, {record.isa}".rstrip(", ")


def write_csv(report: Report, path: Path) -> None:
    """A row for each record; machine, versions, commit and date stand in each, so that files can be put together."""
    machine = {
        "machine": describe_machine("cpu"),
        "torch_isa": torch_isa(),
        "versions": describe_versions(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "roofline": "; ".join(map(str, report.rooflines.values())),
    }
    rows = []
    for record in report.records:
        gigabytes, teraflops, share = rate(record, report.roofline)
        first, third = record.quartiles
        beside = report.beside(record)
        rows.append(
            {
                "benchmark": report.benchmark,
                "case": record.case,
                "phase": record.phase,
                "contender": record.contender,
                "isa": record.isa,
                "threads": report.threads,
                "median_ms": f"{record.median * 1e3:.6g}",
                "quartile1_ms": f"{first * 1e3:.6g}",
                "quartile3_ms": f"{third * 1e3:.6g}",
                "rounds": len(record.samples),
                "times_fused": f"{record.median / beside[FUSED].median:.4g}",
                "tokens_per_s": f"{record.tokens / record.median:.4g}" if record.tokens else "",
                "gb_per_s": f"{gigabytes:.4g}" if record.size else "",
                "tflop_per_s": f"{teraflops:.4g}" if record.flops else "",
                "share_of_roofline": f"{share:.4g}" if record.size else "",
                "error": "" if record.error is None else f"{record.error:.3g}",
                "peak_bytes": record.peak,
                "saved_bytes": record.saved,
                "wanted": "; ".join(map(str, record.wanted)),
                "met": "; ".join(str(met) for _, met in judge(record, beside)),
                **machine,
            }
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def draw(report: Report, path: Path) -> None:
    """For each line of the table a point for each baseline, where the fused kernels are so many times as fast."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = list(report.lines())
    baselines = dict.fromkeys(record.contender for record in report.records if record.contender != FUSED)
    several = len({record.isa for record, _ in lines}) > 1
    labels = [f"{r.case}, {r.phase}" + (f", {r.isa}" if several else "") for r, _ in lines]
    style = {"font.size": 8, "axes.spines.top": False, "axes.spines.right": False}
    with pyplot.rc_context(style):
        figure, axes = pyplot.subplots(figsize=(9, 1.4 + 0.2 * len(lines)), layout="constrained")
        axes.axvline(1, color="#57606a", linewidth=0.8)
        for name, marker in zip(baselines, "osD^vPX*<>", strict=False):
            points = [(b[name].median / r.median, y) for y, (r, b) in enumerate(lines) if name in b]
            axes.plot(*zip(*points, strict=True), marker, markersize=4.5, label=name)
        wanted = [
            (target.times, y) for y, (r, _) in enumerate(lines) for target in r.wanted if isinstance(target, Faster)
        ]
        if wanted:
            axes.plot(*zip(*wanted, strict=True), "|", markersize=9, color="#57606a", label="wanted")
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}×")
        axes.set_yticks(range(len(lines)), labels)
        axes.set(ylim=(len(lines) - 0.5, -0.5), xlabel="times as fast as the baseline")
        axes.grid(axis="both", color="#eaeef2", linewidth=0.6)
        axes.set_axisbelow(True)
        figure.legend(frameon=False, ncols=5, loc="outside lower center")
        versions = f"{describe_machine('cpu')}; {describe_versions()}; {commit()}"
        figure.suptitle(f"{report.benchmark}\n{versions}", x=0.01, ha="left", fontsize=7, color="#57606a")
        figure.savefig(path, dpi=150)
        pyplot.close(figure)
