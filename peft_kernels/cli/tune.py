"""Times linear layers of given shapes against stock, for what `optimize` chooses later: peft_kernels/tune.py."""

from __future__ import annotations

import argparse
import warnings
from typing import Any

from .. import choices, tune


def add_arguments(parser: argparse.ArgumentParser) -> None:
    tune.add_arguments(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    rows, remarks = [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for device, remark, report in tune.run(options):
            remarks += [remark] * bool(remark)
            for layer in report or ():
                rows.append({"device": str(device), "layer": layer.name, "kind": layer.kind, "forward": layer.verdict})
    return {"layers": rows, "remarks": remarks, "kept_in": str(choices.path())}
