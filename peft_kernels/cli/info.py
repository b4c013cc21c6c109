"""What is installed and built, and what runs on this machine."""

from __future__ import annotations

import argparse
import platform
from typing import Any

from .. import __version__


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(options: argparse.Namespace) -> dict[str, Any]:
    return {"peft_kernels": __version__, "python": platform.python_version()}
