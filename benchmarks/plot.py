"""The plot of a benchmark's results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.records import FUSED, Faster, Record, beside

GREY = "#57606a"


def draw(records: Sequence[Record], run: dict[str, str], path: Path) -> None:
    """On a line for each fused record, how many times as fast as each baseline it is; a bar where that is wanted."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = [record for record in records if record.contender == FUSED]
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
                if name in others:
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
