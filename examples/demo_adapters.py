"""`make demo-adapters`: one frozen SmolLM2-135M, an adapter for each of several tasks, and AdapterFusion over them.

The tasks are made of the standard library's own text. Each has a linear head on the frozen model, as a baseline; an
adapter of Pfeiffer's kind with a head of its own; and a fusion of all tasks' adapters, which are frozen by then.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer

import peft_kernels
from benchmarks import timing
from benchmarks.finetune import Run
from benchmarks.options import COUNT, POSITIVE, names, number
from benchmarks.progress import progress, working
from benchmarks.records import describe_machine, describe_versions
from benchmarks.timing import DTYPES, within
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
from examples.plain_adapters import plain
from examples.tasks import TASKS, Task, make_tasks

DESCRIPTION = "Trains an adapter for each of several tasks on one frozen model, then a fusion of them for each."
PLAIN, FUSED = "plain PyTorch", "fused"
FROZEN, ADAPTER, FUSION = "frozen, with a head", "its own adapter", "fusion of all adapters"
ROUNDS = 5  # of each timing
EVALUATED = 32  # rows at a time
# Shares of the time. All that the test examples are for is within the first, though it comes in between.
SHARES = {"examples": 0.2, "training": 0.3, "costs": 0.06, "fusion training": 0.25, "costs of the fusion": 0.04}
DECAYS = (0.001, 0.01, 0.1, 1.0)  # of the weights of a head on the frozen model; validation chooses


@dataclass(frozen=True)
class Settings:
    """What all runs have in common."""

    model: Path  # a folder in Hugging Face's format
    tasks: tuple[str, ...]
    train: int
    test: int
    steps: int
    fusion_steps: int
    bottleneck: int
    batch: int
    length: int
    lr: float
    fusion_lr: float
    seed: int
    dtype: str = "bf16"  # of the frozen model; a key of DTYPES


# ---- The model ------------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """Tokens and mask [rows, length], labels [rows]."""

    tokens: Tensor
    mask: Tensor
    labels: Tensor


class Head(nn.Module):
    """A linear layer on features that are standardised by what they are in the frozen model."""

    def __init__(self, features: int, labels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("std", torch.ones(features))
        self.linear = nn.Linear(features, labels)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear((features - self.mean) / self.std)

    def reset(self) -> None:
        """Starts the linear layer anew, at zero."""
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)


class Classifier(nn.Module):
    """A frozen language model, and for each task a linear head on the mean of its last hidden states.

    The first token is left out of the mean: such a model sends attention there that it has no other use for, and its
    state says nothing of the text.
    """

    def __init__(self, base: nn.Module, tasks: Sequence[Task]) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.heads = nn.ModuleDict({task.name: Head(base.config.hidden_size, len(task.labels)) for task in tasks})

    def features(self, tokens: Tensor, mask: Tensor, adapter_names: Sequence[str] | None = None) -> Tensor:
        """[rows, hidden_size] in fp32."""
        named = {} if adapter_names is None else {"adapter_names": adapter_names}
        with torch.autocast("cpu", torch.bfloat16, enabled=self.base.dtype == torch.bfloat16):
            states = self.base(input_ids=tokens, attention_mask=mask, use_cache=False, **named).last_hidden_state
        weights = mask[:, 1:, None].float()
        return (states[:, 1:].float() * weights).sum(1) / weights.sum(1)

    def forward(self, batch: Batch, task: str) -> Tensor:
        """Logits [rows, labels]."""
        return self.heads[task](self.features(batch.tokens, batch.mask))


class TaskRun(Run):
    """The training of a task's head, and of what is not frozen in the model."""

    model: Classifier

    def __init__(self, model: Classifier, task: str, lr: float, head_lr: float) -> None:
        self.task = task
        for name, head in model.heads.items():
            head.requires_grad_(name == task)
        super().__init__(model, lr)
        rest = [parameter for parameter in model.base.parameters() if parameter.requires_grad]
        head = {"params": list(model.heads[task].parameters()), "lr": head_lr}
        self.optimizer = torch.optim.AdamW([{"params": rest}, head], lr=lr)

    def loss(self, batch: Batch) -> Tensor:
        return F.cross_entropy(self.model(batch, self.task), batch.labels)


