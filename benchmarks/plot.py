"""Plots of what benchmarks and demos have measured, from the files that they leave."""

from __future__ import annotations

import argparse
import csv
import json
import re
from collections.abc import Sequence
from pathlib import Path

from benchmarks.records import FUSED, RESULTS, Faster, Record, beside

GREY = "#57606a"
RUN = ("benchmark", "machine", "versions", "commit", "date")  # columns that are the same in every row


def draw(records: Sequence[Record], run: dict[str, str], path: Path) -> None:
    """On a line for each fused record, how many times as fast as each baseline it is; a bar where that is wanted."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = [record for record in records if record.contender == FUSED and record.samples]
    several = len({record.isa for record in lines}) > 1
    labels = [record.label + (f", {record.isa}" if several else "") for record in lines]
    baselines = dict.fromkeys(record.contender for record in records if record.contender != FUSED)
    with pyplot.rc_context({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = pyplot.subplots(figsize=(9, 1.5 + 0.2 * len(lines)), layout="constrained")
        axes.axvline(1, color=GREY, linewidth=0.8)
        for number, (name, marker) in enumerate(zip(baselines, "osD^vPX*<>", strict=False)):
            style = {"color": f"C{number}", "linestyle": ""}
            measured, wanted = [], []
            for y, record in enumerate(lines):
                others = beside(record, records)
                if name in others and others[name].samples:
                    measured.append((others[name].median / record.median, y))
                wanted += [(t.times, y) for t in record.wanted if isinstance(t, Faster) and t.versus == name]
            axes.plot(*zip(*measured, strict=True), marker=marker, markersize=4.5, label=name, **style)
            if wanted:
                axes.plot(*zip(*wanted, strict=True), marker="|", markersize=11, label=f"wanted of {name}", **style)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}×")
        axes.set_yticks(range(len(lines)), labels)
        axes.set(ylim=(len(lines) - 0.5, -0.5), xlabel="times as fast as the baseline")
        axes.grid(axis="both", color="#eaeef2", linewidth=0.6)
        axes.set_axisbelow(True)
        figure.legend(frameon=False, ncols=4, loc="outside lower center")
        title = "; ".join(run[name] for name in ("machine", "versions", "commit", "date"))
        figure.suptitle(f"{run['benchmark']}\n{title}", x=0.01, ha="left", fontsize=7, color=GREY)
        figure.savefig(path, dpi=150)
        pyplot.close(figure)


def read(path: Path) -> tuple[list[Record], dict[str, str]]:
    """The records of a CSV file, with their medians for samples, and what was the same in all of them.

    Raises:
        ValueError: a benchmark would have written other columns.
    """
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    needed = ("case", "phase", "contender", "isa", "median_ms", "wanted", *RUN)
    if missing := [name for name in needed if not rows or name not in rows[0]]:
        raise ValueError(f"{path}: got no column {', '.join(missing)}, wanted the CSV file of a benchmark")
    records = []
    for row in rows:
        samples = (float(row["median_ms"]) / 1e3,) if row["median_ms"] else ()
        wanted = re.findall(r"≥ ([\d.]+)× ([^;]+)", row["wanted"])
        targets = tuple(Faster(row["phase"], versus, float(times)) for times, versus in wanted)
        records.append(Record(row["case"], row["phase"], row["contender"], row["isa"], samples, wanted=targets))
    return records, {name: rows[0][name] for name in RUN}


def draw_file(path: Path, output: Path) -> None:
    """Draws a file of a benchmark, or of a demo.

    Raises:
        ValueError: it is neither.
    """
    if path.suffix == ".json":
        # They load models, so only where they are asked for.
        from examples import demo, demo_adapters, demo_methods, demo_serving

        results = json.loads(path.read_text())
        demos = {"results": demo, "served": demo_serving, "accuracy": demo_adapters, "methods": demo_methods}
        drawn_by = next((drawn_by for key, drawn_by in demos.items() if key in results), None)
        if drawn_by is None:
            raise ValueError(f"{path}: got neither results nor accuracies, wanted the JSON file of a demo")
        drawn_by.draw_saved(results, output)
    else:
        draw(*read(path), output)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks plot", description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="CSV or JSON (all in benchmarks/results)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder for the plots (where the files are)")
    given = parser.parse_args(arguments)
    files = given.files or sorted(
        path for path in RESULTS.glob("*/*.*") if path.suffix in (".csv", ".json") and "breakdown" not in path.name
    )
    for path in files:
        output = (given.output or path.parent) / f"{path.stem}.png"
        output.parent.mkdir(parents=True, exist_ok=True)
        try:
            draw_file(path, output)
        except (OSError, ValueError) as error:
            parser.error(str(error))
        print(f"Saved: {output}")
