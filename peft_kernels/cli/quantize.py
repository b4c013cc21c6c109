"""A checkpoint in 4 bits, of dense weights or of other 4-bit ones."""

from __future__ import annotations

import argparse
from typing import Any

from .arguments import require
from .export import add_common, entries, export


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common(parser)
    parser.add_argument("--type", choices=("nf4", "fp4"), default="nf4", help="the 4-bit numbers (default: nf4)")
    parser.add_argument(
        "--blocksize", type=int, choices=[2**n for n in range(5, 13)], default=64, help="elements with one absmax (64)"
    )
    parser.add_argument("--no-double-quant", action="store_true", help="store each absmax in 32 bits instead of 8")
    parser.add_argument(
        "--skip", action="append", default=[], metavar="MODULE",
        help="what stays dense beside the output layer, by name or its end; may be given several times",
    )  # fmt: skip


def run(options: argparse.Namespace) -> dict[str, Any]:
    require("transformers")
    report = export(
        options,
        quantize=options.type,
        blocksize=options.blocksize,
        double_quant=not options.no_double_quant,
        skip_modules=options.skip,
    )
    return entries(report)
