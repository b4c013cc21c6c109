"""LoRA on models of several architectures, with random weights: checked against fp64, then a training step timed.

The models have few layers, but of the usual sizes, and their configurations' own dropout.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

import peft_kernels
from benchmarks import finetune, harness, timing
from benchmarks.harness import relative_error
from benchmarks.records import FUSED
from benchmarks.report import command
from benchmarks.timing import DTYPES, Contender
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
# Errors are measured over so many tokens. Over fewer, the ratio of two errors scatters too much to be held to stock's.
LEAST_TOKENS = 512


@dataclass(frozen=True)
class Case(harness.Rows):
    """An architecture, and the dtype of its weights. Nothing is wanted of it but not to be slower."""

    name: str
    dtype: str
    rows: int = 4
    tokens: int = 128
    large: bool = False

    @property
    def size(self) -> float:
        return self.rows * (1 if self.name == "vit" else self.tokens)

    def part(self, share: float) -> Case:
        """Fewer rows, or one of fewer tokens; the images of a vision transformer have a size."""
        rows = max(1, int(share * self.rows))
        if self.name == "vit" or rows > 1:
            return replace(self, rows=rows)
        return replace(self, rows=1, tokens=min(self.tokens, max(2, round(share * self.size))))

    def __str__(self) -> str:
        size = "" if self.name == "vit" else f"x{self.tokens}"
        return f"{self.name} {self.dtype} {self.rows}{size}"


CASES = tuple(Case(name, dtype) for name in ARCHITECTURES for dtype in ("fp32", "bf16"))


def make_model(case: Case) -> PeftModel:
    torch.manual_seed(0)
    model, config, options, targets = ARCHITECTURES[case.name]
    base = getattr(transformers, model)(getattr(transformers, config)(**options)).to(DTYPES[case.dtype])
    lora = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules=targets, init_lora_weights=False,
                      fan_in_fan_out=case.name == "gpt2")  # fmt: skip
    return get_peft_model(base, lora)


def make_batch(case: Case, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    if case.name == "vit":
        return {"pixel_values": torch.randn(case.rows, 3, 224, 224).to(dtype), "labels": torch.zeros(case.rows).long()}
    ids = torch.randint(VOCABULARY, (case.rows, case.tokens))
    return {"input_ids": ids, "labels": ids[:, 0] % 2 if case.name == "bert" else ids}


class Problem(harness.Problem):
    """A model, and the same accelerated."""

    def __init__(self, case: Case) -> None:
        finetune.quiet()
        self.case, self.name = case, str(case)
        self.tokens = 0 if case.name == "vit" else case.rows * case.tokens
        stock = make_model(case)
        fused = copy.deepcopy(stock)
        peft_kernels.optimize(fused, tune=False)
        self.models = {FUSED: fused, STOCK: stock}
        self.batch = make_batch(case, DTYPES[case.dtype])

    def contender(self, name: str, isa: str = "") -> Contender:
        return Contender(name, {"train": partial(self.step, self.models[name])}, isa=isa)

    def step(self, model: PeftModel) -> None:
        model.train().zero_grad()
        model(**self.batch).loss.backward()

    def results(self, model: PeftModel, dtype: torch.dtype) -> Tensor:
        """Logits, or the states that a classifier reads: it has two logits a row."""
        classifies = "Classification" in ARCHITECTURES[self.case.name][0]
        found = []
        for seed in range(math.ceil(LEAST_TOKENS / (self.case.rows * self.case.tokens))):
            with torch.no_grad():
                outputs = model.eval()(**make_batch(self.case, dtype, seed), output_hidden_states=classifies)
            found.append(outputs.hidden_states[-1] if classifies else outputs.logits)
        return torch.cat(found).double()

    def check(self, isas: Sequence[str]) -> dict[str, float]:
        """The error of the logits, or of the states that a classifier reads.

        Raises:
            ArithmeticError: it is above stock's, by more than 10 %.
        """
        dtype = DTYPES[self.case.dtype]
        wanted = self.results(copy.deepcopy(self.models[STOCK]).double(), torch.float64)
        theirs = relative_error(self.results(self.models[STOCK], dtype), wanted)
        errors = {}
        for isa in isas:
            with cpu.use_isa(isa):
                errors[isa] = relative_error(self.results(self.models[FUSED], dtype), wanted)
            if not errors[isa] <= 1.1 * theirs:
                text = f"got an error of {errors[isa]:.3g}, wanted {theirs:.3g}, as stock's"
                raise ArithmeticError(f"{self.case}, {isa}: {text}")
        return errors

    def saved(self, name: str) -> int | None:
        model = self.models[name].train()
        return timing.saved_bytes(model, lambda: model(**self.batch).loss)


run = harness.runner(Problem, BASELINES)
main = command("architectures", __doc__, CASES, BASELINES, run)
