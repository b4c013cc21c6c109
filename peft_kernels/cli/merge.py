"""A checkpoint with adapters merged that is as its base: dense, or in the base's 4 bits."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from .arguments import COUNT, number
from .export import add_common, entries, export
from .output import Share

_SHARE = number(float, lambda x: 0 <= x < float("inf"), "a share of at least 0")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common(parser, needs_adapter=True)
    parser.add_argument(
        "--correction", type=COUNT, default=0, metavar="RANK",
        help="of a LoRA branch beside each merged 4-bit weight, which has what its codes can't hold (default: none)",
    )  # fmt: skip
    parser.add_argument(
        "--dense-above", type=_SHARE, metavar="SHARE",
        help="store a 4-bit weight that loses more than this share of the adapters' change dense",
    )  # fmt: skip


def run(options: argparse.Namespace) -> dict[str, Any]:
    report = export(options, quantize="base", correction=options.correction, dense_above=options.dense_above)
    weights = [asdict(one) | {"error": Share(one.error), "lost": Share(one.lost)} for one in report.merged_weights]
    return entries(report) | {"merged_weights": weights}
