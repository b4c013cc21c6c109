"""SmolLM2-135M in 4 bits, LoRA, DoRA, (IA)³ or a prefix: training step, prefill, decoding, and where the time goes."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import IA3Config, PeftModel, PrefixTuningConfig, get_peft_model
from rich.box import SIMPLE_HEAD
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

import peft_kernels
from benchmarks import finetune, harness, options, profiling, timing
from benchmarks.finetune import PROMPT, Run, Settings
from benchmarks.progress import make_console, working
from benchmarks.records import FUSED, Faster, Record, Target, duration
from benchmarks.report import Report
from benchmarks.timing import DTYPES, Contender

STOCK, DENSE_LORA, WITHOUT_LOGITS = "stock", "LoRA on dense", "without logits"
BASELINES = {"dense": DENSE_LORA, "stock": STOCK, "without": WITHOUT_LOGITS}
PREFIX = 32  # positions of a prefix
PROFILED_TOKENS = 8  # decoded for the breakdown
MODEL_CACHE = Path(__file__).parent.parent / "demo-output" / "base"  # where `make demo` keeps it as well

Breakdown = dict[str, dict[str, float]]  # seconds by contender and group


@dataclass(frozen=True)
class Case(harness.Rows):
    """What the models do.

    Attributes:
        phase: "train", a step of training; "prefill", a forward of a prompt; "decode", `generate`, greedily.
        rows, tokens: of the batch; of decoding the new ones.
        method: "lora", "dora", "ia3" or "prefix". A step of (IA)³ is under bf16 autocast: without it PEFT's layers
            return fp32, which stock's attention refuses beside queries in bf16.
        dtype: that the model computes in, a key of timing.DTYPES.
    """

    phase: str
    rows: int
    tokens: int
    dropout: float = 0.0
    wanted: tuple[Target, ...] = ()
    method: str = "lora"
    dtype: str = "bf16"

    @property
    def size(self) -> float:
        return self.rows * self.tokens

    def part(self, share: float) -> Case:
        """Fewer rows, or one of fewer tokens."""
        rows = max(1, int(share * self.rows))
        return replace(self, rows=rows, tokens=min(self.tokens, max(2, round(share * self.size / rows))))

    def __str__(self) -> str:
        extras = [self.method] * (self.method != "lora") + [f"dropout {self.dropout:g}"] * bool(self.dropout)
        extras += [self.dtype] * (self.dtype != "bf16")
        return " ".join([f"{self.phase} {self.rows}x{self.tokens}", *extras])

    def small(self) -> Case:
        """A little of the same, to see that it works; it has no targets."""
        return replace(self, rows=1, tokens=self.tokens // 4, wanted=())


# The targets were set for two cores with AMX.
CASES = (
    Case("train", 4, 256, 0.05, (Faster("train", STOCK, 2.5),)),
    Case("train", 4, 256, wanted=(Faster("train", STOCK, 2.5),), method="dora"),
    Case("train", 4, 256, wanted=(Faster("train", STOCK, 2),), method="ia3"),
    Case("train", 4, 256, wanted=(Faster("train", STOCK, 2),), method="prefix"),
    Case("prefill", 1, 256),
    Case("decode", 1, 48, wanted=(Faster("decode", STOCK, 2),)),
    # For processors without products in bf16, where torch's are slower than those in fp32.
    Case("train", 4, 256, 0.05, dtype="fp32"),
    Case("train", 4, 256, method="dora", dtype="fp32"),
    Case("prefill", 1, 256, dtype="fp32"),
    Case("decode", 1, 48, dtype="fp32"),
)


def make_models(case: Case, folder: Path, names: Sequence[str], rank: int) -> dict[str, Run]:
    """A fresh model for each contender: stock repacks its weights when it is first evaluated."""
    settings = Settings(folder, 1, rank, case.rows, case.tokens, 1e-4, case.dropout, "cpu", 0, case.dtype)
    configs = {
        "ia3": IA3Config(task_type="CAUSAL_LM"),
        "prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=PREFIX),
    }
    runs = {}
    for name in names:
        if case.method in ("lora", "dora"):
            model = finetune.load_with_lora(settings, case.dropout, dora=case.method == "dora")
        else:
            model = finetune.load_with_peft(settings, configs[case.method])
        if name in (FUSED, WITHOUT_LOGITS):
            peft_kernels.optimize(model, logits=name == FUSED)
        if name == DENSE_LORA:
            model = on_dense(model, folder, DTYPES[case.dtype])
        runs[name] = Run(model, settings.lr, case.method == "ia3")
        runs[name].model.train(case.phase == "train")
    return runs


def on_dense(model: PeftModel, folder: Path, dtype: torch.dtype) -> PeftModel:
    """The same adapters on the weights as they were before quantisation."""
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return get_peft_model(base, model.peft_config["default"])


class Problem(harness.Problem):
    """Models, and what they do in a case."""

    def __init__(self, case: Case, runs: dict[str, Run], tokenizer: Any) -> None:
        self.case, self.runs, self.tokenizer = case, runs, tokenizer
        self.name, self.tokens = str(case), case.rows * case.tokens

    def call(self, name: str, tokens: int) -> Callable[[], object]:
        """What one model does, with so many tokens."""
        case, run = self.case, self.runs[name]
        torch.manual_seed(0)
        batch = torch.randint(run.model.config.vocab_size, (case.rows, tokens))
        if case.phase == "train":
            return partial(run.step, batch)
        if case.phase == "prefill":
            return partial(run.model, input_ids=batch, logits_to_keep=1)
        return partial(finetune.generate, run.model, self.tokenizer, PROMPT, tokens)

    def contender(self, name: str, isa: str = "") -> Contender:
        call = self.call(name, self.case.tokens)
        return Contender(name, {self.case.phase: call}, isa=isa, grad=self.case.phase == "train")

    def check(self, isas: Sequence[str]) -> dict[str, float | None]:
        """There is no oracle of a whole model: the tests have those of its parts."""
        return dict.fromkeys(isas)

    def saved(self, name: str) -> int | None:
        if self.case.phase != "train":
            return None
        run = self.runs[name]
        batch = torch.zeros(self.case.rows, self.case.tokens, dtype=torch.int64)
        return timing.saved_bytes(run.model, partial(run.loss, batch))

    def targets(self, isa: str) -> tuple[Target, ...]:
        return self.case.wanted


def run(
    case: Case, folder: Path, vs: Sequence[str], isas: Sequence[str], seconds: float, say: harness.Say, rank: int = 16,
    least: int = 3,
) -> tuple[list[Record], Breakdown]:  # fmt: skip
    """Times a case, then profiles it."""
    runs = make_models(case, folder, [FUSED, *vs], rank)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def make_problem(case: Case) -> Problem:
        return Problem(case, runs, tokenizer)

    records = harness.measure(make_problem, case, vs, isas, seconds, say, least=least)
    few = PROFILED_TOKENS if case.phase == "decode" else case.tokens
    problem = make_problem(case)
    with torch.set_grad_enabled(case.phase == "train"):
        profiles = {
            name: profiling.breakdown(runs[name].model, problem.call(name, few))
            for name in dict.fromkeys(record.contender for record in records if record.samples)
        }
    return records, profiles


def breakdown_table(case: Case, profiles: Breakdown) -> Table:
    """A line for each group, with its time and share in each model."""
    table = Table(title=f"{case}, profiled", title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("", min_width=22)
    for name in profiles:
        table.add_column(name, justify="right")
    for group in (name for name in profiling.GROUPS if any(seconds[name] for seconds in profiles.values())):
        cells = [f"{duration(p[group])} {p[group] / sum(p.values()):4.0%}" for p in profiles.values()]
        table.add_row(group, *cells)
    return table


def write_breakdowns(breakdowns: dict[str, Breakdown], path: Path) -> None:
    """A row for each case, contender and group."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["case", "contender", "group", "ms", "share"])
        for case, profiles in breakdowns.items():
            for name, seconds in profiles.items():
                whole = sum(seconds.values())
                for group, value in seconds.items():
                    writer.writerow([case, name, group, f"{value * 1e3:.5g}", f"{value / whole:.4f}"])


def main(arguments: Sequence[str] | None = None) -> None:
    console = make_console()
    finetune.quiet()
    description = __doc__.splitlines()[0]
    chosen, cases = options.parse("model", description, arguments, CASES, list(BASELINES), console=console)
    results = Report.begin("model", chosen, console)
    folder = finetune.converted(finetune.bundled_gguf(), MODEL_CACHE)
    breakdowns = {}
    for case in cases:
        case = case.small() if chosen.quick else case
        with working(console, str(case)):
            vs = [BASELINES[name] for name in chosen.vs if case.method == "lora" or name == "stock"]
            if case.phase != "train" and WITHOUT_LOGITS in vs:
                vs.remove(WITHOUT_LOGITS)
            least = 3 if chosen.quick else 7
            records, breakdowns[str(case)] = run(
                case, folder, vs, chosen.isas, chosen.seconds, console.print, least=least
            )
        results.add(records)
        console.print(breakdown_table(case, breakdowns[str(case)]))
    results.finish()
    write_breakdowns(breakdowns, results.path.with_name(f"{results.path.name}-breakdown.csv"))
