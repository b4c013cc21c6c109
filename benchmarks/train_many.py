"""SmolLM2-135M in 4 bits with a LoRA for each of several tasks: one step of all against a step of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor

import peft_kernels
from benchmarks import finetune, harness, options
from benchmarks.finetune import Run, Settings
from benchmarks.model import MODEL_CACHE
from benchmarks.progress import make_console, working
from benchmarks.records import FUSED, Faster, Record, Target
from benchmarks.report import Report
from benchmarks.timing import Contender
from peft_kernels import AdapterSettings, AdapterTrainer

APART, STOCK = "one by one", "stock, one by one"  # the first of them is accelerated as well
BASELINES = {"apart": APART, "stock": STOCK}
RANK = 16
adamw = partial(torch.optim.AdamW, fused=True)  # of thousands of small tensors


@dataclass(frozen=True)
class Case(harness.Rows):
    """A step of so many adapters, each with a row of so many tokens."""

    grows_with: ClassVar[str] = "tokens"
    adapters: int
    tokens: int
    wanted: tuple[Target, ...] = ()

    def __str__(self) -> str:
        return f"{self.adapters} adapters x {self.tokens}"

    def small(self) -> Case:
        return replace(self, adapters=2, tokens=self.tokens // 4, wanted=())


CASES = (
    Case(8, 128, (Faster("train", APART, 1.3), Faster("train", STOCK, 3))),
    Case(8, 32),
    Case(32, 32),
)


class Together:
    """The steps of all adapters at once."""

    def __init__(self, model: PeftModel, adapters: int, lr: float) -> None:
        self.names = ["default", *(f"adapter {number}" for number in range(1, adapters))]
        for name in self.names[1:]:
            model.add_adapter(name, model.peft_config["default"])
        peft_kernels.optimize(model)
        self.trainer = AdapterTrainer(model.train(), dict.fromkeys(self.names, AdapterSettings(lr)), adamw)

    def step(self, batch: Tensor) -> None:
        self.trainer.backward(self.names, batch, input_ids=batch)
        self.trainer.step()


class Apart:
    """As many steps of one adapter: what those of separate runs take."""

    def __init__(self, model: PeftModel, lr: float, accelerated: bool) -> None:
        if accelerated:
            peft_kernels.optimize(model)
        self.run = Run(model, lr)
        self.run.optimizer = adamw(self.run.optimizer.param_groups[0]["params"], lr=lr)

    def step(self, batch: Tensor) -> None:
        for row in batch.split(1):
            self.run.step(row)


Steps = Together | Apart


def make_steps(name: str, settings: Settings, adapters: int) -> Steps:
    config = LoraConfig(
        r=settings.rank, lora_alpha=2 * settings.rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = finetune.load_with_peft(settings, config)
    return Together(model, adapters, settings.lr) if name == FUSED else Apart(model, settings.lr, name == APART)


class Problem(harness.Problem):
    weighed = True

    def __init__(self, case: Case, steps: dict[str, Steps]) -> None:
        self.case, self.steps = case, steps
        self.name, self.tokens = str(case), case.adapters * case.tokens

    def contender(self, name: str, isa: str = "") -> Contender:
        torch.manual_seed(0)
        batch = torch.randint(49152, (self.case.adapters, self.case.tokens))
        return Contender(name, {"train": partial(self.steps[name].step, batch)}, isa=isa)

    def check(self, isas: Sequence[str]) -> dict[str, float | None]:
        """There is no oracle of a whole model: tests/test_training.py has that of its steps."""
        return dict.fromkeys(isas)

    def targets(self, isa: str) -> tuple[Target, ...]:
        return self.case.wanted


def run(case: Case, folder: Path, vs: Sequence[str], isas: Sequence[str], seconds: float,
        say: Callable[[str], None], least: int) -> list[Record]:  # fmt: skip
    settings = Settings(folder, 1, RANK, case.adapters, case.tokens, 1e-4, 0.0, "cpu", 0)
    steps = {name: make_steps(name, settings, case.adapters) for name in (FUSED, *vs)}
    return harness.measure(lambda case: Problem(case, steps), case, vs, isas, seconds, say, least=least)


def main(arguments: Sequence[str] | None = None) -> None:
    console = make_console()
    finetune.quiet()
    description = __doc__.splitlines()[0]
    chosen, cases = options.parse("train_many", description, arguments, CASES, list(BASELINES), console=console)
    results = Report.begin("train_many", chosen, console)
    folder = finetune.converted(finetune.bundled_gguf(), MODEL_CACHE)
    vs = [BASELINES[name] for name in chosen.vs]
    for case in cases:
        case = case.small() if chosen.quick else case
        with working(console, str(case)):
            least = 3 if chosen.quick else 5
            results.add(run(case, folder, vs, chosen.isas, chosen.seconds, console.print, least))
    results.finish()
