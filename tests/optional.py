"""Packages that a machine with a GPU may lack: what needs one is skipped there, and says so.

A test imports what it needs, at the top of its module or within; `conftest.py` makes a skip of an import that fails.
With PEFT_KERNELS_REQUIRE_ALL in the environment no test runs without all of them, so that where they are installed none
is skipped unnoticed.
"""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

NAMES = {
    "accelerate", "bitsandbytes", "datasets", "expecttest", "gguf", "matplotlib", "mypy", "peft", "psutil", "pybind11",
    "pyright", "sentencepiece", "tokenizers", "transformers", "trl",
}  # fmt: skip


def require_all() -> None:
    """Ends the run if a package is not installed and the environment has PEFT_KERNELS_REQUIRE_ALL."""
    absent = sorted(name for name in NAMES if importlib.util.find_spec(name) is None)
    if absent and os.environ.get("PEFT_KERNELS_REQUIRE_ALL"):
        raise pytest.UsageError(f"PEFT_KERNELS_REQUIRE_ALL is set, and these are not installed: {', '.join(absent)}")


def missing(error: BaseException | None) -> str | None:
    """The name of the package that is not installed, if that is why an error was raised."""
    while error is not None:
        if isinstance(error, ModuleNotFoundError) and error.name in NAMES:
            return error.name
        error = error.__cause__
    return None


@contextmanager
def skipping(what: str = "") -> Iterator[None]:
    """Makes a skip of the import of a package that is not installed."""
    try:
        yield
    except Exception as error:
        name = missing(error)
        if not name:
            raise
        pytest.skip(f"{what}needs {name}", allow_module_level=True)


def if_installed(name: str) -> Any:
    """A module, for files that need it for a part of their tests; if it is missing, what says so when one uses it."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if not missing(error):
            raise
        return _Missing(error)


class _Missing:
    def __init__(self, error: ModuleNotFoundError) -> None:
        self._error = error

    def __getattr__(self, attribute: str) -> Any:
        raise self._error
