"""`make demo-methods`: every method of the project on one small language model and one text, side by side.

Each method trains for the same number of steps on the same batches with three learning rates, the best of which
counts. First all are tried for a few steps: that says what they cost, how many steps there is time for, and which of
them fail. One that fails is shown with the reason, and the others go on.
"""

from __future__ import annotations

import csv
import dataclasses
import math
import statistics
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import (
    IA3Config,
    LoraConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import peft_kernels
from benchmarks import finetune, timing
from benchmarks.finetune import WARM_UP, Run
from benchmarks.options import COUNT, names
from benchmarks.progress import progress, working
from benchmarks.records import describe_machine, describe_versions
from benchmarks.timing import DTYPES
from examples.demo_options import make_parser, set_up
from examples.demo_results import choose_dtype, megabytes, readable, save
from peft_kernels.bitfit import biases_of

DESCRIPTION = "Trains one small language model with every method, and compares what they cost and what they learn."
FACTORS = (1.0, 1 / 3, 3.0)  # of a method's learning rate; the best of them counts
HELD_OUT = 10  # of so many rows of the text one is not trained on
IGNORED = -100  # the label of what has no loss
TRIED = 3  # steps that are timed before the number of steps is chosen
PREFIX_STD = 0.02  # of the initial keys and values of P-Tuning v2
LORA_PLUS_RATIO = 16.0  # of the learning rates of B and A, as in the paper
SHARES = {"trial": 0.3, "training": 0.6}  # of the time


@dataclass(frozen=True)
class Settings:
    """What all runs have in common."""

    model: Path  # a folder in Hugging Face's format
    methods: tuple[str, ...]
    steps: int
    rank: int
    bottleneck: int
    virtual_tokens: int
    batch: int
    length: int
    seed: int
    quick: bool = False
    dtype: str = "bf16"  # of the frozen model; a key of DTYPES
    device: str = "cpu"

    @property
    def autocast(self) -> bool:
        """What is trained is kept in fp32, and computes with a model in bf16."""
        return self.dtype == "bf16"


# ---- The methods ----------------------------------------------------------------------------------------------------


def load(settings: Settings) -> Any:
    """The frozen model, dense."""
    model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=DTYPES[settings.dtype])
    return model.requires_grad_(False)


