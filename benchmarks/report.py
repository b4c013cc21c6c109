"""What a benchmark measured, as a table for each case, a CSV file and a plot."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from benchmarks import options
from benchmarks.options import Options
from benchmarks.progress import make_console, working
from benchmarks.records import FUSED, Record, beside, describe_run, duration, judge, rate
from benchmarks.timing import Roofline, measure_roofline


@dataclass
class Report:
    """Everything that one run of a benchmark measured.

    Attributes:
        path: of the files, without a suffix.
        rooflines: by threads.
        run: columns that are the same in every row.
    """

    path: Path
    threads: int
    rooflines: dict[int, Roofline]
    run: dict[str, str]
    console: Console
    records: list[Record] = field(default_factory=list)

    @classmethod
    def begin(cls, benchmark: str, options: Options, console: Console) -> Report:
        """Measures the roofline, and prints it below the machine and the versions.

        A quick run's files have names of their own, and never replace a thorough one's.
        """
        with working(console, "Measuring the roofline"):
            counts = sorted({1, options.threads}) if options.device == "cpu" else [options.threads]
            rooflines = {threads: measure_roofline(threads, device=options.device) for threads in counts}
        run = {"benchmark": benchmark, "threads": str(options.threads), **describe_run(options.device)}
        run["roofline"] = "; ".join(map(str, rooflines.values()))
        console.print(f"{run['machine']}; {run['versions']}", *map(str, rooflines.values()), sep="\n", highlight=False)
        options.output.mkdir(parents=True, exist_ok=True)
        device = "" if options.device == "cpu" else f"-{options.device}"
        path = options.output / (benchmark + device + ("-quick" if options.quick else ""))
        return cls(path, options.threads, rooflines, run, console)

    @property
    def roofline(self) -> Roofline:
        return self.rooflines[self.threads]

    def add(self, records: Sequence[Record]) -> None:
        """Takes the records of one case, prints them, and writes the file anew: what is stopped early has that much."""
        self.records += records
        self.console.print(case_table(records, self.roofline))
        write_csv(self.records, self.roofline, self.run, self.path.with_suffix(".csv"))

    def finish(self) -> None:
        """Sums up."""
        verdicts = [met for record in self.records for _, met in judge(record, self.records) if met is not None]
        if verdicts:
            self.console.print(f"{sum(verdicts)} of {len(verdicts)} targets met")
        path = self.path.with_suffix(".csv")
        self.console.print(f"Saved: {path}; to draw it: python -m benchmarks plot {path}", soft_wrap=True)


def case_table(records: Sequence[Record], roofline: Roofline) -> Table:
    """A line for each contender: medians of the phases, what they make of the machine, memory; then what was wanted.

    Beside a baseline's time stands how many times as fast the (first) fused contender is.
    """
    phases = list(dict.fromkeys(record.phase for record in records))
    fused = {
        record.phase: record.median for record in reversed(records) if record.contender == FUSED and record.samples
    }
    by_contender: dict[tuple[str, str], dict[str, Record]] = {}
    for record in records:
        by_contender.setdefault((record.contender, record.isa), {})[record.phase] = record
    rows = []
    for (name, isa), by_phase in by_contender.items():
        cells = {"median": f"{name}, {isa}" if isa else name}
        for phase in phases:
            record = by_phase[phase]
            ratio = f" {record.median / fused[phase]:.2f}×" if name != FUSED and record.samples and fused else ""
            cells[phase] = (duration(record.median) if record.samples else f"~ {duration(record.estimate)}") + ratio
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
        if not record.samples and record.phase == records[-1].phase:
            name = record.contender + (f", {record.isa}" if record.isa else "")
            yield f"{name}: left out, for a part of a call says that it takes about {duration(record.estimate)}"
        for target, met in judge(record, records):
            mark = "?" if met is None else "[green]✓[/]" if met else "[red]✗[/]"
            yield f"{mark} wanted: {record.phase} {target}" + (f", {record.isa}" if record.isa else "")


def write_csv(records: Sequence[Record], roofline: Roofline, run: dict[str, str], path: Path) -> None:
    """A row for each record, with the columns of `run` in each, so that files can be put together."""
    rows = [_row(record, records, roofline) | run for record in records]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def _number(value: float, digits: int) -> str:
    """Nothing where nothing was measured."""
    return "" if math.isnan(value) else f"{value:.{digits}g}"


def _row(record: Record, records: Sequence[Record], roofline: Roofline) -> dict[str, object]:
    gigabytes, teraflops, share = rate(record, roofline)
    first, third = record.quartiles
    verdicts = judge(record, records)
    return {
        "case": record.case,
        "phase": record.phase,
        "contender": record.contender,
        "isa": record.isa,
        "median_ms": _number(record.median * 1e3, 6),
        "quartile1_ms": _number(first * 1e3, 6),
        "quartile3_ms": _number(third * 1e3, 6),
        "rounds": len(record.samples),
        "left_out_estimate_ms": "" if record.estimate is None else _number(record.estimate * 1e3, 3),
        "times_fused": _number(record.median / beside(record, records)[FUSED].median, 4),
        "tokens_per_s": f"{record.tokens / record.median:.4g}" if record.tokens else "",
        "gb_per_s": f"{gigabytes:.4g}" if record.size else "",
        "tflop_per_s": f"{teraflops:.4g}" if record.flops else "",
        "share_of_roofline": f"{share:.4g}" if record.size else "",
        "error": "" if record.error is None else f"{record.error:.3g}",
        "peak_bytes": record.peak,
        "saved_bytes": record.saved,
        "wanted": "; ".join(str(target) for target, _ in verdicts),
        "met": "; ".join("unknown" if met is None else "yes" if met else "no" for _, met in verdicts),
    }


def command(
    name: str,
    description: str,
    cases: Sequence[Any],
    baselines: Collection[str],
    run: Callable[..., list[Record]],
    share: float = 1.0,
    devices: Sequence[str] = ("cpu",),
) -> Callable[[Sequence[str] | None], None]:
    """The command line of a benchmark.

    Args:
        description: its first line is shown.
        run: measures one of the cases, when called as `run(case, vs, isas, seconds, say, device)`.
        share: of the usual time that a case needs.
        devices: what the benchmark can run on, of cpu and cuda.
    """

    def main(arguments: Sequence[str] | None = None) -> None:
        console, summary = make_console(), description.splitlines()[0]
        chosen, selected = options.parse(
            name, summary, arguments, cases, list(baselines), ["compiled"], console, devices
        )
        results = Report.begin(name, chosen, console)
        isas = chosen.isas if chosen.device == "cpu" else chosen.isas[:1]
        for case in selected:
            with working(console, str(case)):
                records = run(case, chosen.vs, isas, share * chosen.seconds, console.print, chosen.device)
            results.add(records)
        results.finish()

    return main
