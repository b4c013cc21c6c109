"""One LoRA adapter of several."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..ops.combine import MAJORITY_SIGNS
from .arguments import COUNT, NUMBER, number
from .export import entries, weighted
from .output import Share, progress

SHARE = number(float, lambda x: 0 <= x <= 1, "a number from 0 to 1")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from ..checkpoints.combine import COMBINATIONS

    parser.add_argument(
        "adapters", nargs="+", type=weighted, metavar="DIR[=WEIGHT]", help="PEFT's folders, each with its weight (1)"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="the folder to write")
    parser.add_argument("--method", choices=COMBINATIONS, default="ties", help="how (default: ties)", metavar="METHOD")
    parser.description = f"{parser.description} METHOD is one of {', '.join(COMBINATIONS)}."
    parser.add_argument("--density", type=SHARE, default=1.0, help="the share of the elements that pruning keeps (1)")
    parser.add_argument("--rank", type=COUNT, help="of the result, with svd; by default the largest of the adapters'")
    parser.add_argument(
        "--majority-sign", choices=MAJORITY_SIGNS, default="total", help="how ties elects signs (total)"
    )
    parser.add_argument("--seed", type=NUMBER, help="of the masks of dare; by default they are new ones each time")
    parser.add_argument("--overwrite", action="store_true", help="replace an adapter at the destination")


def run(options: argparse.Namespace) -> dict[str, Any]:
    from ..checkpoints import combine_adapters

    report = combine_adapters(
        [folder for folder, _ in options.adapters],
        options.output,
        options.method,
        weights=[weight for _, weight in options.adapters],
        density=options.density,
        rank=options.rank,
        majority_sign=options.majority_sign,
        seed=options.seed,
        overwrite=options.overwrite,
        progress=progress,
    )
    return entries(report) | {"lost": None if report.lost is None else Share(report.lost)}
