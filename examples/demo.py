"""`make demo`: QLoRA fine-tuning of SmolLM2-135M on Python's language reference, stock and accelerated, compared.

Both models start from the same weights and see the same batches, one step each in turn, so that whatever else the
machine does meets both alike.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

import peft_kernels
from benchmarks import finetune, timing
from benchmarks.finetune import PROMPT, Run, Settings
from benchmarks.options import COUNT, number
from benchmarks.progress import progress, working
from benchmarks.records import describe_machine, describe_versions
from benchmarks.timing import within
from examples.demo_options import make_parser, set_up
from examples.demo_results import (
    COLORS,
    Row,
    choose_dtype,
    megabytes,
    result_table,
    save,
    two_panels,
)

DESCRIPTION = "Fine-tunes a small language model with QLoRA, stock and accelerated, and compares the two."
STOCK, ACCELERATED = "stock", "accelerated"
AGREEMENT_STEPS = 8
AVERAGED = 5  # steps whose mean stands for the loss at the start and at the end
GENERATED = 48
GENERATION_ROUNDS = 2
SHARES = {"training": 0.45, "curves": 0.15, "memory": 0.1, "generation": 0.1}  # of the time


# ---- Stages ---------------------------------------------------------------------------------------------------------


def compare_curves(settings: Settings, batches: Tensor, console: Console, seconds: float) -> dict[str, float]:
    """Trains without dropout, where every variant computes the same thing, and returns how far the loss curves part.

    The yardstick of bf16 is how far stock in it parts from stock in fp32.
    """
    exact = f"{STOCK}, fp32"
    variants = {name: settings for name in (STOCK, ACCELERATED)}
    if settings.dtype != "fp32":
        variants[exact] = dataclasses.replace(settings, dtype="fp32")
    losses = {}
    with progress(console, len(batches), list(variants)) as advance:
        for name, variant in variants.items():
            model = finetune.load_with_lora(variant, dropout=0.0)
            if name == ACCELERATED:
                peft_kernels.optimize(model)
            run = Run(model, settings.lr)
            for batch in within(seconds / len(variants), batches):
                run.step(batch)
                advance(name, run.losses[-1], run.seconds_per_step)
            losses[name] = run.losses
    common = min(map(len, losses.values()))
    pairs = [(ACCELERATED, STOCK), (STOCK, exact), (ACCELERATED, exact)]
    return {
        f"{a} and {b}": finetune.largest_difference(losses[a][:common], losses[b][:common])
        for a, b in pairs
        if b in losses
    }


def train(runs: dict[str, Run], batches: Tensor, console: Console, seconds: float) -> None:
    """One step of each run in turn."""
    with progress(console, len(batches), list(runs)) as advance:
        for batch in within(seconds, batches):
            for name, run in runs.items():
                run.step(batch)
                advance(name, run.losses[-1], run.seconds_per_step)


def peak_memories(settings: Settings, batches: Tensor, seconds: float) -> dict[str, int]:
    """Each model's `peak_memory` in a process of its own."""
    peaks = {}
    for name in (STOCK, ACCELERATED):
        with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
            peaks[name] = pool.submit(
                finetune.peak_memory, settings, batches, name == ACCELERATED, seconds / 2
            ).result()
    return peaks


def generation_speeds(runs: dict[str, Run], tokenizer: Any, seconds: float) -> dict[str, float]:
    """Tokens a second of each trained model, in turn; the median of the rounds."""
    speeds: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run.model.eval()
        finetune.generate(run.model, tokenizer, PROMPT, 2)  # warms up: bitsandbytes repacks its weights
    for _ in range(GENERATION_ROUNDS):
        for name, run in runs.items():
            share = seconds / GENERATION_ROUNDS / len(runs)
            speeds[name].append(finetune.generate(run.model, tokenizer, PROMPT, GENERATED, share)[1])
    return {name: statistics.median(values) for name, values in speeds.items()}


def reload_and_generate(settings: Settings, adapter: Path, tokenizer: Any, seconds: float) -> str:
    """A sample of the saved adapter on a fresh base, accelerated."""
    model = PeftModel.from_pretrained(finetune.load_4bit(settings), adapter).eval()
    peft_kernels.optimize(model)
    return finetune.generate(model, tokenizer, PROMPT, GENERATED, seconds)[0]


# ---- Results --------------------------------------------------------------------------------------------------------


def result_rows(
    runs: dict[str, Run], tokens_per_step: int, speeds: dict[str, float], saved: dict[str, int], peaks: dict[str, int]
) -> list[Row]:
    """Everything measured, in the order of the table."""

    def row(name: str, unit: str, value: Callable[[str], float], compared: bool = True) -> Row:
        return Row(name, unit, value(STOCK), value(ACCELERATED), compared)

    few = min(AVERAGED, len(runs[STOCK].losses))
    return [
        row(f"loss, first {few} steps", "", lambda name: statistics.mean(runs[name].losses[:few]), False),
        row(f"loss, last {few} steps", "", lambda name: statistics.mean(runs[name].losses[-few:]), False),
        row("training step, median", "s", lambda name: runs[name].seconds_per_step),
        row("training speed", "tokens/s", lambda name: tokens_per_step / runs[name].seconds_per_step),
        row("saved for backward", "MB", lambda name: megabytes(saved[name])),
        row("peak memory of a step, above idle", "MB", lambda name: megabytes(peaks[name])),
        row("greedy generation", "tokens/s", lambda name: speeds[name]),
    ]


