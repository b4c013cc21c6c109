"""What the lora_linear tests share: random problems, their oracle, and stock PEFT on the same numbers."""

from dataclasses import dataclass, replace

import torch
from comparison import DTYPES, assert_close, error, rms, short  # noqa: F401
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from peft_kernels.ops import NF4Weight, lora_linear, lora_linear_grouped, quantize_4bit
from peft_kernels.testing.reference.lora_linear import lora_linear as oracle

BASES = ["nf4", "fp4", "nested", "dense"]
RANKS = (4, 17, 1)  # of the adapters of a batch


@dataclass
class Case:
    """The arguments of one call, and the gradient of its result."""

    x: Tensor
    weight: Tensor | NF4Weight
    bias: Tensor | None
    lora_A: list[Tensor]  # noqa: N815
    lora_B: list[Tensor]  # noqa: N815
    scaling: list[float]
    dropout: list[float]
    seeds: Tensor | None
    grad_y: Tensor

    def dense_weight(self) -> Tensor:
        return self.weight.dequantize() if isinstance(self.weight, NF4Weight) else self.weight

    def leaves(self) -> dict[str, Tensor]:
        """Everything with a gradient; a 4-bit weight has none."""
        leaves = {"x": self.x, "bias": self.bias}
        if isinstance(self.weight, Tensor):
            leaves["weight"] = self.weight
        for name in ("lora_A", "lora_B"):
            leaves |= {f"{name}{i}": tensor for i, tensor in enumerate(getattr(self, name))}
        return {name: tensor for name, tensor in leaves.items() if tensor is not None}


def make_case(
    m,
    n,
    k,
    ranks=(8,),
    x_dtype=torch.float32,
    adapter_dtype=torch.float32,
    base="nf4",
    weight_dtype=torch.float32,
    blocksize=64,
    bias=True,
    dropout=(),
    out_dtype=None,
):
    """Numbers of the sizes found in a trained model: y, and each of its parts, is about one."""
    weight = (torch.randn(n, k) / max(k, 1) ** 0.5).to(weight_dtype)
    if base != "dense":
        weight = quantize_4bit(weight, blocksize, "fp4" if base == "fp4" else "nf4", double_quant=base == "nested")
    return Case(
        x=torch.randn(m, k).to(x_dtype),
        weight=weight,
        bias=torch.randn(n) if bias else None,
        lora_A=[(torch.randn(r, k) / max(k, 1) ** 0.5).to(adapter_dtype) for r in ranks],
        lora_B=[torch.randn(n, r).to(adapter_dtype) for r in ranks],
        scaling=[2.0 / (1 + i) / r**0.5 for i, r in enumerate(ranks)],
        dropout=list(dropout),
        seeds=torch.randint(-(2**63), 2**63 - 1, (len(ranks),)) if any(dropout) else None,
        grad_y=torch.randn(m, n).to(out_dtype or x_dtype),
    )


def make_batch(
    tokens, n, k, x_dtype=torch.float32, adapter_dtype=torch.float32, base="nf4", examples=6, ranks=RANKS, **more
):
    """A case of lora_linear_grouped with x [examples, tokens, k]."""
    case = make_case(examples * tokens, n, k, ranks, x_dtype, adapter_dtype, base, **more)
    case.x, case.grad_y = case.x.view(examples, tokens, k), case.grad_y.view(examples, tokens, n)
    return case


def with_index(index, function=lora_linear_grouped):
    """`lora_linear_grouped`, or another function of its arguments, with those of `lora_linear`."""

    def call(x, weight, bias, lora_A, lora_B, scaling, dropout, **options):
        return function(x, weight, bias, lora_A, lora_B, scaling, index, dropout, **options)

    return call


class Recorder(TorchDispatchMode):
    """The results of every call of a backward op of this package."""

    def __init__(self):
        super().__init__()
        self.results = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        ops = torch.ops.peft_kernels
        if function in (ops.lora_linear_backward.default, ops.lora_linear_grouped_backward.default):
            self.results.append([tensor.numel() for tensor in result])
        return result


