"""The experts of a mixture with LoRA: checked against fp64, then timed against PEFT's on transformers' block.

PEFT wraps both stacks of a Qwen 3 block, and makes W + B A of every expert. The block alone is transformers' with
torch's grouped product, and has gradients for x and the routing weights only. 4-bit stacks are NF4 with blocks of 64;
there all other contenders have the same values in dense stacks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.func import functional_call
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from benchmarks import harness
from benchmarks.functions import Problem, Tensors
from benchmarks.records import FUSED, Faster, Within
from benchmarks.report import command
from peft_kernels.ops import ExpertStack, dequantize_4bit, experts, quantize_4bit
from peft_kernels.testing.reference.experts import experts as oracle

PEFT, BLOCK, DENSE = "peft", "block", "dense"  # of dense experts
BASELINES = {name: name for name in (PEFT, BLOCK, DENSE)}
RANK, SCALING = 16, 2.0
# Three products follow each other; in bf16 the first ones' results are rounded to it.
TOLERANCE = 2e-2
TOLERANCE_IN_FP32 = 5e-6


@dataclass(frozen=True)
class Case(harness.Rows):
    """Tokens, experts, those of each token, and (hidden, intermediate) sizes."""

    tokens: int
    num_experts: int
    top_k: int
    shape: tuple[int, int] = (512, 512)
    dtype: torch.dtype = torch.float32
    is_4bit: bool = False
    large: bool = False

    grows_with = "tokens"

    def __str__(self) -> str:
        name = f"{self.tokens} tokens, {self.top_k} of {self.num_experts} experts {self.shape[0]}x{self.shape[1]}"
        return f"{name} {str(self.dtype).removeprefix('torch.')}" + ", 4-bit" * self.is_4bit


CASES = (
    *(Case(1024, 32, 2, is_4bit=is_4bit) for is_4bit in (False, True)),
    *(Case(256, 128, 8, is_4bit=is_4bit) for is_4bit in (False, True)),
    *(Case(1024, 32, 2, dtype=torch.bfloat16, is_4bit=is_4bit) for is_4bit in (False, True)),
    Case(1, 128, 8),
    Case(1024, 128, 8, (2048, 768), torch.bfloat16, large=True),
)


class Block(nn.Module):
    """A module whose experts PEFT can find by name."""

    def __init__(self, case: Case, gate_up: Tensor, down: Tensor) -> None:
        super().__init__()
        hidden, intermediate = case.shape
        config = Qwen3MoeConfig(
            hidden_size=hidden, moe_intermediate_size=intermediate, num_experts=case.num_experts,
            num_experts_per_tok=case.top_k,
        )  # fmt: skip
        config._experts_implementation = "grouped_mm"
        with torch.device("meta"):
            self.experts = Qwen3MoeExperts(config)
        self.experts.gate_up_proj = nn.Parameter(gate_up, requires_grad=False)
        self.experts.down_proj = nn.Parameter(down, requires_grad=False)

    def forward(self, x: Tensor, index: Tensor, routing: Tensor) -> Tensor:
        return self.experts(x, index, routing)


def make_problem(case: Case) -> Problem:
    torch.manual_seed(0)
    hidden, intermediate = case.shape
    outputs = {"gate_up": 2 * intermediate, "down": hidden}
    inputs = {"gate_up": hidden, "down": intermediate}
    weights: dict[str, Any] = {
        name: (torch.randn(case.num_experts, n, inputs[name]) / inputs[name] ** 0.5).to(case.dtype)
        for name, n in outputs.items()
    }
    stored = dict(weights)
    if case.is_4bit:
        stored = {name: quantize_4bit(weight) for name, weight in weights.items()}
        weights = {name: dequantize_4bit(weight) for name, weight in stored.items()}
    routing, index = torch.randn(case.tokens, case.num_experts).softmax(-1).topk(case.top_k)
    leaves = {"x": torch.randn(case.tokens, hidden).to(case.dtype), "routing": routing.to(case.dtype)}
    for name, n in outputs.items():
        leaves[f"{name}_lora_A"] = torch.randn(case.num_experts * RANK, inputs[name]) / inputs[name] ** 0.5
        leaves[f"{name}_lora_B"] = torch.randn(n, RANK * case.num_experts) / RANK**0.5

    def fused(stacks: dict[str, Any], function: Any = experts) -> Any:
        def call(t: Tensors) -> Tensor:
            gate_up, down = (
                ExpertStack(stacks[name], None, [t[f"{name}_lora_A"]], [t[f"{name}_lora_B"]], [SCALING])
                for name in outputs
            )
            return function(t["x"], index, t["routing"], gate_up, down)

        return call

    block = Block(case, **weights)
    config = LoraConfig(
        r=RANK, lora_alpha=int(SCALING * RANK), target_parameters=["experts.gate_up_proj", "experts.down_proj"]
    )  # fmt: skip
    model = get_peft_model(Block(case, **weights), config).base_model.model
    places = {}  # of a parameter in the model, the leaf
    for path, module in model.named_modules():
        for kind in ("lora_A", "lora_B") if hasattr(module, "parameter_name") else ():
            leaf = f"{module.parameter_name.removesuffix('_proj')}_{kind}"
            places[f"{path}.{kind}.default.weight"] = leaf
            getattr(module, kind)["default"].weight.requires_grad_(False)

    def peft(t: Tensors) -> Tensor:
        return functional_call(model, {path: t[leaf] for path, leaf in places.items()}, (t["x"], index, t["routing"]))

    def work(phase: str) -> tuple[float, float]:
        pairs = case.tokens * case.top_k
        used = int(index.unique().numel()) * sum(outputs[name] * inputs[name] for name in outputs)
        bytes_each = 0.5625 if case.is_4bit else leaves["x"].element_size()
        flops = 2 * pairs * sum(outputs[name] * inputs[name] for name in outputs)
        branch = 2 * pairs * RANK * sum(outputs[name] + inputs[name] for name in outputs)
        return used * bytes_each, flops + branch * (1 if phase == "forward" else 2)

    wanted = ()
    if case.tokens > 1 and not case.large and case.dtype is torch.float32:
        if case.is_4bit:
            wanted = (Within("both", DENSE, 0.3),)
        elif case.num_experts == 32:
            wanted = Within("both", BLOCK, 0.25), Faster("both", PEFT, 2.5)
        else:
            wanted = (Faster("both", PEFT, 4),)
    functions = {FUSED: fused(stored), PEFT: peft, BLOCK: lambda t: block(t["x"], index, t["routing"])}
    functions[DENSE] = fused(weights)
    wide = {name: weight.double() for name, weight in weights.items()}
    grad = torch.randn(case.tokens, hidden).to(case.dtype)
    tolerance = TOLERANCE_IN_FP32 if case.dtype is torch.float32 else TOLERANCE
    return Problem(str(case), leaves, grad, functions, fused(wide, oracle), tolerance, work, wanted)


run = harness.runner(make_problem, BASELINES)
main = command("experts", __doc__, CASES, BASELINES, run)
