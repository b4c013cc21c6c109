"""How what commands return is printed: as tables, or as JSON.

A command returns a mapping. Of its entries a table of names and values is made; one that is a mapping itself becomes a
table of its own, a list of mappings a table with a row for each, and a list of sentences a list.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

WIDTH = 120  # where stdout is no terminal
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


class Bytes(int):
    """A number of bytes, which a table has in a larger unit."""

    def __str__(self) -> str:
        power = min(max(abs(self).bit_length() - 1, 0) // 10, len(_UNITS) - 1)
        return f"{self / 1024**power:.{1 if power else 0}f} {_UNITS[power]}"


class Share(float):
    """A part of 1, which a table has in per cent."""

    def __str__(self) -> str:
        return f"{100 * self:.3g} %"


def show(data: Mapping[str, Any], as_json: bool) -> None:
    """Prints what a command found."""
    if as_json:
        print(json.dumps(_plain(data), indent=2, allow_nan=False))
        return
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(width=WIDTH, highlight=False)
    for part in _rendered(data):
        console.print(part)


def printable(text: str) -> str:
    """A text without characters that a terminal obeys, which may come from a foreign file."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar on stderr where that is a terminal. Yields a function that moves it on by one."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not sys.stderr.isatty()) as bars:
        task = bars.add_task(what, total=total)
        yield lambda: bars.advance(task)


def _plain(value: Any) -> Any:
    """What JSON can hold: it has no numbers that are not finite."""
    if isinstance(value, Mapping):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, (bool, int, float)) else str(value)


def _rendered(data: Mapping[str, Any]) -> Iterator[RenderableType]:
    values = {name: value for name, value in data.items() if not _is_part(value)}
    if values:
        yield _pairs(values)
    for name, value in data.items():
        if not _is_part(value):
            continue
        if isinstance(value, Mapping):
            yield _pairs(value, title=_title(name))
        elif all(isinstance(row, Mapping) for row in value):
            yield _rows(value, _title(name))
        else:
            yield _title(name, "bold")
            sentences = Table.grid(padding=(0, 1))
            for line in value:
                sentences.add_row("  •", Text(printable(str(line))))
            yield sentences


def _is_part(value: Any) -> bool:
    """Whether it is printed below the table of names and values."""
    if isinstance(value, Mapping):
        return bool(value)
    return isinstance(value, (list, tuple)) and any(
        isinstance(row, Mapping) or " " in str(row) or len(str(row)) > 40 for row in value
    )


def _pairs(values: Mapping[str, Any], title: Text | None = None) -> Table:
    table = Table(box=None, show_header=False, title=title, title_justify="left", title_style="bold", pad_edge=False)
    table.add_column(no_wrap=True, style="cyan")
    table.add_column(overflow="fold")
    for name, value in values.items():
        table.add_row(Text("  " if title else "").append(_title(name)), Text(_text(value)))
    return table


def _rows(rows: Sequence[Mapping[str, Any]], title: Text) -> Table:
    columns = dict.fromkeys(name for row in rows for name in row)
    table = Table(box=SIMPLE_HEAD, title=title, title_justify="left", title_style="bold", pad_edge=False)
    for name in columns:
        is_number = all(isinstance(row.get(name, 0), (int, float)) for row in rows)
        table.add_column(_title(name), justify="right" if is_number else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(_text(row.get(name, ""))) for name in columns))
    return table


def _title(name: str, style: str = "") -> Text:  # and no str, of which rich would take [this] for markup
    return Text(printable(name.replace("_", " ")), style)


def _text(value: Any) -> str:
    if value is None or value == () or value == [] or value == {}:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (Bytes, Share)):
        return printable(str(value))
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_text, value))
    return printable(str(value))
