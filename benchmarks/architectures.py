"""LoRA on models of several architectures, with random weights: checked against fp64, then a training step timed.

The models have few layers, but of the usual sizes, and their configurations' own dropout.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

import peft_kernels
from benchmarks import finetune, timing
from benchmarks.records import FUSED, Record
from benchmarks.report import benchmark
from benchmarks.timing import Contender
from peft_kernels import cpu

STOCK = "stock"
BASELINES = {"stock": STOCK}
LAYERS, VOCABULARY = 3, 5000
_LLAMA = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": LAYERS, "num_attention_heads": 16,
          "num_key_value_heads": 4, "vocab_size": VOCABULARY}  # fmt: skip
# The model, its configuration's class, what is set in it, and the layers with adapters.
ARCHITECTURES = {
    "bert": ("BertForSequenceClassification", "BertConfig",
             {"num_hidden_layers": LAYERS, "vocab_size": VOCABULARY}, ["query", "value"]),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"n_layer": LAYERS, "vocab_size": VOCABULARY}, ["c_attn"]),
    "llama": ("LlamaForCausalLM", "LlamaConfig", _LLAMA, "all-linear"),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**_LLAMA, "head_dim": 64}, "all-linear"),
    "t5": ("T5ForConditionalGeneration", "T5Config",
           {"num_layers": LAYERS, "vocab_size": VOCABULARY, "decoder_start_token_id": 0}, ["q", "v"]),
    "vit": ("ViTForImageClassification", "ViTConfig", {"num_hidden_layers": LAYERS}, "all-linear"),
}  # fmt: skip
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """An architecture, and the dtype of its weights. Nothing is wanted of it but not to be slower."""

    name: str
    dtype: str
    rows: int = 4
    tokens: int = 128
    large: bool = False

    def __str__(self) -> str:
        size = "" if self.name == "vit" else f"x{self.tokens}"
        return f"{self.name} {self.dtype} {self.rows}{size}"


CASES = tuple(Case(name, dtype) for name in ARCHITECTURES for dtype in DTYPES)


def make_model(case: Case) -> PeftModel:
    torch.manual_seed(0)
    model, config, options, targets = ARCHITECTURES[case.name]
    base = getattr(transformers, model)(getattr(transformers, config)(**options)).to(DTYPES[case.dtype])
    lora = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules=targets, init_lora_weights=False,
                      fan_in_fan_out=case.name == "gpt2")  # fmt: skip
    return get_peft_model(base, lora)


def make_batch(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    torch.manual_seed(0)
    if case.name == "vit":
        return {"pixel_values": torch.randn(case.rows, 3, 224, 224).to(dtype), "labels": torch.zeros(case.rows).long()}
    ids = torch.randint(VOCABULARY, (case.rows, case.tokens))
    return {"input_ids": ids, "labels": ids[:, 0] % 2 if case.name == "bert" else ids}


def step(model: PeftModel, batch: dict[str, Tensor]) -> None:
    model.train().zero_grad()
    model(**batch).loss.backward()


def check(case: Case, stock: PeftModel, fused: PeftModel, isas: Sequence[str]) -> dict[str, float]:
    """The relative rms error of the logits by instruction set.

    Raises:
        ArithmeticError: it is above stock's, by more than 10 %.
    """

    def logits(model: PeftModel, dtype: torch.dtype) -> Tensor:
        with torch.no_grad():
            return model.eval()(**make_batch(case, dtype)).logits.double()

    dtype = DTYPES[case.dtype]
    wanted = logits(copy.deepcopy(stock).double(), torch.float64)
    theirs = (logits(stock, dtype) - wanted).norm() / wanted.norm()
    errors = {}
    for isa in isas:
        with cpu.use_isa(isa):
            errors[isa] = ((logits(fused, dtype) - wanted).norm() / wanted.norm()).item()
        if not errors[isa] <= 1.1 * theirs:
            raise ArithmeticError(f"{case}, {isa}: got an error of {errors[isa]:.3g}, wanted {theirs:.3g}, as stock's")
    return errors


def run(case: Case, vs: Sequence[str], isas: Sequence[str], seconds: float, say: Callable[[str], None]) -> list[Record]:
    """Checks and then times a case."""
    finetune.quiet()
    stock = make_model(case)
    fused = copy.deepcopy(stock)
    peft_kernels.accelerate(fused)
    errors = check(case, stock, fused, isas)
    batch = make_batch(case, DTYPES[case.dtype])
    models = {FUSED: fused, STOCK: stock}
    phases = {name: {"train": partial(step, model, batch)} for name, model in models.items()}
    contenders = [Contender(FUSED, phases[FUSED], isa=isa, grad=True) for isa in isas]
    contenders += [Contender(BASELINES[name], phases[BASELINES[name]], grad=True) for name in vs]
    samples = timing.interleaved(contenders, seconds)
    records = []
    for contender, taken in zip(contenders, samples, strict=True):
        model = models[contender.name].train()
        records.append(
            Record(
                str(case), "train", contender.name, contender.isa, taken["train"], error=errors.get(contender.isa),
                peak=timing.peak_memory(contender.run), tokens=0 if case.name == "vit" else case.rows * case.tokens,
                saved=finetune.saved_bytes(model, lambda model=model: model(**batch).loss),
            )
        )  # fmt: skip
    return records


def main(arguments: Sequence[str] | None = None) -> None:
    benchmark("architectures", __doc__.splitlines()[0], CASES, BASELINES, run, arguments)


if __name__ == "__main__":
    main()
