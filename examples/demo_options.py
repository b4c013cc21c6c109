"""The command line that the demos share, and what they begin with."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from rich.console import Console

from benchmarks import finetune
from benchmarks.options import COUNT, LENGTH, POSITIVE, SEED, model_path
from benchmarks.progress import make_console
from benchmarks.timing import Budget

Settings = TypeVar("Settings")


def make_parser(
    demo: str, description: str, steps: int, batch: int, length: int, lr: float | None = None, minutes: float = 10.0
) -> argparse.ArgumentParser:
    """The options of the demos, with a demo's own defaults; one without a learning rate chooses it."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks {demo}", description=description)
    add = parser.add_argument
    add("--steps", type=COUNT, default=steps, help="of training, for each model or adapter (%(default)s)")
    add("--batch", type=COUNT, default=batch, help="rows a step (%(default)s)")
    add("--length", type=LENGTH, default=length, help="most tokens of a row (%(default)s)")
    if lr is not None:
        add("--lr", type=POSITIVE, default=lr, help="learning rate of AdamW (%(default)s)")
    add("--model", type=model_path, help="a Hugging Face folder or a GGUF file (SmolLM2-135M-Instruct)")
    add("--minutes", type=POSITIVE, default=minutes, help="fewer steps and examples keep the demo to it (%(default)g)")
    add("--output", type=Path, default=Path("demo-output"), help="folder for results (%(default)s)")
    add("--seed", type=SEED, default=0, help="of examples, initial values, batches and dropout (%(default)s)")
    return parser


def set_up(
    options: argparse.Namespace, make_settings: Callable[..., Settings], shares: Mapping[str, float]
) -> tuple[Settings, Budget, Console]:
    """The settings, with the folder of the base model; the time for each stage; and where to print."""
    finetune.quiet()
    budget = Budget(60 * options.minutes, shares)
    options.output.mkdir(parents=True, exist_ok=True)
    model = finetune.base_model(options.model, options.output / "base")
    given = {name: value for name, value in vars(options).items() if name not in ("output", "minutes")}
    return make_settings(**given | {"model": model}), budget, make_console()