def draw(losses: dict[str, list[float]], rows: Sequence[Row], machine: str, path: Path) -> None:
    """The loss curves, and a pair of bars for each compared row."""
    with two_panels(rows, machine, path) as left:
        curves = left.subplots()
        for (name, values), color, width in zip(losses.items(), COLORS, (3.5, 1.5), strict=True):
            curves.plot(range(1, len(values) + 1), values, color=color, linewidth=width, label=name)
        curves.set(title="Loss", xlabel="step")
        curves.legend(frameon=False)


def draw_saved(results: dict[str, Any], path: Path) -> None:
    """The same from what is in demo.json."""
    rows = [Row(**row) for row in results["results"]]
    draw(results["losses"], rows, f"{results['machine']}; {results['versions']}", path)


# ---- The whole ------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the demo.

    Args:
        arguments: the command line after the benchmark's name; by default the process's.
    """
    parser = make_parser("demo", DESCRIPTION, steps=40, batch=4, length=256, lr=5e-4)
    probability = number(float, lambda x: 0 <= x < 1, "a number from 0 to below 1")
    parser.add_argument("--rank", type=COUNT, default=16, help="of the LoRA adapters (%(default)s)")
    parser.add_argument("--dropout", type=probability, default=0.05, help="of the LoRA adapters (%(default)s)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where to train (%(default)s)")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: got 'cuda', but torch finds no CUDA device; wanted 'cpu'")
    settings, budget, console = set_up(options, Settings, SHARES)
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    tokens = tokenizer(finetune.language_reference(), return_tensors="pt").input_ids[0]
    config = AutoConfig.from_pretrained(settings.model)
    longest = min(len(tokens), config.max_position_embeddings)
    if settings.length > longest:
        parser.error(f"argument --length: got '{settings.length}', wanted at most {longest}: the model's or the text's")
    batches = finetune.make_batches(tokens, settings.steps, settings.batch, settings.length, settings.seed)
    machine = describe_machine(settings.device)
    console.print(f"{settings.model.name} on {len(tokens):,} tokens of Python's language reference")
    console.print(f"{machine}; {describe_versions()}", highlight=False)

    with working(console, "Choosing a dtype"):
        rows = settings.batch * settings.length
        dtype = choose_dtype(config, rows, settings.device, partial(console.print, highlight=False))
    settings = dataclasses.replace(settings, dtype=dtype)

    runs = {}
    for name in (STOCK, ACCELERATED):
        with working(console, f"Loading the {name} model"):
            runs[name] = Run(finetune.load_with_lora(settings, settings.dropout), settings.lr)
    console.print(peft_kernels.optimize(runs[ACCELERATED].model))

    console.rule("Training", align="left")
    train(runs, batches, console, budget.stage("training"))
    if (steps := len(runs[STOCK].losses)) < settings.steps:
        console.print(f"{steps} of {settings.steps} steps, to keep to {options.minutes:g} minutes", highlight=False)

    console.rule("One row a step, without dropout, to compare the loss curves", align="left")
    curves = compare_curves(settings, batches[:AGREEMENT_STEPS, :1], console, budget.stage("curves"))

    with working(console, "Measuring memory, each model in a process of its own"):
        saved = {name: timing.saved_bytes(run.model, partial(run.loss, batches[0])) for name, run in runs.items()}
        peaks = peak_memories(settings, batches[:2], budget.stage("memory"))
    adapter = options.output / "adapter"
    with working(console, "Generating"):
        seconds = budget.stage("generation")
        speeds = generation_speeds(runs, tokenizer, 0.8 * seconds)
        runs[ACCELERATED].model.save_pretrained(adapter)
        sample = reload_and_generate(settings, adapter, tokenizer, 0.2 * seconds)

    rows = result_rows(runs, settings.batch * settings.length, speeds, saved, peaks)
    headings = tuple(f"{name}, {dtype}" for name in (STOCK, ACCELERATED))
    title = f"Stock PEFT and bitsandbytes, and the same accelerated; stock is fastest in {dtype} here"
    console.print(result_table(rows, title, headings))
    console.print("Largest difference of the loss curves without dropout, between")
    for pair, difference in curves.items():
        console.print(f"  {pair}: {difference:.2g}")
    results = {
        "results": [dataclasses.asdict(row) for row in rows],
        "largest differences without dropout": curves,
        "losses": {name: run.losses for name, run in runs.items()},
        "seconds": {name: run.seconds for name, run in runs.items()},
    }
    draw_saved(save(results, settings, machine, options.output / "demo.json"), options.output / "demo.png")
    console.rule("The saved adapter, loaded again on a fresh base and accelerated, writes", align="left")
    console.print(sample, markup=False, highlight=False)
    console.print(f"\nSaved: {adapter}, {options.output / 'demo.png'}, {options.output / 'demo.json'}")
