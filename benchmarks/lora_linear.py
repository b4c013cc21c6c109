"""LoRA on a 4-bit linear layer: checked against fp64, then timed against stock, dense and compiled layers.

Every contender has the same numbers: W is quantised to NF4 with double quantisation, and the dense layers have its
decoded values. x is bf16, or fp32 where the case says so; A and B are fp32.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from benchmarks import harness
from benchmarks.harness import relative_error
from benchmarks.lora_layers import (
    OWN_BASE,
    RANK,
    SCALING,
    STOCK,
    OneLinear,
    dense_linear,
    fused,
    linear4bit,
    stored_bytes,
)
from benchmarks.records import FUSED, Below, Faster, Record, Target, Within
from benchmarks.report import command
from benchmarks.timing import DTYPES, Contender, saved_bytes
from peft_kernels import cpu
from peft_kernels.ops import NF4Weight, lora_linear
from peft_kernels.testing.reference.lora_linear import lora_linear as oracle

DENSE, DENSE_LORA, DEQUANTIZE, FUNCTION = "dense", "LoRA on dense", "dequantize + matmul", "function"
COMPILED_STOCK, COMPILED_DENSE = "compiled stock", "compiled LoRA on dense"
IN_GRAPH = ", in a graph"

# Relative rms errors that the roundings of the result explain: bf16 for y and grad_x; the others are fp32.
TOLERANCES = {"y": 4e-3, "x": 4e-3, "lora_A": 1e-5, "lora_B": 1e-5}
BASELINES = {
    "dense": (DENSE, DENSE_LORA),
    "stock": (STOCK,),
    "dequantize": (DEQUANTIZE,),
    "compiled": (COMPILED_STOCK, COMPILED_DENSE),
}

# ---- Cases ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case(harness.Rows):
    """A shape and a mode, and what is wanted of it with the processor's fastest instruction set.

    Attributes:
        rows: M, of x [M, K].
        shape: (N, K).
        training: forward and backward with fresh layers; otherwise a forward in eval mode without autograd.
        autocast: under bf16 autocast.
        repeat: calls of each sample, when it is the overhead that counts.
        dtype: of x and of dense weights, a key of timing.DTYPES.
    """

    rows: int
    shape: tuple[int, int]
    training: bool = False
    dropout: float = 0.0
    autocast: bool = False
    repeat: int = 1
    large: bool = False
    wanted: tuple[Target, ...] = ()
    dtype: str = "bf16"

    def __str__(self) -> str:
        extras = [f"dropout {self.dropout:g}"] * bool(self.dropout) + ["autocast"] * self.autocast
        extras += ["overhead"] * (self.repeat > 1) + [self.dtype] * (self.dtype != "bf16")
        return " ".join(
            [f"{'train' if self.training else 'eval'} M={self.rows} {self.shape[0]}x{self.shape[1]}", *extras]
        )

    def targets(self, isa: str) -> tuple[Target, ...]:
        """Of the slower instruction sets less is wanted, and the same in every case."""
        return self.wanted if isa == cpu.isas()[-1] else self._of_slower_isas(isa)

    def _of_slower_isas(self, isa: str) -> tuple[Target, ...]:
        if isa == "portable" or not self.training or self.rows < 8:
            return ()
        return Faster("both", STOCK, 1.5), Faster("both", DEQUANTIZE, 1.0)


def _square(rows: int, stock: float, dense: float) -> Case:
    wanted = Faster("forward", STOCK, stock), Faster("forward", DENSE, dense)
    return Case(rows, (4096, 4096), wanted=wanted)


def _train(rows: int, dropout: float, *wanted: Target) -> Iterator[Case]:
    yield Case(rows, (4096, 4096), True, dropout, wanted=wanted)
    yield Case(rows, (4096, 4096), True, dropout, autocast=True)


# The targets were set for two cores with AMX; on another machine they say how far from those it is.
CASES = (
    _square(1, 1.4, 2.4),
    _square(8, 4, 2),
    _square(32, 7, 1.3),
    _square(128, 13, 1.25),
    _square(512, 15, 1),
    _square(2048, 16, 1),
    *_train(8, 0, Faster("both", STOCK, 25)),
    *_train(512, 0, Faster("both", STOCK, 4), Faster("both", DENSE, 1)),
    *_train(512, 0.05, Faster("both", STOCK, 5), Within("forward", OWN_BASE, 0.12)),
    *_train(2048, 0.05, Faster("both", STOCK, 4)),
    # The layers of SmolLM2-135M.
    *(Case(1, shape) for shape in ((576, 576), (192, 576), (1536, 576), (576, 1536))),
    *(Case(1024, shape, True, 0.05) for shape in ((576, 576), (192, 576), (1536, 576), (576, 1536))),
    Case(1, (576, 576), repeat=200, wanted=(Below("forward", 15e-6),)),
    *(Case(1, shape, large=True) for shape in ((4096, 14336), (49152, 576))),
    *(Case(512, shape, True, 0.05, large=True) for shape in ((4096, 14336), (49152, 576))),
    # For processors without products in bf16, where torch's are slower than those in fp32.
    *(Case(rows, (4096, 4096), dtype="fp32") for rows in (1, 8, 32, 128, 512, 2048)),
    Case(512, (4096, 4096), True, 0.05, dtype="fp32"),
)


# ---- Layers ---------------------------------------------------------------------------------------------------------


class _Dequantized(nn.Module):
    """What a 4-bit layer costs without a fused product: this package's dequantisation, then torch's matrix product."""

    def __init__(self, weight: NF4Weight) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.dequantize())


Layer = nn.Module | Callable[[Tensor], Tensor]


class Problem(harness.Problem):
    """The numbers of a case, and a fresh layer for each contender."""

    optional = BASELINES["compiled"]

    def __init__(self, case: Case, device: str = "cpu") -> None:
        """The tensors of the problem and of its layers are on the device."""
        self.case, self.device = case, device
        self.name = str(case)
        self.weighed = case.repeat == 1
        self.layers: dict[str, Layer] = {}
        n, k = case.shape
        dtype = DTYPES[case.dtype]
        torch.manual_seed(0)
        with torch.device(device):
            self.linear = linear4bit((torch.randn(n, k) / k**0.5).to(dtype))
            self.weight = NF4Weight.from_params4bit(copy.deepcopy(self.linear.weight))
            self.lora_A, self.lora_B = torch.randn(RANK, k) / k**0.5, torch.randn(n, RANK) / RANK**0.5
            self.x, self.grad_y = torch.randn(case.rows, k).to(dtype), torch.randn(case.rows, n).to(dtype)

    def layer(self, name: str) -> Layer:
        """A contender's layer, made when it is first asked for."""
        if name not in self.layers:
            with torch.device(self.device):
                self.layers[name] = self._make(name)
        return self.layers[name]

    def _make(self, name: str) -> Layer:
        make: dict[str, Callable[[], Layer]] = {
            FUSED: lambda: fused(self._with_lora(self._own())),
            OWN_BASE: lambda: fused(self._own()),
            FUNCTION: lambda: lambda x: lora_linear(x, self.weight, None, [self.lora_A], [self.lora_B], [SCALING]),
            STOCK: lambda: self._with_lora(self._own()),
            DENSE: self._dense,
            DENSE_LORA: lambda: self._with_lora(self._dense()),
            DEQUANTIZE: lambda: _Dequantized(self.weight),
            COMPILED_STOCK: lambda: torch.compile(self._evaluated(self._with_lora(self._own())), dynamic=False),
            COMPILED_DENSE: lambda: torch.compile(self._with_lora(self._dense()), dynamic=False),
        }
        return make[name]()

    def _own(self) -> nn.Module:
        return copy.deepcopy(self.linear).train(self.case.training)

    def _dense(self) -> nn.Module:
        return dense_linear(self.weight.dequantize())

    def _with_lora(self, base: nn.Module) -> nn.Module:
        config = LoraConfig(
            r=RANK, lora_alpha=int(SCALING * RANK), lora_dropout=self.case.dropout, target_modules=["linear"]
        )
        layer = get_peft_model(OneLinear(base), config).base_model.model.linear
        layer.lora_A["default"].weight = nn.Parameter(self.lora_A.clone())
        layer.lora_B["default"].weight = nn.Parameter(self.lora_B.clone())
        return layer.train(self.case.training)

    def _evaluated(self, layer: nn.Module) -> nn.Module:
        # bitsandbytes repacks the weight in the first forward in eval mode, and a compiled forward can't follow that.
        if not self.case.training:
            with torch.no_grad():
                layer(self.x)
        return layer

    def _autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device, torch.bfloat16) if self.case.autocast else nullcontext()

    def contender(self, name: str, isa: str = "") -> Contender:
        """Calls of a layer in the mode of the case."""
        case, layer = self.case, self.layer(name)

        def forward(x: Tensor) -> Tensor:
            with self._autocast():
                return layer(x)

        if not case.training:
            call = partial(forward if case.autocast else layer, self.x)
            repeat = case.repeat if self.device == "cpu" else max(case.repeat, 20)  # calls for each wait
            return Contender(name, {"forward": call}, isa=isa, repeat=repeat, grad=False, device=self.device)
        x = self.x.detach().requires_grad_()
        results = []

        def reset() -> None:
            x.grad = None
            layer.zero_grad()

        phases = {
            "forward": lambda: results.append(forward(x)),
            "backward": lambda: results.pop().backward(self.grad_y),
        }
        return Contender(name, phases, reset, isa, device=self.device)

    def variants(self, contenders: Sequence[Contender]) -> list[Contender]:
        """In a CUDA graph, where rows are few."""
        if self.device != "cuda" or self.case.training or self.case.rows > 32:
            return []
        return [in_graph(contender) for contender in contenders if contender.name in (FUSED, STOCK, DENSE)]

    def work(self, phase: str, name: str) -> tuple[float, float]:
        name = name.removesuffix(IN_GRAPH)
        dense, lora = name in (DENSE, DENSE_LORA, COMPILED_DENSE), name not in (DENSE, DEQUANTIZE, OWN_BASE)
        n, k = self.case.shape
        size = n * k * DTYPES[self.case.dtype].itemsize if dense else stored_bytes(self.weight)
        return work(self.case, phase, size, lora)

    def saved(self, name: str) -> int | None:
        """x itself counts, for it would be freed otherwise."""
        if not self.case.training or name.startswith("compiled"):
            return None
        x, layer = self.x.detach().requires_grad_(), self.layer(name)
        with self._autocast():
            return saved_bytes(layer, lambda: layer(x))

    def targets(self, isa: str) -> tuple[Target, ...]:
        return self.case.targets(isa) if self.device == "cpu" else ()

    # ---- The check ----

    def expected(self, seeds: Tensor) -> dict[str, Tensor]:
        """y and, in training, the gradients, in fp64."""
        case, layer = self.case, self.layer(FUSED)
        leaves = {
            "x": self.x.double(),
            "lora_A": layer.lora_A["default"].weight.detach().double(),
            "lora_B": layer.lora_B["default"].weight.detach().double(),
        }
        for leaf in leaves.values():
            leaf.requires_grad_(case.training)
        y = oracle(
            leaves["x"], self.weight.dequantize(), None, [leaves["lora_A"]], [leaves["lora_B"]], [SCALING],
            [case.dropout], seeds,
        )  # fmt: skip
        if not case.training:
            return {"y": y}
        y.backward(self.grad_y.double())
        return {"y": y.detach()} | {name: leaf.grad for name, leaf in leaves.items()}

    def actual(self) -> tuple[dict[str, Tensor], Tensor]:
        """The same from the fused layer, and the seeds of the dropout that it drew."""
        case, layer = self.case, self.layer(FUSED)
        x = self.x.detach().requires_grad_(case.training)
        torch.manual_seed(1)
        with self._autocast():
            y = layer(x)
        torch.manual_seed(1)
        seeds = torch.randint(torch.iinfo(torch.int64).max, (1,), device=x.device)
        if not case.training:
            return {"y": y.detach()}, seeds
        y.backward(self.grad_y)
        results = {"y": y.detach(), "x": x.grad}
        for name in ("lora_A", "lora_B"):
            results[name] = getattr(layer, name)["default"].weight.grad
        layer.zero_grad()
        return results, seeds

    def check(self, isas: Sequence[str]) -> dict[str, float]:
        errors = {}
        wanted = None
        for isa in isas:
            with cpu.use_isa(isa):
                results, seeds = self.actual()
            wanted = wanted or self.expected(seeds)
            found = {name: relative_error(results[name], value) for name, value in wanted.items()}
            for name, error in found.items():
                if not error <= TOLERANCES[name]:  # a NaN is not, either
                    got = f"got {name} with a relative error of {error:.2g}, wanted {TOLERANCES[name]:g} at most"
                    raise ArithmeticError(f"{self.case}, {isa}: {got}")
            errors[isa] = max(found.values())
        return errors


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
    return replace(contender, name=contender.name + IN_GRAPH, phases={"forward": graph.replay})