def encode(examples: Sequence[tuple[str, int]], tokenizer: Any, length: int) -> Batch:
    """Rows as long as the longest, with the padding at the end."""
    rows = [tokenizer(text).input_ids[:length] for text, _ in examples]
    longest = max(2, *map(len, rows))
    tokens, mask = (
        torch.zeros(len(rows), longest, dtype=torch.int64),
        torch.zeros(len(rows), longest, dtype=torch.int64),
    )
    for row, ids in enumerate(rows):
        tokens[row, : len(ids)] = torch.tensor(ids)
        mask[row, : max(2, len(ids))] = 1
    return Batch(tokens, mask, torch.tensor([label for _, label in examples]))


def training_batches(task: Task, tokenizer: Any, settings: Settings, steps: int) -> Iterator[Batch]:
    """Batches of the training examples, shuffled anew each epoch."""
    generator = torch.Generator().manual_seed(settings.seed)
    order: list[int] = []
    for _ in range(steps):
        while len(order) < settings.batch:
            order += torch.randperm(len(task.train), generator=generator).tolist()
        chosen, order = order[: settings.batch], order[settings.batch :]
        yield encode([task.train[index] for index in chosen], tokenizer, settings.length)


@torch.no_grad()
def all_features(model: Classifier, examples: Sequence[tuple[str, int]], tokenizer: Any, length: int) -> Tensor:
    """[examples, hidden_size]; the rows are computed by length, so that few of them are padded."""
    order = sorted(range(len(examples)), key=lambda index: len(examples[index][0]))
    parts = []
    model.eval()
    for begin in range(0, len(order), EVALUATED):
        batch = encode([examples[index] for index in order[begin : begin + EVALUATED]], tokenizer, length)
        parts.append(model.features(batch.tokens, batch.mask))
    features = torch.cat(parts)
    return features[torch.tensor(order).argsort()]


def accuracy(model: Classifier, task: Task, tokenizer: Any, length: int) -> float:
    """The share of the test examples that get their label."""
    features = all_features(model, task.test, tokenizer, length)
    labels = torch.tensor([label for _, label in task.test])
    with torch.no_grad():
        return (model.heads[task.name](features).argmax(1) == labels).float().mean().item()


def fewer_examples(model: Classifier, tasks: Sequence[Task], tokenizer: Any, length: int, seconds: float) -> list[Task]:
    """The tasks with as many examples as there is time to get features of; at least 20 of each kind, if there are.

    The features of the test examples are wanted three times: on the frozen model, with adapters and with a fusion.
    """
    some = tasks[0].train[:EVALUATED]
    all_features(model, some, tokenizer, length)  # the first call is slower
    begin = time.perf_counter()
    all_features(model, some, tokenizer, length)
    affordable = seconds * len(some) / (time.perf_counter() - begin)
    share = affordable / sum(len(task.train) + 3 * len(task.test) for task in tasks)

    def part(examples: tuple[tuple[str, int], ...]) -> tuple[tuple[str, int], ...]:
        return examples[: max(20, int(share * len(examples)))]

    return [dataclasses.replace(task, train=part(task.train), test=part(task.test)) for task in tasks]


# ---- Training -------------------------------------------------------------------------------------------------------


def fit_head(head: Head, features: Tensor, labels: Tensor) -> None:
    """Logistic regression on the frozen model's features; a fifth of the examples chooses how the weights decay."""
    held_out = len(features) // 5
    head.mean, head.std = features.mean(0), features.std(0) + 1e-6

    def fit(features: Tensor, labels: Tensor, decay: float) -> None:
        head.reset()
        optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = F.cross_entropy(head(features), labels) + decay / 2 * head.linear.weight.square().sum()
            value.backward()
            return value

        optimizer.step(loss)

    def score(decay: float) -> float:
        fit(features[held_out:], labels[held_out:], decay)
        return (head(features[:held_out]).argmax(1) == labels[:held_out]).float().mean().item()

    fit(features, labels, max(DECAYS, key=score))


