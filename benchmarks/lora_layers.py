"""The numbers of a lora_linear case, the layers that compete on them, and the check of the fused one against fp64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import bitsandbytes as bnb
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import peft_kernels
from benchmarks.finetune import saved_bytes
from benchmarks.records import FUSED
from benchmarks.timing import Contender
from peft_kernels import cpu
from peft_kernels.ops import NF4Weight, lora_linear
from peft_kernels.testing.reference.lora_linear import lora_linear as oracle

if TYPE_CHECKING:
    from benchmarks.lora_linear import Case

RANK = 16
SCALING = 2.0
STOCK, DENSE, DENSE_LORA = "stock", "dense", "LoRA on dense"
OWN_BASE, DEQUANTIZE, FUNCTION = "own base", "dequantize + matmul", "function"
COMPILED_STOCK, COMPILED_DENSE = "compiled stock", "compiled LoRA on dense"

# Relative rms errors that the roundings of the result explain: bf16 for y and grad_x; the others are fp32.
TOLERANCES = {"y": 4e-3, "x": 4e-3, "lora_A": 1e-5, "lora_B": 1e-5}


# ---- Layers ---------------------------------------------------------------------------------------------------------


class OneLinear(nn.Module):
    """The model that PEFT wants around the layer."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear
        self.is_loaded_in_4bit = isinstance(linear, bnb.nn.Linear4bit)


def linear4bit(weight: Tensor) -> bnb.nn.Linear4bit:
    """A layer with a weight [N, K], which it quantises to NF4 with double quantisation."""
    layer = bnb.nn.Linear4bit(*weight.T.shape, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True)
    return layer.to(weight.device)


def dense_linear(weight: Tensor) -> nn.Linear:
    """A layer with a frozen weight [N, K]."""
    layer = nn.Linear(*weight.T.shape, bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def fused(layer: nn.Module) -> nn.Module:
    """The layer, accelerated in place."""
    if left_alone := peft_kernels.accelerate(nn.Sequential(layer)).left_alone:
        raise RuntimeError(f"a layer that should have been fused was not: {left_alone}")
    return layer


class _Dequantized(nn.Module):
    """What a 4-bit layer costs without a fused product: our dequantisation, then torch's matrix product."""

    def __init__(self, weight: NF4Weight) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.dequantize())


Layer = nn.Module | Callable[[Tensor], Tensor]


@dataclass
class Problem:
    """The numbers of a case, and a fresh layer for each contender, by name, made when it is asked for."""

    case: Case
    x: Tensor
    grad_y: Tensor
    weight: NF4Weight
    make: dict[str, Callable[[], Layer]]


def make_problem(case: Case, device: str = "cpu") -> Problem:
    """Its tensors, and those of its layers, are on the device."""
    with torch.device(device):
        return _make_problem(case, device)


def _make_problem(case: Case, device: str) -> Problem:
    n, k = case.shape
    torch.manual_seed(0)
    linear = linear4bit((torch.randn(n, k) / k**0.5).bfloat16())
    weight = NF4Weight.from_params4bit(copy.deepcopy(linear.weight))
    lora_A, lora_B = torch.randn(RANK, k) / k**0.5, torch.randn(n, RANK) / RANK**0.5

    x, grad_y = torch.randn(case.rows, k).bfloat16(), torch.randn(case.rows, n).bfloat16()

    def dense() -> nn.Module:
        return dense_linear(weight.dequantize())

    def with_lora(base: nn.Module) -> nn.Module:
        config = LoraConfig(
            r=RANK, lora_alpha=int(SCALING * RANK), lora_dropout=case.dropout, target_modules=["linear"]
        )
        layer = get_peft_model(OneLinear(base), config).base_model.model.linear
        layer.lora_A["default"].weight = nn.Parameter(lora_A.clone())
        layer.lora_B["default"].weight = nn.Parameter(lora_B.clone())
        return layer.train(case.training)

    def own(linear: nn.Module = linear) -> nn.Module:
        return copy.deepcopy(linear).train(case.training)

    def evaluated(layer: nn.Module) -> nn.Module:
        # bitsandbytes repacks the weight in the first forward in eval mode, and a compiled forward can't follow that.
        if not case.training:
            with torch.no_grad():
                layer(x)
        return layer

    make: dict[str, Callable[[], Layer]] = {
        FUSED: lambda: fused(with_lora(own())),
        OWN_BASE: lambda: fused(own()),
        FUNCTION: lambda: lambda x: lora_linear(x, weight, None, [lora_A], [lora_B], [SCALING]),
        STOCK: lambda: with_lora(own()),
        DENSE: dense,
        DENSE_LORA: lambda: with_lora(dense()),
        DEQUANTIZE: lambda: _Dequantized(weight),
        COMPILED_STOCK: lambda: torch.compile(evaluated(with_lora(own())), dynamic=False),
        COMPILED_DENSE: lambda: torch.compile(with_lora(dense()), dynamic=False),
    }
    return Problem(case, x, grad_y, weight, make)