# ---- Measurements ---------------------------------------------------------------------------------------------------


def work(case: Case, phase: str, weight_bytes: int, lora: bool) -> tuple[int, int]:
    """Bytes and operations that a phase can't do without: each operand is moved once, the adapters in fp32."""
    m, (n, k), itemsize = case.rows, case.shape, DTYPES[case.dtype].itemsize
    adapter = RANK * (n + k) if lora else 0
    if phase == "forward":
        return weight_bytes + itemsize * m * (n + k) + 4 * adapter, 2 * m * (n * k + adapter)
    # grad_y in, grad_x out; x once more for A; the adapters in and their gradients out
    size = weight_bytes + itemsize * m * (n + k) + (itemsize * m * k if lora else 0) + 8 * adapter
    return size, 2 * m * (n * k + 2 * adapter)


def run(
    case: Case,
    vs: Sequence[str],
    isas: Sequence[str],
    seconds: float,
    say: Callable[[str], None],
    device: str = "cpu",
) -> list[Record]:
    """Checks and then times a case."""
    names = [OWN_BASE, *(name for group in vs for name in BASELINES[group])] if case.repeat == 1 else [FUNCTION]
    return harness.measure(partial(Problem, device=device), case, names, isas, seconds, say, device)


main = command("lora_linear", __doc__, CASES, BASELINES, run, devices=("cpu", "cuda"))
