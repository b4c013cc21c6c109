"""A checkpoint with adapters merged and dense weights, also of one in 4 bits."""

from __future__ import annotations

import argparse
import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..ops._arguments import FLOAT_DTYPES, dtype_name
from .arguments import POSITIVE, number
from .output import Bytes, progress

if TYPE_CHECKING:
    from ..checkpoints import ExportReport

FINITE = number(float, lambda x: abs(x) < float("inf"), "a number")
_DTYPES = {dtype_name(dtype): dtype for dtype in FLOAT_DTYPES}
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common(parser)


def add_common(parser: argparse.ArgumentParser, *, needs_adapter: bool = False) -> None:
    """What `merge` and `quantize` take, too."""
    parser.add_argument("base", type=Path, metavar="BASE", help="with config.json and safetensors, dense or in 4 bits")
    parser.add_argument("destination", type=Path, metavar="DESTINATION", help="the folder to write")
    parser.add_argument(
        "--adapter", dest="adapters", action="append", type=weighted, default=[], required=needs_adapter,
        metavar="DIR[=WEIGHT]",
        help="a PEFT adapter to merge, and what its change is multiplied with; may be given several times",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=_DTYPES, help="of the weights; by default the base's")
    parser.add_argument("--shard-size", type=size, default=5 * 10**9, metavar="SIZE", help="of a file, as 5GB or 500MB")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint at the destination")


def run(options: argparse.Namespace) -> dict[str, Any]:
    return entries(export(options))


def export(options: argparse.Namespace, **more: Any) -> ExportReport:
    from ..checkpoints import export_checkpoint

    return export_checkpoint(
        options.base,
        options.destination,
        [folder for folder, _ in options.adapters],
        weights=[weight for _, weight in options.adapters],
        dtype=_DTYPES.get(options.dtype),
        max_shard_size=options.shard_size,
        overwrite=options.overwrite,
        progress=progress,
        **more,
    )


def entries(report: Any) -> dict[str, Any]:
    """What is printed of a report, with its size in bytes."""
    found = {name: value for name, value in asdict(report).items() if name not in ("nbytes", "merged_weights")}
    return found | {"destination": str(report.destination), "size": Bytes(report.nbytes)}


def weighted(text: str) -> tuple[Path, float]:
    """An argparse type: a folder, and a weight behind its last `=`, if that is not a part of its name."""
    folder, sign, weight = text.rpartition("=")
    return (Path(folder), FINITE(weight)) if sign and not Path(text).exists() else (Path(text), 1.0)


def size(text: str) -> int:
    """An argparse type: bytes, as 5GB."""
    match = re.fullmatch(r"([0-9.]+) *([KMGT]?)B?", text, re.IGNORECASE)
    if not match:
        raise argparse.ArgumentTypeError(f"got '{text}', wanted a size as 5GB or 500MB")
    return max(1, int(POSITIVE(match[1]) * _UNITS[match[2].upper()]))
