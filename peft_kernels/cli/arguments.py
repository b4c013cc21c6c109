"""Types of arguments, whose errors say what was given and what was wanted."""

from __future__ import annotations

import argparse
import importlib.util
import math
from collections.abc import Callable
from typing import Any


def number(kind: type, accepts: Callable[[Any], bool], wanted: str) -> Callable[[str], Any]:
    """An argparse type for numbers that are accepted."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not accepts(value):
            raise argparse.ArgumentTypeError(f"got '{text}', wanted {wanted}")
        return value

    return parse


COUNT = number(int, lambda n: n >= 1, "a whole number of at least 1")
NUMBER = number(int, lambda n: n >= 0, "a whole number of at least 0")
POSITIVE = number(float, lambda x: 0 < x < math.inf, "a number above 0")


def require(*names: str) -> None:
    """Refuses to go on where a package is missing that this one can do without.

    Raises:
        ModuleNotFoundError: with what to do.
    """
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(f"needs {' and '.join(missing)}: pip install {' '.join(missing)}")
