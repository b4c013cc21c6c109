"""Four LoRA adapters merged into 4-bit SmolLM2-135M: the time, and the logits' error in fp64, beside PEFT's."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import AutoModelForCausalLM

import peft_kernels
from benchmarks import finetune, harness, options
from benchmarks.finetune import Settings
from benchmarks.model import MODEL_CACHE
from benchmarks.progress import make_console, working
from benchmarks.records import FUSED, Faster, Nearer, Record, Target
from benchmarks.report import Report
from benchmarks.timing import Contender
from peft_kernels import cpu, merging
from peft_kernels.ops.nf4 import NF4Weight

STOCK = "PEFT"
BASELINES = {"stock": STOCK}
NAMES = ("default", "b", "c", "d")
RANK, TOKENS = 16, 64
DECAY, CHANGE = 0.2, 0.03  # of an adapter's singular values, e^(-decay i), and ‖change‖ / ‖weight‖ of all together
LAYERS = 30 * 7


@dataclass(frozen=True)
class Case(harness.Rows):
    """A merge with a correction, of the first layers of the model."""

    grows_with = "layers"

    correction: int
    layers: int = LAYERS
    wanted: tuple[Target, ...] = ()

    def __str__(self) -> str:
        return f"correction {self.correction}"


CASES = (
    Case(0, wanted=(Faster("merge", STOCK, 5),)),
    Case(16, wanted=(Faster("merge", STOCK, 5),)),
    Case(32, wanted=(Faster("merge", STOCK, 5), Nearer("merge", STOCK, 1 / 3))),
)


class Models:
    """The same adapters on the same codes, stock and accelerated; each merge begins with these."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        settings = Settings(folder, 1, RANK, 1, TOKENS, 1e-4, 0.0, "cpu", 0, "fp32")
        stock = finetune.load_with_lora(settings, 0.0)
        for name in NAMES[1:]:
            config = LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
            stock.add_adapter(name, config)
        for layer in layers_of(stock).values():
            set_adapters(layer)
        fused = copy.deepcopy(stock)
        peft_kernels.optimize(fused, tune=False)
        self.layers = {STOCK: layers_of(stock), FUSED: layers_of(fused)}
        self.originals = [layer.base_layer.weight for layer in self.layers[STOCK].values()]
        self.errors: dict[int, dict[str, float]] = {}  # by the correction

    def merge(self, name: str, correction: int, layers: int) -> None:
        with warnings.catch_warnings(), merging.options(correction=correction):
            warnings.simplefilter("ignore")  # of rounding errors
            for layer in [*self.layers[name].values()][:layers]:
                layer.merge(adapter_names=[*NAMES])

    def unmerge(self, name: str) -> None:
        if name == FUSED:
            for layer in self.layers[name].values():
                if layer.merged:
                    layer.unmerge()
            return
        for layer, weight in zip(self.layers[name].values(), self.originals, strict=True):
            weight.bnb_quantized = True
            layer.base_layer.weight = weight
            layer.merged_adapters.clear()

    @cached_property
    def wanted(self) -> Tensor:
        """The logits of the sum of weights and adapters, which is nowhere rounded."""

        def whole(layer: Any) -> Tensor:
            weight = NF4Weight.from_params4bit(layer.base_layer.weight).dequantize(torch.float32).double()
            for name in NAMES:
                a, b = (part[name].weight.detach().double() for part in (layer.lora_A, layer.lora_B))
                weight += layer.scaling[name] * (b @ a)
            return weight

        return self.logits(FUSED, whole)

    @torch.no_grad()
    def logits(self, name: str, weight_of: Callable[[Any], Tensor]) -> Tensor:
        """In fp64, as all else then is exact."""
        model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float64)
        for path, layer in self.layers[name].items():
            model.get_submodule(path).weight.copy_(weight_of(layer))
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(model.config.vocab_size, (1, TOKENS), generator=generator)
        logits: Tensor = model(input_ids=tokens).logits
        return logits

    def error(self, name: str, correction: int) -> float:
        """rms of the merged model's logits' error, relative to that of the logits."""
        found = self.errors.setdefault(correction if name == FUSED else 0, {})
        if name not in found:
            wanted = self.wanted
            self.merge(name, correction, LAYERS)
            found[name] = harness.relative_error(self.logits(name, merged_weight), wanted)
            self.unmerge(name)
        return found[name]


def layers_of(model: PeftModel) -> dict[str, Any]:
    """By their names in the model without adapters."""
    named = model.base_model.model.named_modules()
    return {name: module for name, module in named if isinstance(module, LoraLayer)}


def set_adapters(layer: Any) -> None:
    """Adapters as training leaves them: small beside the weight, with singular values that decay."""
    weight = NF4Weight.from_params4bit(layer.base_layer.weight).dequantize(torch.float32)
    values = torch.exp(-DECAY * torch.arange(RANK))
    for name in NAMES:
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
        scale = CHANGE * float(weight.norm() / values.norm()) / len(NAMES) ** 0.5 / layer.scaling[name]
        a.data = torch.linalg.qr(torch.randn(a.shape).T)[0].T.contiguous()
        b.data = torch.linalg.qr(torch.randn(b.shape))[0] * values * scale


def merged_weight(layer: Any) -> Tensor:
    base = layer.base_layer
    weight = NF4Weight.from_params4bit(base.weight).dequantize(torch.float32).double()
    correction = base.correction() if hasattr(base, "correction") else None
    return weight if correction is None else weight + correction[1].double() @ correction[0].double()


class Problem(harness.Problem):
    weighed = False

    def __init__(self, case: Case, models: Models) -> None:
        self.case, self.models, self.name = case, models, str(case)

    def contender(self, name: str, isa: str = "") -> Contender:
        call = partial(self.models.merge, name, self.case.correction, self.case.layers)
        return Contender(name, {"merge": call}, partial(self.models.unmerge, name), isa)

    def check(self, isas: Sequence[str]) -> dict[str, float | None]:
        errors: dict[str, float | None] = {}
        for isa in isas:
            with cpu.use_isa(isa):
                errors[isa] = self.models.error(FUSED, self.case.correction)
        return errors

    def error(self, name: str) -> float | None:
        return self.models.error(name, self.case.correction)

    def targets(self, isa: str) -> tuple[Target, ...]:
        return self.case.wanted


def run(
    case: Case, models: Models, vs: Sequence[str], isas: Sequence[str], seconds: float, say: harness.Say, least: int
) -> list[Record]:
    records = harness.measure(lambda case: Problem(case, models), case, vs, isas, seconds, say, least=least)
    for record in records:
        if record.error is not None:
            say(f"{record.case}: the logits' error is {record.error:.2g} with {record.contender}")
    return records


def main(arguments: Sequence[str] | None = None) -> None:
    console = make_console()
    finetune.quiet()
    description = __doc__.splitlines()[0]
    chosen, cases = options.parse("merge", description, arguments, CASES, list(BASELINES), console=console)
    results = Report.begin("merge", chosen, console)
    models = Models(finetune.converted(finetune.bundled_gguf(), MODEL_CACHE))
    vs = [BASELINES[name] for name in chosen.vs]
    for case in cases:
        case = replace(case, wanted=()) if chosen.quick else case
        with working(console, str(case)):
            least = 1 if chosen.quick else 3
            results.add(run(case, models, vs, chosen.isas, chosen.seconds, console.print, least))
    results.finish()
