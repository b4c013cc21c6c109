"""What the demos print, draw and save of two models that are measured side by side."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.records import describe_versions, duration
from benchmarks.timing import dtype_seconds

COLORS = ("#9aa5b1", "#1f6feb")  # of the two


def choose_dtype(config: Any, rows: int, device: str, say: Callable[[str], None]) -> str:
    """The name of the dtype in which torch is fastest here, by the largest of the model's layers with so many rows."""
    n, k = getattr(config, "intermediate_size", 4 * config.hidden_size), config.hidden_size
    seconds = dtype_seconds(rows, n, k, device)
    chosen = min(seconds, key=seconds.__getitem__)
    times = ", ".join(f"{duration(value)} in {name}" for name, value in seconds.items())
    say(f"Torch's products of a layer {n} x {k}, {rows} tokens, take {times}: the models compute in {chosen}")
    return chosen


@dataclass(frozen=True)
class Row:
    """A line of the results: what was measured, for each model."""

    name: str
    unit: str
    stock: float
    accelerated: float
    compared: bool = True  # whether the ratio of the two says something

    @property
    def change(self) -> str:
        """The accelerated value as a multiple of the stock one."""
        return f"× {self.accelerated / self.stock:.2f}" if self.compared and self.stock else ""


def readable(value: float) -> str:
    """Four digits, or all of those before the point."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def megabytes(count: int) -> float:
    return count / 1e6


def result_table(rows: Sequence[Row], title: str, headings: tuple[str, str]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for heading in (*headings, "ratio"):
        table.add_column(heading, justify="right")
    for row in rows:
        values = [f"{readable(value)} {row.unit}".rstrip() for value in (row.stock, row.accelerated)]
        table.add_row(row.name, *values, row.change)
    return table


@contextmanager
def two_panels(rows: Sequence[Row], machine: str, path: Path) -> Iterator[Any]:
    """A figure whose right half has a pair of bars for each compared row; yields the left half, to be drawn into."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    compared = [row for row in rows if row.compared]
    with pyplot.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = pyplot.figure(figsize=(11, max(4.6, 0.7 * len(compared))), layout="constrained")
        left, right = figure.subfigures(1, 2, width_ratios=[1.1, 1])
        yield left
        for axes, row in zip(right.subplots(len(compared), 1), compared, strict=True):
            bars = axes.barh([1, 0], [row.stock, row.accelerated], color=COLORS)
            labels = [readable(row.stock), f"{readable(row.accelerated)} ({row.change})"]
            axes.bar_label(bars, labels, padding=3, fontsize=8)
            axes.set_title(f"{row.name} [{row.unit}]", loc="left", fontsize=9)
            axes.set(xlim=(0, 1.3 * max(row.stock, row.accelerated)), xticks=[], yticks=[])
            axes.spines["bottom"].set_visible(False)
        figure.suptitle(machine, x=0.01, ha="left", fontsize=8, color="#57606a")
        figure.savefig(path, dpi=150)
        pyplot.close(figure)


def save(results: dict[str, Any], settings: Any, machine: str, path: Path) -> dict[str, Any]:
    """Writes results as JSON, with what they were got on and with; returns all that is in the file."""
    settings = {**dataclasses.asdict(settings), "model": settings.model.name}
    results = {"machine": machine, "versions": describe_versions(), "settings": settings, **results}
    path.write_text(json.dumps(results, indent=2) + "\n")
    return results
