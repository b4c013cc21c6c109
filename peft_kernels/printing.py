"""How the package's reports on a model are printed."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator

from rich.console import Console
from rich.table import Table


class PrintedReport:
    """A report that prints as its table: by `print`, and in color by rich."""

    def __rich__(self) -> Table:
        raise NotImplementedError

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=120).print(self)
        return text.getvalue()


def starred(name: str) -> str:
    """A module's name with a star for each number, so that a model's layers can share a row."""
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name)


def indented(names: Iterable[str]) -> Iterator[str]:
    """Modules' names, in the model's order, without what the name of a module around them has said already."""
    around = [""]  # prefixes of the names inside those modules
    for name in names:
        while not name.startswith(around[-1]):
            around.pop()
        yield "  " * (len(around) - 1) + name.removeprefix(around[-1]) if name else "(the model)"
        around.append(f"{name}." if name else "")
