"""What the benchmarks measured, as a table, a CSV file and a plot, and whether it is what was wanted."""

from __future__ import annotations

import csv
import datetime
import statistics
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.demo import describe_machine, describe_versions
from benchmarks.timing import Roofline

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

    @property
    def roofline(self) -> Roofline:
        return self.rooflines[self.threads]

    def lines(self) -> Iterator[tuple[Record, dict[str, Record]]]:
        """Each fused record, with all records of its case and phase by contender, itself among them."""
        for record in self.records:
            if record.contender == FUSED:
                beside = {
                    other.contender: other
                    for other in self.records
                    if (other.case, other.phase) == (record.case, record.phase) and other.contender != FUSED
                }
                yield record, {FUSED: record, **beside}

    def verdicts(self) -> Iterator[tuple[Record, Target, bool | None]]:
        """Each target, and whether it was met."""
        for record, beside in self.lines():
            medians = {name: other.median for name, other in beside.items()}
            for target in record.wanted:
                yield record, target, target.met(medians)

    def baselines(self) -> list[str]:
        return list(dict.fromkeys(record.contender for record in self.records if record.contender != FUSED))


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


def commit() -> str:
    """The checkout's commit, with a + if tracked files differ from it; empty outside a checkout."""
    try:
        command = ["git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"]
        return subprocess.run(
            command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def heading(rooflines: dict[int, Roofline]) -> str:
    """The machine and what it can do at best."""
    return "\n".join([f"{describe_machine('cpu')}; {describe_versions()}", *map(str, rooflines.values())])


# ---- Output ---------------------------------------------------------------------------------------------------------


def speed_table(report: Report) -> Table:
    """A line for each fused record: its speed, and the baselines' time with how many times as fast it is."""
    baselines = report.baselines()
    table = Table(title="Medians, and how many times as fast the fused kernels are", title_justify="left")
    for heading in ("case", "phase", "isa"):
        table.add_column(heading, no_wrap=heading != "case")
    for heading in (FUSED, "GB/s", "TFLOP/s", "roofline", *baselines):
        table.add_column(heading, justify="right")
    table.add_column("wanted")
    previous = None
    for record, beside in report.lines():
        if previous not in (None, record.case):
            table.add_section()
        speeds = ["", "", ""]
        if record.flops or record.size:
            gigabytes, teraflops, share = rate(record, report.roofline)
            speeds = [f"{gigabytes:.1f}", f"{teraflops:.3f}" if teraflops else "", f"{share:.0%}"]
        cells = [
            f"{duration(beside[name].median)} [bold]{beside[name].median / record.median:.2f}×[/]"
            if name in beside
            else ""
            for name in baselines
        ]
        medians = {name: other.median for name, other in beside.items()}
        wanted = "\n".join(f"{_mark(target.met(medians))} {target}" for target in record.wanted)
        name = record.case if previous != record.case else ""
        table.add_row(name, record.phase, record.isa, duration(record.median), *speeds, *cells, wanted)
        previous = record.case
    return table


def _mark(met: bool | None) -> str:
    return "?" if met is None else "[green]✓[/]" if met else "[red]✗[/]"


def memory_table(report: Report) -> Table | None:
    """Peak memory and what is saved for backward, in MB, for the cases in which they were measured."""
    names = [FUSED, *report.baselines()]
    table = Table(title="Memory in MB: at most above what was there / saved for backward", title_justify="left")
    table.add_column("case")
    for name in names:
        table.add_column(name, justify="right")
    measured = {(r.case, r.contender): r for r in reversed(report.records) if r.peak is not None}
    for case in dict.fromkeys(record.case for record in report.records):
        cells = []
        for name in names:
            record = measured.get((case, name))
            saved = "" if record is None or record.saved is None else f" / {record.saved / 1e6:.2f}"
            cells.append("" if record is None else f"{record.peak / 1e6:.2f}{saved}")
        if any(cells):
            table.add_row(case, *cells)
    return table if table.row_count else None


def write_csv(report: Report, path: Path) -> None:
    """A row for each record; machine, versions, commit and date stand in each, so that files can be put together."""
    machine = {
        "machine": describe_machine("cpu"),
        "versions": describe_versions(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "roofline": "; ".join(map(str, report.rooflines.values())),
    }
    fused = {(r.case, r.phase): r.median for r in reversed(report.records) if r.contender == FUSED}
    medians: dict[tuple[str, str], dict[str, float]] = {}
    for record in report.records:
        if record.contender != FUSED:
            medians.setdefault((record.case, record.phase), {})[record.contender] = record.median
    rows = []
    for record in report.records:
        gigabytes, teraflops, share = rate(record, report.roofline)
        first, third = record.quartiles
        beside = medians.get((record.case, record.phase), {}) | {FUSED: record.median}
        own = record.contender == FUSED
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
                "times_fused": f"{record.median / fused[record.case, record.phase]:.4g}",
                "gb_per_s": f"{gigabytes:.4g}" if record.size else "",
                "tflop_per_s": f"{teraflops:.4g}" if record.flops else "",
                "share_of_roofline": f"{share:.4g}" if record.size else "",
                "error": "" if record.error is None else f"{record.error:.3g}",
                "peak_bytes": record.peak,
                "saved_bytes": record.saved,
                "wanted": "; ".join(map(str, record.wanted)),
                "met": "; ".join(str(target.met(beside)) for target in record.wanted) if own else "",
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
    several = len({record.isa for record, _ in lines}) > 1
    labels = [f"{r.case}, {r.phase}" + (f", {r.isa}" if several else "") for r, _ in lines]
    style = {"font.size": 8, "axes.spines.top": False, "axes.spines.right": False}
    with pyplot.rc_context(style):
        figure, axes = pyplot.subplots(figsize=(9, 1.4 + 0.2 * len(lines)), layout="constrained")
        axes.axvline(1, color="#57606a", linewidth=0.8)
        for name, marker in zip(report.baselines(), "osD^vPX*<>", strict=False):
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


def publish(report: Report, output: Path, quick: bool, console: Console) -> None:
    """Prints and writes all of it; a quick run's files have their own names, and never replace a thorough one's."""
    console.print(speed_table(report))
    memory = memory_table(report)
    if memory is not None:
        console.print(memory)
    verdicts = [met for _, _, met in report.verdicts() if met is not None]
    if verdicts:
        console.print(f"{sum(verdicts)} of {len(verdicts)} targets met")
    stem = output / (report.benchmark + ("-quick" if quick else ""))
    write_csv(report, stem.with_suffix(".csv"))
    draw(report, stem.with_suffix(".png"))
    console.print(f"Saved: {stem}.csv, {stem}.png", soft_wrap=True)
