"""`make train-many`: eight LoRAs for eight small tasks, trained at once on one SmolLM2-135M in 4 bits.

A task turns a few words from Python's language reference into others. Each row of a batch names its task's adapter. At
the end, a step of all adapters is timed beside a step of each, accelerated and stock.
"""

from __future__ import annotations

import argparse
import random
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoTokenizer

import peft_kernels
from benchmarks import finetune
from benchmarks.finetune import Settings
from benchmarks.options import COUNT, POSITIVE, SEED, model_path
from benchmarks.progress import make_console, progress, working
from benchmarks.records import duration
from benchmarks.timing import within
from benchmarks.train_many import APART, STOCK, Steps, Together, adamw, make_steps
from peft_kernels import AdapterSettings, AdapterTrainer

TOGETHER = "all at once"
IGNORED = -100
TASKS: dict[str, Callable[[list[str]], str]] = {
    "shout": lambda words: " ".join(words).upper(),
    "reverse": lambda words: " ".join(reversed(words)),
    "sort": lambda words: " ".join(sorted(words)),
    "first": lambda words: words[0],
    "last": lambda words: words[-1],
    "longest": lambda words: max(words, key=len),
    "initials": lambda words: "".join(word[0] for word in words),
    "count": lambda words: str(len(words)),
}

Batch = tuple[list[str], Tensor, Tensor, Tensor]  # names; tokens, mask and labels [rows, length]


def make_batch(tasks: Sequence[str], rows: int, tokenizer: Any, choose: random.Random) -> Batch:
    """So many rows of each task; only their answers have labels."""
    words = sorted(set(re.findall(r"\b[a-z]{3,9}\b", finetune.language_reference())))
    names, questions, answers = [], [], []
    for task in [task for task in tasks for _ in range(rows)]:
        chosen = choose.sample(words, choose.randint(2, 5))
        names.append(task)
        questions.append(tokenizer(f"{' '.join(chosen)} ->").input_ids)
        answers.append([*tokenizer(f" {TASKS[task](chosen)}").input_ids, tokenizer.eos_token_id or 0])
    longest = max(len(question) + len(answer) for question, answer in zip(questions, answers, strict=True))
    tokens = torch.zeros(len(names), longest, dtype=torch.int64)
    mask, labels = tokens.clone(), torch.full_like(tokens, IGNORED)
    for row, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        begin, end = len(question), len(question) + len(answer)
        tokens[row, :end] = torch.tensor(question + answer)
        mask[row, :end] = 1
        labels[row, begin:end] = torch.tensor(answer)
    return names, tokens, mask, labels


def train(
    trainer: AdapterTrainer, batches: Iterator[Batch], evaluated: Batch, steps: int, seconds: float, console: Console
) -> tuple[dict[str, float], dict[str, float], int]:
    """The losses of each task on `evaluated` before and after, and how many steps there was time for."""

    def losses() -> dict[str, float]:
        names, tokens, mask, labels = evaluated
        trainer.model.eval()
        found = trainer.evaluate(names, labels, input_ids=tokens, attention_mask=mask)
        trainer.model.train()
        return found

    before, done = losses(), 0
    with progress(console, steps, ["8 adapters"]) as advance:
        for _ in within(seconds, range(steps)):
            begin = time.perf_counter()
            names, tokens, mask, labels = next(batches)
            found = trainer.backward(names, labels, input_ids=tokens, attention_mask=mask)
            trainer.step()
            done += 1
            advance("8 adapters", statistics.mean(found.values()), time.perf_counter() - begin)
    return before, losses(), done


def step_seconds(contenders: dict[str, Steps], batch: Tensor, seconds: float) -> dict[str, float]:
    """The median of each one's steps on [adapters, length] tokens; they take turns."""
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for steps in contenders.values():  # bitsandbytes compiles its dequantisation in the first
        steps.step(batch if isinstance(steps, Together) else batch[:1])
    for _ in within(seconds, range(5)):
        for name, steps in contenders.items():
            begin = time.perf_counter()
            steps.step(batch)
            taken[name].append(time.perf_counter() - begin)
    return {name: statistics.median(samples) for name, samples in taken.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.train_many", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--steps", type=COUNT, default=60, help="of training (%(default)s)")
    add("--rows", type=COUNT, default=2, help="of each task in a batch (%(default)s)")
    add("--rank", type=COUNT, default=8, help="of the adapters (%(default)s)")
    add("--lr", type=POSITIVE, default=2e-3, help="learning rate of AdamW (%(default)s)")
    add("--model", type=model_path, help="a Hugging Face folder or a GGUF file (SmolLM2-135M-Instruct)")
    add("--minutes", type=POSITIVE, default=5.0, help="fewer steps keep it to about that (%(default)g)")
    add("--output", type=Path, default=Path("demo-output"), help="folder for results (%(default)s)")
    add("--seed", type=SEED, default=0, help="of words and initial values (%(default)s)")
    add("--quick", action="store_true", help="a few steps, in less than a minute")
    options = parser.parse_args(arguments)
    if options.quick:
        options.steps, options.rows, options.minutes = min(options.steps, 5), 1, min(options.minutes, 0.6)
    finetune.quiet()
    console = make_console()
    options.output.mkdir(parents=True, exist_ok=True)
    folder = finetune.base_model(options.model, options.output / "base")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    settings = Settings(folder, options.steps, options.rank, len(TASKS), 32, options.lr, 0.0, "cpu", options.seed)

    with working(console, "Loading the model"):
        torch.manual_seed(options.seed)
        config = partial(LoraConfig, r=options.rank, target_modules="all-linear", task_type="CAUSAL_LM")
        first, *others = TASKS
        model = get_peft_model(finetune.load_4bit(settings), config(), adapter_name=first)
        for name in others:
            model.add_adapter(name, config())
    console.print(peft_kernels.optimize(model))
    choose = random.Random(options.seed)
    batches = iter(partial(make_batch, [*TASKS], options.rows, tokenizer, choose), None)
    evaluated = make_batch([*TASKS], 2 * options.rows, tokenizer, random.Random("evaluated"))
    path = options.output / "train-many"
    with AdapterTrainer(model, dict.fromkeys(TASKS, AdapterSettings(options.lr, max_norm=1.0)), adamw) as trainer:
        before, after, steps = train(trainer, batches, evaluated, options.steps, 30 * options.minutes, console)
        trainer.save(path)

    table = Table(title=f"{steps} steps, {options.rows} rows of each task in each", title_justify="left")
    for heading in ("task", "loss before", "after", "saved in"):
        table.add_column(heading, justify="left" if heading in ("task", "saved in") else "right")
    for name in TASKS:
        table.add_row(name, f"{before[name]:.3f}", f"{after[name]:.3f}", str(path / name))
    console.print(table)

    with working(console, "Timing a step of all adapters beside a step of each"):
        del model, trainer
        contenders = {name: make_steps(key, settings, len(TASKS)) for name, key in (
            (TOGETHER, "fused"), (APART, APART), (STOCK, STOCK))}  # fmt: skip
        batch = torch.randint(len(tokenizer), (len(TASKS), settings.length))
        seconds = step_seconds(contenders, batch, 15 * options.minutes)
    table = Table(title=f"A step of {len(TASKS)} adapters, {settings.length} tokens each", title_justify="left")
    for heading in ("", "time", "all at once is faster"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, value in seconds.items():
        table.add_row(name, duration(value), "" if name == TOGETHER else f"{value / seconds[TOGETHER]:.2f} ×")
    console.print(table)


if __name__ == "__main__":
    main()