def make_contender(problem: Problem, name: str, layer: Layer, isa: str = "") -> Contender:
    """Calls of a layer in the mode of the case."""
    case, device = problem.case, problem.x.device.type

    def forward(x: Tensor) -> Tensor:
        with torch.autocast(problem.x.device.type, torch.bfloat16) if case.autocast else nullcontext():
            return layer(x)

    if not case.training:
        call = partial(forward if case.autocast else layer, problem.x)
        repeat = case.repeat if device == "cpu" else max(case.repeat, 20)  # calls for each wait
        return Contender(name, {"forward": call}, isa=isa, repeat=repeat, grad=False, device=device)
    x = problem.x.detach().requires_grad_()
    results = []

    def reset() -> None:
        x.grad = None
        layer.zero_grad()

    phases = {
        "forward": lambda: results.append(forward(x)),
        "backward": lambda: results.pop().backward(problem.grad_y),
    }
    return Contender(name, phases, reset, isa, device=device)


def in_graph(contender: Contender) -> Contender:
    """The same calls in a CUDA graph: without the host's time, which is most of it where rows are few."""
    (call,) = contender.phases.values()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        call()
    return replace(contender, name=f"{contender.name}, in a graph", phases={"forward": graph.replay})


def stored_bytes(weight: NF4Weight) -> int:
    """Bytes of a 4-bit weight: codes and statistics."""
    return sum(tensor.nbytes for tensor in (weight.codes, weight.absmax, *weight.nested))


def saved_by(problem: Problem, layer: nn.Module) -> int:
    """Bytes that a forward keeps for its backward; x itself counts, for it would be freed otherwise."""
    x = problem.x.detach().requires_grad_()
    with torch.autocast(x.device.type, torch.bfloat16) if problem.case.autocast else nullcontext():
        return saved_bytes(layer, lambda: layer(x))


# ---- Checks ---------------------------------------------------------------------------------------------------------


def expected(problem: Problem, layer: nn.Module, seeds: Tensor) -> dict[str, Tensor]:
    """y and, in training, the gradients, in fp64."""
    leaves = {
        "x": problem.x.double(),
        "lora_A": layer.lora_A["default"].weight.detach().double(),
        "lora_B": layer.lora_B["default"].weight.detach().double(),
    }
    for leaf in leaves.values():
        leaf.requires_grad_(problem.case.training)
    y = oracle(
        leaves["x"], problem.weight.dequantize(), None, [leaves["lora_A"]], [leaves["lora_B"]], [SCALING],
        [problem.case.dropout], seeds,
    )  # fmt: skip
    if not problem.case.training:
        return {"y": y}
    y.backward(problem.grad_y.double())
    return {"y": y.detach()} | {name: leaf.grad for name, leaf in leaves.items()}


def actual(problem: Problem, layer: nn.Module) -> tuple[dict[str, Tensor], Tensor]:
    """The same from the fused layer, and the seeds of the dropout that it drew."""
    case = problem.case
    x = problem.x.detach().requires_grad_(case.training)
    torch.manual_seed(1)
    with torch.autocast(problem.x.device.type, torch.bfloat16) if case.autocast else nullcontext():
        y = layer(x)
    torch.manual_seed(1)
    seeds = torch.randint(torch.iinfo(torch.int64).max, (1,), device=x.device)
    if not case.training:
        return {"y": y.detach()}, seeds
    y.backward(problem.grad_y)
    results = {"y": y.detach(), "x": x.grad}
    for name in ("lora_A", "lora_B"):
        results[name] = getattr(layer, name)["default"].weight.grad
    layer.zero_grad()
    return results, seeds


def relative_error(value: Tensor, wanted: Tensor) -> float:
    """rms of the difference, relative to the rms of what is wanted."""
    return ((value.double() - wanted).norm() / wanted.norm()).item()


def check(problem: Problem, layer: nn.Module, isas: Sequence[str]) -> dict[str, float]:
    """The largest error of each instruction set.

    Raises:
        ArithmeticError: an error that the roundings of the result don't explain.
    """
    errors = {}
    wanted = None
    for isa in isas:
        with cpu.use_isa(isa):
            results, seeds = actual(problem, layer)
        wanted = wanted or expected(problem, layer, seeds)
        found = {name: relative_error(results[name], value) for name, value in wanted.items()}
        for name, error in found.items():
            if not error <= TOLERANCES[name]:  # a NaN is not, either
                got = f"got {name} with a relative error of {error:.2g}, wanted {TOLERANCES[name]:g} at most"
                raise ArithmeticError(f"{problem.case}, {isa}: {got}")
        errors[isa] = max(found.values())
    return errors
