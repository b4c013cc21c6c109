"""What the demos print, draw and save of two models that are measured side by side."""

from __future__ import annotations

import dataclasses
import json
import math
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import peft_kernels
from benchmarks.finetune import Run

COLORS = ("#9aa5b1", "#1f6feb")  # of the two


@contextmanager
def progress(console: Console, total: int, names: Sequence[str]) -> Iterator[Callable[[str, Run], None]]:
    """A live bar for each name; yields the function that moves one on."""
    columns = [
        TextColumn("{task.description:12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  {task.fields[seconds]:.2f} s/step"),
        TimeRemainingColumn(),
    ]
    with Progress(*columns, console=console) as bars:
        tasks = {name: bars.add_task(name, total=total, loss=math.nan, seconds=math.nan) for name in names}

        def advance(name: str, run: Run) -> None:
            bars.update(tasks[name], advance=1, loss=run.losses[-1], seconds=run.seconds_per_step)

        yield advance


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


def describe_machine(device: str) -> str:
    if device == "cuda":
        processor = torch.cuda.get_device_name()
    else:
        info = Path("/proc/cpuinfo")
        lines = info.read_text().splitlines() if info.exists() else []
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        processor = f"{(names or [platform.machine()])[0]}, {torch.get_num_threads()} threads"
    return f"{processor}, kernels for {peft_kernels.cpu.isa()}"


def describe_versions() -> str:
    others = (f"{name} {version(name)}" for name in ("peft", "bitsandbytes", "transformers"))
    return ", ".join([f"torch {torch.__version__}", *others])  # with what it was built for, which a package may not say


def save(results: dict[str, Any], settings: Any, machine: str, path: Path) -> None:
    """Writes results as JSON, with what they were got on and with."""
    settings = {**dataclasses.asdict(settings), "model": settings.model.name}
    results = {"machine": machine, "versions": describe_versions(), "settings": settings, **results}
    path.write_text(json.dumps(results, indent=2) + "\n")