def train_stage(
    model: Classifier, tasks: Sequence[Task], tokenizer: Any, settings: Settings, steps: int, lr: float,
    prepare: Callable[[Task], None], seconds: float, *, console: Console,
) -> dict[str, float]:  # fmt: skip
    """Trains what `prepare` puts into the model for each task in turn, with fewer steps than asked for if these take
    more than so many seconds; returns the accuracies."""
    accuracies = {}
    with progress(console, steps, [task.name for task in tasks]) as advance:
        for task in tasks:
            torch.manual_seed(settings.seed)
            model.heads[task.name].reset()  # the fitted one errs on no training example: nothing could be learnt
            prepare(task)
            run = TaskRun(model, task.name, lr, settings.lr)
            for batch in within(seconds / len(tasks), training_batches(task, tokenizer, settings, steps)):
                run.step(batch)
                advance(task.name, run.losses[-1], run.seconds_per_step)
            accuracies[task.name] = accuracy(model, task, tokenizer, settings.length)
    return accuracies


# ---- What it costs --------------------------------------------------------------------------------------------------


def compare(
    model: Classifier, call: Callable[[], Any], limit: float, plain_call: Callable[[], Any] | None = None
) -> dict[str, float]:
    """The median seconds of a call with fused and with plain adapters, taken in turn for about `limit` seconds."""
    seconds: dict[str, list[float]] = {PLAIN: [], FUSED: []}
    for turn in within(limit, range(ROUNDS + 1)):
        for name in (PLAIN, FUSED) if turn % 2 else (FUSED, PLAIN):
            with plain(model) if name == PLAIN else nullcontext():
                begin = time.perf_counter()
                (plain_call or call)() if name == PLAIN else call()
                seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values[1:] or values) for name, values in seconds.items()}


def training_costs(what: str, run: TaskRun, batch: Batch, limit: float) -> list[Row]:
    """Time and memory of a forward and its backward."""
    model = run.model.train()

    def step() -> None:
        run.loss(batch).backward()
        run.optimizer.zero_grad()

    seconds = compare(model, step, limit)
    saved, peaks = {}, {}
    for name in (PLAIN, FUSED):
        with plain(model) if name == PLAIN else nullcontext():
            saved[name] = timing.saved_bytes(model, partial(run.loss, batch))
            peaks[name] = timing.peak_memory(step)
    rows = [
        Row(f"{what}: forward and backward", "s", seconds[PLAIN], seconds[FUSED]),
        Row(f"{what}: saved for backward", "MB", megabytes(saved[PLAIN]), megabytes(saved[FUSED])),
    ]
    if None not in peaks.values():
        rows.append(Row(f"{what}: peak memory of a step", "MB", megabytes(peaks[PLAIN]), megabytes(peaks[FUSED])))
    return rows