def with_lora(settings: Settings, load: Callable[[Settings], Any] = load, **options: Any) -> nn.Module:
    rank = settings.rank
    return with_peft(settings, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", **options), load)


def with_peft(settings: Settings, config: PeftConfig, load: Callable[[Settings], Any] = load) -> nn.Module:
    config.task_type = "CAUSAL_LM"
    return get_peft_model(load(settings), config)


def with_prefix(settings: Settings, mlp: bool) -> nn.Module:
    model: Any = with_peft(
        settings, PrefixTuningConfig(num_virtual_tokens=settings.virtual_tokens, prefix_projection=mlp)
    )
    if not mlp:
        # PEFT begins with N(0, 1), which a model that is not used to it takes many steps to recover from.
        with torch.no_grad():
            model.prompt_encoder["default"].embedding.weight.mul_(PREFIX_STD)
    return model


def with_prompt(settings: Settings, kind: type[PeftConfig], **options: Any) -> nn.Module:
    return with_peft(settings, kind(num_virtual_tokens=settings.virtual_tokens, **options))


def with_biases(settings: Settings) -> nn.Module:
    """All biases train. A model that has none, as Llama, gets zeros in the linear layers of its blocks."""
    model = load(settings)
    if not biases_of(model):
        for layer in model.base_model.modules():
            if isinstance(layer, nn.Linear):
                layer.bias = nn.Parameter(torch.zeros(layer.out_features))
    peft_kernels.train_biases_only(model)
    return model


def with_adapters(settings: Settings, kind: str) -> nn.Module:
    # What `pfeiffer` and `parallel` read has a few very large features in models of Llama's kind.
    model = load(settings)
    peft_kernels.insert_adapters(model, kind, bottleneck=settings.bottleneck, norm_before=kind != "houlsby")
    return model


def adamw(model: nn.Module, settings: Settings, lr: float) -> Optimizer:
    return AdamW(trained(model).values(), lr=lr)


def lora_plus(model: nn.Module, settings: Settings, lr: float) -> Optimizer:
    return create_loraplus_optimizer(model, AdamW, lr=lr, loraplus_lr_ratio=LORA_PLUS_RATIO)


def lora_fa(model: nn.Module, settings: Settings, lr: float) -> Optimizer:
    return create_lorafa_optimizer(model, r=settings.rank, lora_alpha=2 * settings.rank, lr=lr)


def save_trained(model: nn.Module, folder: Path) -> None:
    save_file({name: parameter.detach() for name, parameter in trained(model).items()}, folder / "model.safetensors")


@dataclass(frozen=True)
class Method:
    """How a method gets into the model, trains and is saved.

    Attributes:
        lr: the middle one of those that are tried.
        note: what is to be known of its line in the table.
    """

    build: Callable[[Settings], nn.Module]
    lr: float
    optimizer: Callable[[nn.Module, Settings, float], Optimizer] = adamw
    save: Callable[[Any, Path], None] = lambda model, folder: model.save_pretrained(folder)
    note: str = ""


METHODS: Mapping[str, Method] = {
    "LoRA": Method(with_lora, 1e-3),
    "QLoRA": Method(partial(with_lora, load=finetune.load_4bit), 1e-3, note="the base in 4 bits"),
    "LoRA-FA": Method(with_lora, 1e-3, lora_fa, note="A is frozen"),
    "LoRA+": Method(with_lora, 1e-4, lora_plus, note=f"lr of A; B's is {LORA_PLUS_RATIO:g} ×"),
    "rsLoRA": Method(partial(with_lora, use_rslora=True), 3e-4),
    "DoRA": Method(partial(with_lora, use_dora=True), 1e-3),
    "(IA)³": Method(lambda settings: with_peft(settings, IA3Config()), 1e-2),
    "prefix tuning": Method(partial(with_prefix, mlp=True), 1e-3, note="the file has what its MLP makes"),
    "P-Tuning v2": Method(partial(with_prefix, mlp=False), 3e-2, note="begins near zero"),
    "prompt tuning": Method(partial(with_prompt, kind=PromptTuningConfig), 1e-1),
    "P-Tuning": Method(partial(with_prompt, kind=PromptEncoderConfig), 1e-3, note="the file has what its MLP makes"),
    "BitFit": Method(with_biases, 1e-3, save=save_trained, note="of zeros that are added, where there are none"),
    "Houlsby": Method(partial(with_adapters, kind="houlsby"), 1e-3, save=peft_kernels.save_adapter),
    "Pfeiffer": Method(partial(with_adapters, kind="pfeiffer"), 1e-3, save=peft_kernels.save_adapter),
    "parallel": Method(partial(with_adapters, kind="parallel"), 1e-3, save=peft_kernels.save_adapter),
}  # fmt: skip


# ---- A run ----------------------------------------------------------------------------------------------------------


class MethodRun(Run):
    """The training of what a method puts into the model."""

    def __init__(self, name: str, model: Any, settings: Settings, lr: float) -> None:
        super().__init__(model, lr, settings.autocast)
        self.optimizer = METHODS[name].optimizer(model, settings, lr)

    def loss(self, batch: Tensor) -> Tensor:
        return loss_of(self.model, batch, self.autocast)


def loss_of(model: Any, batch: Tensor, autocast: bool) -> Tensor:
    """The same tokens count for all methods: a prefix or a prompt would have a row's first one predicted as well."""
    labels = batch.clone()
    labels[:, 0] = IGNORED
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return model(input_ids=batch, labels=labels).loss


@torch.no_grad()
def held_out_loss(model: Any, batches: Tensor, autocast: bool) -> float:
    """The mean over [batches, rows, length] tokens."""
    model.eval()
    return statistics.mean(loss_of(model, batch, autocast).item() for batch in batches)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def make(name: str, settings: Settings) -> Any:
    """A fresh model with a method."""
    torch.manual_seed(settings.seed)
    return METHODS[name].build(settings)


def split(tokens: Tensor, settings: Settings, evaluated: int) -> tuple[Tensor, Tensor]:
    """Batches [steps, batch, length] to train on, and others from all over the text.

    Raises:
        ValueError: the text has too few rows.
    """
    rows = tokens[: len(tokens) // settings.length * settings.length].view(-1, settings.length)
    is_held_out = torch.arange(len(rows)) % HELD_OUT == HELD_OUT - 1
    held_out = rows[is_held_out]
    held_out = held_out[:: max(1, len(held_out) // (evaluated * settings.batch))]
    count = min(evaluated, len(held_out) // settings.batch)
    if not count:
        raise ValueError(f"batch: got {settings.batch}, wanted at most the {len(held_out)} rows that are held out")
    batches = finetune.make_batches(
        rows[~is_held_out].flatten(), settings.steps, settings.batch, settings.length, settings.seed
    )
    return batches, held_out[: count * settings.batch].view(count, settings.batch, -1)


# ---- Results --------------------------------------------------------------------------------------------------------


@dataclass
class Result:
    """What was measured of one method.

    Attributes:
        trained: parameters.
        share: of the frozen model's, that are trained.
        memory_mb: at its highest in a step: model, optimizer and what the step itself takes.
        file_mb: of what is saved.
        losses: held out, for each learning rate; NaN where it diverged.
        seconds: of a step, the median.
        error: why it failed, if it did.
    """

    name: str
    note: str = ""
    trained: int = 0
    share: float = math.nan
    memory_mb: float = math.nan
    file_mb: float = math.nan
    losses: dict[float, float] = field(default_factory=dict)
    seconds: float = math.nan
    error: str = ""

    @property
    def lr(self) -> float:
        """The best one."""
        finite = {lr: loss for lr, loss in self.losses.items() if math.isfinite(loss)}
        return min(finite, key=finite.__getitem__, default=math.nan)

    @property
    def loss(self) -> float:
        return self.losses.get(self.lr, math.nan)

    def as_row(self) -> dict[str, Any]:
        """A row of the CSV file; None for what is not known."""
        row = {**vars(self), "lr": self.lr, "loss": self.loss}
        row["losses"] = "; ".join(f"{lr:g}: {loss:.4g}" for lr, loss in self.losses.items())
        return {key: None if value != value else value for key, value in row.items()}


@contextmanager
def kept(result: Result, console: Console) -> Iterator[None]:
    """Has an error be the method's result, and the demo go on."""
    try:
        yield
    except Exception as error:  # a method's libraries may raise anything
        first = (str(error).splitlines() or [""])[0]
        result.error = f"{type(error).__name__}: {first}"
        console.print(f"{result.name} failed: {result.error}", markup=False, highlight=False)


def storage_bytes(tensors: Iterator[Tensor]) -> int:
    """Of tensors, some of which share their memory."""
    return sum({(it := t.untyped_storage()).data_ptr(): it.nbytes() for t in tensors}.values())


def held_bytes(run: MethodRun) -> int:
    """Of the model, with the statistics of 4-bit weights, and of the optimizer."""
    state = (value for values in run.optimizer.state.values() for value in values.values())
    tensors = [*run.model.state_dict().values(), *trained(run.model).values(), *state]
    return storage_bytes(tensor for tensor in tensors if isinstance(tensor, Tensor))


def try_out(result: Result, settings: Settings, batches: Tensor, total: int, tuning: float) -> tuple[float, float]:
    """Finds out what a method costs, with a few steps; returns the seconds to make the model, and of a step.

    Layers that this machine has not timed yet are timed for `tuning` seconds, which do not count: then they are known.
    """
    begin = time.perf_counter()
    model = make(result.name, settings)
    made = time.perf_counter() - begin
    peft_kernels.optimize(model, tune=tuning)
    run = MethodRun(result.name, model, settings, METHODS[result.name].lr)
    for number in range(WARM_UP + TRIED):
        run.step(batches[number % len(batches)])
    result.trained = sum(parameter.numel() for parameter in trained(model).values())
    result.share = result.trained / total
    rise = timing.peak_memory(partial(run.step, batches[0]))
    result.memory_mb = math.nan if rise is None else megabytes(held_bytes(run) + rise)
    return made, run.seconds_per_step


def affordable_steps(trials: Collection[tuple[float, float]], evaluation: float, seconds: float) -> int:
    """How many steps of each method there is time for, given what `try_out` returned of each; at least one."""
    rest = seconds - sum(made + len(FACTORS) * evaluation for made, _ in trials)
    return max(1, int(rest / len(FACTORS) / sum(step for _, step in trials)))


def train(result: Result, settings: Settings, batches: Tensor, held_out: Tensor, folder: Path, tuning: float,
          advance: Callable[[str, float, float], None]) -> None:  # fmt: skip
    """Trains a method with each learning rate from the same start, and saves the best."""
    method, model = METHODS[result.name], make(result.name, settings)
    peft_kernels.optimize(model, tune=tuning)
    start = {name: parameter.detach().clone() for name, parameter in trained(model).items()}
    seconds: list[float] = []
    folder.mkdir(parents=True, exist_ok=True)
    for factor in FACTORS:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in start:
                    parameter.copy_(start[name])
        torch.manual_seed(settings.seed)
        lr = float(f"{factor * method.lr:.0e}")
        run = MethodRun(result.name, model, settings, lr)
        for batch in batches:
            run.step(batch)
            advance(result.name, run.losses[-1], run.seconds_per_step)
        result.losses[lr] = held_out_loss(model, held_out, settings.autocast)
        seconds += run.seconds[WARM_UP:] or run.seconds
        if result.lr == lr:
            method.save(model, folder)
    result.seconds = statistics.median(seconds)
    if not result.losses or math.isnan(result.loss):
        raise ValueError("losses: got none that is finite, wanted one")
    result.file_mb = megabytes(sum(path.stat().st_size for path in folder.glob("*.safetensors")))


def result_table(results: Sequence[Result], frozen: float, settings: Settings, steps: int) -> Table:
    title = f"{steps} steps of {settings.batch} × {settings.length} tokens in {settings.dtype}"
    table = Table(
        title=title,
        title_justify="left",
        caption=f"loss: on held-out text; the frozen model's is {frozen:.3f}",
        caption_justify="left",
    )
    for heading in ("method", "trained", "loss", "lr", "s a step", "peak MB", "file MB", "remarks"):
        table.add_column(heading, justify="left" if heading in ("method", "remarks") else "right")
    best = min((result.loss for result in results if not result.error), default=math.nan)
    for result in results:
        if result.error:
            table.add_row(result.name, *[""] * 6, Text(f"failed: {result.error}"), style="red")
            continue
        values = (result.seconds, result.memory_mb, result.file_mb)
        table.add_row(
            result.name, f"{result.share:.3%}", f"{result.loss:.3f}", f"{result.lr:g}", *map(readable, values),
            result.note, style="bold" if result.loss == best else "",
        )  # fmt: skip
    return table


def write_csv(results: Sequence[Result], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, Result("").as_row().keys())
        writer.writeheader()
        writer.writerows(result.as_row() for result in results)


def draw_saved(results: dict[str, Any], path: Path) -> None:
    """The loss of each method against each of its costs, from what is in demo_methods.json."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    done = [method for method in results["methods"] if not method["error"]]
    costs = {"seconds": "seconds a step", "memory_mb": "peak memory [MB]", "file_mb": "file [MB]"}
    with pyplot.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure, all_axes = pyplot.subplots(1, len(costs), figsize=(13, 5), layout="constrained", sharey=True)
        colors = pyplot.get_cmap("tab20")
        for axes, (key, label) in zip(all_axes, costs.items(), strict=True):
            for number, method in enumerate(done):
                x = math.nan if method[key] is None else method[key]
                style = {"color": colors(number), "markersize": 8, "label": method["name"]}
                axes.plot(x, method["loss"], "osD^vPX*"[number % 8], **style)
            axes.axhline(results["frozen"], color="#57606a", linewidth=0.8, linestyle=":")
            axes.set(xlabel=label, xscale="log" if key == "file_mb" else "linear")
            axes.grid(color="#eaeef2", linewidth=0.6)
            axes.set_axisbelow(True)
        all_axes[0].set_ylabel("loss on held-out text; dotted: the frozen model's")
        handles, labels = all_axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, frameon=False, ncols=8, loc="outside lower center")
        figure.suptitle(f"{results['machine']}; {results['versions']}", x=0.01, ha="left", fontsize=8, color="#57606a")
        figure.savefig(path, dpi=150)
        pyplot.close(figure)


# ---- The whole ------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the demo.

    Args:
        arguments: the command line after the benchmark's name; by default the process's.

    Raises:
        SystemExit: a method failed, after the results of the others are shown and saved.
    """
    parser = make_parser("demo_methods", DESCRIPTION, steps=60, batch=4, length=64, minutes=18.0)
    add = parser.add_argument
    add("--methods", type=names([*METHODS]), default=tuple(METHODS), metavar="NAMES", help=f"of {','.join(METHODS)}")
    add("--rank", type=COUNT, default=16, help="of LoRA and its variants (%(default)s)")
    add("--bottleneck", type=COUNT, default=32, help="of the adapters (%(default)s)")
    add("--virtual-tokens", type=COUNT, default=16, help="of a prefix or a prompt (%(default)s)")
    add("--quick", action="store_true", help="few steps, within five minutes: to see that it works")
    options = parser.parse_args(arguments)
    if options.quick:
        options.steps, options.minutes = min(options.steps, 10), min(options.minutes, 4.5)
    settings, budget, console = set_up(options, Settings, SHARES)
    folder = options.output / "methods"
    machine = describe_machine("cpu")
    console.print(f"{settings.model.name} on Python's language reference; {machine}; {describe_versions()}")
    tokens = AutoTokenizer.from_pretrained(settings.model)(finetune.language_reference(), return_tensors="pt")
    try:
        batches, held_out = split(tokens.input_ids[0], settings, evaluated=4 if settings.quick else 12)
    except ValueError as error:
        parser.error(str(error))
    with working(console, "Choosing a dtype"):
        config, rows = AutoConfig.from_pretrained(settings.model), settings.batch * settings.length
        dtype = choose_dtype(config, rows, "cpu", partial(console.print, highlight=False))
    settings = dataclasses.replace(settings, dtype=dtype)
    results = {name: Result(name, METHODS[name].note) for name in settings.methods}

    with working(console, "Evaluating the frozen model"):
        base = load(settings)
        total = sum(parameter.numel() for parameter in base.parameters())
        peft_kernels.optimize(base, tune=False)
        begin = time.perf_counter()
        frozen = held_out_loss(base, held_out, settings.autocast)
        evaluation = time.perf_counter() - begin
        del base

    trials = {}
    tuning = budget.stage("trial") / 2 / len(results)
    for name, result in results.items():
        with working(console, f"Trying {name}"), kept(result, console):
            trials[name] = try_out(result, settings, batches, total, tuning)
    if trials:
        steps = min(len(batches), affordable_steps(trials.values(), evaluation, budget.stage("training")))
        batches = batches[:steps]
        console.rule(f"{steps} steps with each of {len(FACTORS)} learning rates", align="left")
        with progress(console, len(FACTORS) * steps, [*trials]) as advance:
            for name in trials:
                with kept(results[name], console):
                    train(results[name], settings, batches, held_out, folder / name, tuning, advance)

    console.print(result_table([*results.values()], frozen, settings, len(batches)))
    path = options.output / "demo_methods"
    write_csv([*results.values()], path.with_suffix(".csv"))
    written = {"frozen": frozen, "steps": len(batches), "methods": [result.as_row() for result in results.values()]}
    draw_saved(save(written, settings, machine, path.with_suffix(".json")), path.with_suffix(".png"))
    console.print(
        f"Saved: {', '.join(str(path.with_suffix(suffix)) for suffix in ('.png', '.json', '.csv'))}, {folder}"
    )
    if failed := [name for name, result in results.items() if result.error]:
        sys.exit(f"failed: {', '.join(failed)}")
