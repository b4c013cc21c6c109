"""The tiny calls of every family, one after another: what compute-sanitizer and ncu look at.

`python -m benchmarks.card.driver --device cuda`
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from benchmarks.card.cases import FAMILIES, cases
from benchmarks.records import FUSED


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.card.driver", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="(cuda)")
    parser.add_argument("--family", nargs="+", choices=FAMILIES, default=FAMILIES, help="(all)")
    given = parser.parse_args(arguments)
    torch.manual_seed(0)
    for case in cases(tiny=True):
        if case.family in given.family:
            with torch.device(given.device):
                problem = case.make()
                case.results(problem, problem.functions[FUSED], problem.leaves)
            print(case.family, case.name, flush=True)
    if given.device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