@torch.no_grad()
def mixed_batch_cost(model: Classifier, tasks: Sequence[Task], tokenizer: Any, settings: Settings, limit: float) -> Row:
    """One batch with rows of every task: in one pass with fused adapters, in a pass for each task with plain ones."""
    model.eval()
    each = max(settings.batch // len(tasks), 1)
    batch = encode([example for task in tasks for example in task.test[:each]], tokenizer, settings.length)
    rows = [task.name for task in tasks for _ in range(each)]

    def apart() -> None:
        for begin, task in zip(range(0, len(rows), each), tasks, strict=True):
            peft_kernels.set_adapter(model, task.name)
            model.features(batch.tokens[begin : begin + each], batch.mask[begin : begin + each])

    seconds = compare(model, lambda: model.features(batch.tokens, batch.mask, rows), limit, apart)
    return Row("rows of all tasks: forward, in a pass for each or in one", "s", seconds[PLAIN], seconds[FUSED])


# ---- Results --------------------------------------------------------------------------------------------------------


def accuracy_table(tasks: Sequence[Task], accuracies: dict[str, dict[str, float]]) -> Table:
    table = Table(title="Accuracy on the test examples", title_justify="left")
    for heading in ("task", "classes", "examples", "chance", *accuracies):
        table.add_column(heading, justify="left" if heading == "task" else "right")
    for task in tasks:
        values = [f"{by_task[task.name]:.1%}" for by_task in accuracies.values()]
        counts = str(len(task.labels)), f"{len(task.train)} + {len(task.test)}", f"{1 / len(task.labels):.1%}"
        table.add_row(f"{task.name}: {task.question}", *counts, *values)
    means = [f"{statistics.mean(by_task.values()):.1%}" for by_task in accuracies.values()]
    table.add_row("mean", "", "", "", *means, style="bold")
    return table


def draw_saved(results: dict[str, Any], path: Path) -> None:
    """The accuracies, and a pair of bars for each cost, from what is in demo_adapters.json."""
    accuracies, chances = results["accuracy"], results.get("chance", {})
    names = list(accuracies[FROZEN])
    rows = [Row(cost["name"], cost["unit"], cost[PLAIN], cost[FUSED]) for cost in results["costs"]]
    machine = f"{results['machine']}; {results['versions']}"
    with two_panels(rows, machine, path) as left:
        axes = left.subplots()
        width = 0.8 / len(accuracies)
        for number, ((label, by_task), color) in enumerate(
            zip(accuracies.items(), (COLORS[0], COLORS[1], "#8250df"), strict=True)
        ):
            places = [index + (number - 1) * width for index in range(len(names))]
            heights = [100 * by_task[name] for name in names]
            axes.bar_label(axes.bar(places, heights, width, color=color, label=label), fmt="%.0f", fontsize=7)
        for index, name in enumerate(names):
            chance = 100 * chances.get(name, math.nan)
            axes.hlines(chance, index - 0.45, index + 0.45, color="black", linewidth=0.8, linestyle=":")
        axes.set(title="Accuracy [%], and chance", xticks=range(len(names)), ylim=(0, 115))
        axes.set_xticklabels(names)
        axes.legend(frameon=False, ncols=len(accuracies), loc="upper center")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the demo.

    Args:
        arguments: the command line after the benchmark's name; by default the process's.
    """
    parser = make_parser("demo_adapters", DESCRIPTION, steps=60, batch=16, length=32, lr=3e-3)
    few = number(int, lambda n: n >= 20, "a whole number of at least 20")
    add = parser.add_argument
    add("--tasks", type=names(TASKS), default=TASKS, metavar="NAMES", help=f"two or more of {','.join(TASKS)}")
    add("--train", type=few, default=700, help="examples of each task to train on (%(default)s)")
    add("--test", type=few, default=300, help="examples of each task to test on (%(default)s)")
    add("--fusion-steps", type=COUNT, default=40, help="of training each fusion (%(default)s)")
    add("--fusion-lr", type=POSITIVE, default=2e-4, help="learning rate of the fusions (%(default)s)")
    add("--bottleneck", type=COUNT, default=48, help="of the adapters (%(default)s)")
    options = parser.parse_args(arguments)
    if len(options.tasks) < 2:
        parser.error(f"argument --tasks: got '{','.join(options.tasks)}', wanted two or more")
    settings, budget, console = set_up(options, Settings, SHARES)
    machine = describe_machine("cpu")
    console.print(f"{machine}; {describe_versions()}", highlight=False)

    with working(console, "Reading the standard library"):
        tasks = make_tasks(settings.tasks, settings.train, settings.test, settings.seed)
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    torch.manual_seed(settings.seed)
    with working(console, "Choosing a dtype"):
        config, rows = AutoConfig.from_pretrained(settings.model), settings.batch * settings.length
        dtype = choose_dtype(config, rows, "cpu", partial(console.print, highlight=False))
    settings = dataclasses.replace(settings, dtype=dtype)
    model = Classifier(AutoModel.from_pretrained(settings.model, dtype=DTYPES[dtype]), tasks)
    tasks = fewer_examples(model, tasks, tokenizer, settings.length, budget.stage("examples"))
    accuracies: dict[str, dict[str, float]] = {FROZEN: {}}
    with working(console, "Fitting heads on the frozen model"):
        for task in tasks:
            features = all_features(model, task.train, tokenizer, settings.length)
            fit_head(model.heads[task.name], features, torch.tensor([label for _, label in task.train]))
            accuracies[FROZEN][task.name] = accuracy(model, task, tokenizer, settings.length)

    base = model.base
    reports = []

    def new_adapter(task: Task) -> None:
        if reports:
            peft_kernels.freeze_adapters(base)
        # The first token's hidden states have a few very large features: without a LayerNorm of its own, the adapter
        # learnt less than a head alone.
        options = {"bottleneck": settings.bottleneck, "norm_before": True}
        reports.append(peft_kernels.insert_adapters(base, "pfeiffer", name=task.name, **options))

    def new_fusion(task: Task) -> None:
        if fusion:
            peft_kernels.remove_adapters(base, fusion.pop())
        fusion.append(peft_kernels.fuse_adapters(base, [task.name for task in tasks]))

    fusion: list[str] = []
    console.rule("Training an adapter for each task", align="left")
    stage = partial(train_stage, model, tasks, tokenizer, settings, console=console)
    accuracies[ADAPTER] = stage(settings.steps, settings.lr, new_adapter, budget.stage("training"))
    console.print(reports[-1])
    last = tasks[-1]
    batch = next(training_batches(last, tokenizer, settings, 1))
    with working(console, "Measuring"):
        limit = budget.stage("costs") / 2
        rows = training_costs("adapter", TaskRun(model, last.name, settings.lr, settings.lr), batch, limit)
        rows.append(mixed_batch_cost(model, tasks, tokenizer, settings, limit))
    for task in tasks:
        peft_kernels.save_adapter(base, options.output / "adapters" / task.name, task.name)

    console.rule("Training a fusion of the adapters for each task", align="left")
    accuracies[FUSION] = stage(settings.fusion_steps, settings.fusion_lr, new_fusion, budget.stage("fusion training"))
    with working(console, "Measuring"):
        limit = budget.stage("costs of the fusion")
        rows += training_costs("fusion", TaskRun(model, last.name, settings.fusion_lr, settings.lr), batch, limit)
    peft_kernels.save_adapter(base, options.output / "adapters" / "fusion", fusion[0])

    whole = reports[0].base_parameters
    own = reports[0].parameters
    fused = sum(parameter.numel() for path, parameter in base.named_parameters() if ".fusions." in path)
    parameters = {"base": whole, "an adapter": own, "the fusion": fused}
    console.print(accuracy_table(tasks, accuracies))
    console.print(result_table(rows, f"The same adapters in {dtype}, plain and fused", (PLAIN, FUSED)))
    for name, size in parameters.items():
        console.print(f"Parameters of {name}: {size:,}, {size / whole:.1%} of the base", highlight=False)
    results = {
        "accuracy": accuracies,
        "chance": {task.name: 1 / len(task.labels) for task in tasks},
        "parameters": parameters,
        "costs": [{"name": row.name, "unit": row.unit, PLAIN: row.stock, FUSED: row.accelerated} for row in rows],
    }
    path = options.output / "demo_adapters.json"
    draw_saved(save(results, settings, machine, path), path.with_suffix(".png"))
    console.print(f"\nSaved: {options.output / 'adapters'}, {path.with_suffix('.png')}, {path}")