def run(case: Case, function=lora_linear, **options) -> dict[str, Tensor]:
    """y and every gradient, by name."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in case.leaves().items()}
    count = range(len(case.lora_A))
    y = function(
        leaves["x"], leaves.get("weight", case.weight), leaves.get("bias"),
        [leaves[f"lora_A{i}"] for i in count], [leaves[f"lora_B{i}"] for i in count],
        case.scaling, case.dropout, seeds=case.seeds, **options,
    )  # fmt: skip
    y.backward(case.grad_y.to(y.dtype))
    return {"y": y.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}


def expected(case: Case, function=oracle) -> dict[str, Tensor]:
    """The same in fp64."""
    as_double = replace(case, x=case.x.double(), weight=case.dense_weight().double())
    as_double.bias = None if case.bias is None else case.bias.double()
    as_double.lora_A, as_double.lora_B = [a.double() for a in case.lora_A], [b.double() for b in case.lora_B]
    results = run(as_double, function)
    if isinstance(case.weight, NF4Weight):
        del results["weight"]
    return results


def magnitudes(case: Case, function=oracle) -> dict[str, Tensor]:
    """The oracle on absolute values: what sums would be without cancellation."""
    weight = case.dense_weight().abs()
    case = replace(case, x=case.x.abs(), grad_y=case.grad_y.abs(), scaling=[abs(value) for value in case.scaling])
    case.bias = None if case.bias is None else case.bias.abs()
    case.lora_A, case.lora_B = [a.abs() for a in case.lora_A], [b.abs() for b in case.lora_B]
    return expected(replace(case, weight=weight), function)


class _OneLinear(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, x):
        return self.linear(x)


def stock(case: Case) -> nn.Module:
    """PEFT's own layer with the numbers of `case`: LoRA of one adapter on bitsandbytes' Linear4bit, or torch's Linear.

    `run_stock` runs it. In the 4-bit case the weight must have been quantised with blocksize 64 from `weight_dtype`.
    """
    import bitsandbytes as bnb
    from peft import LoraConfig, get_peft_model

    dense = case.dense_weight()
    n, k = dense.shape
    if isinstance(case.weight, NF4Weight):
        linear = bnb.nn.Linear4bit(k, n, bias=case.bias is not None, compute_dtype=case.x.dtype, quant_type="nf4")
        state = bnb.functional.QuantState.from_dict(case.weight.as_dict(), dense.device)
        linear.weight = bnb.nn.Params4bit.from_prequantized(
            case.weight.codes.view(-1, 1), state.as_dict(packed=True), requires_grad=False, device=dense.device
        )
        linear.quant_state = linear.weight.quant_state
    else:
        linear = nn.Linear(k, n, bias=case.bias is not None)
        linear.weight = nn.Parameter(dense.clone())
    if case.bias is not None:
        linear.bias = nn.Parameter(case.bias.clone())
    rank = case.lora_A[0].shape[0]
    config = LoraConfig(
        r=rank, lora_alpha=case.scaling[0] * rank, target_modules=["linear"], lora_dropout=sum(case.dropout)
    )
    model = get_peft_model(_OneLinear(linear), config, autocast_adapter_dtype=False).train()
    layer = model.base_model.model.linear
    layer.lora_A["default"].weight = nn.Parameter(case.lora_A[0].clone())
    layer.lora_B["default"].weight = nn.Parameter(case.lora_B[0].clone())
    return layer


def run_stock(case: Case) -> dict[str, Tensor]:
    """What `run` returns, but of the stock layer, and without the gradients of the base layer."""
    layer = stock(case)
    x = case.x.detach().requires_grad_()
    with _disable_current_modes():  # the emulator's, under which stock computes in other dtypes
        y = layer(x)
        y.backward(case.grad_y.to(y.dtype))
    return {
        "y": y.detach(),
        "x": x.grad,
        "lora_A0": layer.lora_A["default"].weight.grad,
        "lora_B0": layer.lora_B["default"].weight.grad,
    }
