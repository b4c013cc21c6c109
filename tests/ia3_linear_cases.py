"""What the ia3_linear tests share: random problems, and their oracle."""

from dataclasses import dataclass, fields, replace

import torch
from comparison import differentiated
from torch import Tensor

from peft_kernels.ops import NF4Weight, ia3_linear, quantize_4bit
from peft_kernels.testing.reference.ia3_linear import ia3_linear as oracle

LEAVES = ("x", "weight", "bias", "l_in", "l_out")


@dataclass
class Case:
    """The arguments of one call, and the gradient of its result."""

    x: Tensor
    weight: Tensor | NF4Weight
    bias: Tensor | None
    l_in: Tensor | None
    l_out: Tensor | None
    grad_y: Tensor

    def leaves(self) -> dict[str, Tensor]:
        """Everything with a gradient; a 4-bit weight has none."""
        return {name: value for name in LEAVES if isinstance(value := getattr(self, name), Tensor)}


def make_case(
    m,
    n,
    k,
    sides="in out",
    x_dtype=torch.float32,
    l_dtype=torch.float32,
    base="nf4",
    weight_dtype=torch.float32,
    blocksize=64,
    bias=True,
    out_dtype=None,
):
    """Numbers of the sizes found in a trained model: y is about one, and so are the scales, whose signs differ."""
    weight = (torch.randn(n, k) / max(k, 1) ** 0.5).to(weight_dtype)
    if base != "dense":
        weight = quantize_4bit(weight, blocksize, "fp4" if base == "fp4" else "nf4", double_quant=base == "nested")
    return Case(
        x=torch.randn(m, k).to(x_dtype),
        weight=weight,
        bias=torch.randn(n) if bias else None,
        l_in=torch.randn(k).to(l_dtype) if "in" in sides else None,
        l_out=torch.randn(n).to(l_dtype) if "out" in sides else None,
        grad_y=torch.randn(m, n).to(out_dtype or x_dtype),
    )


def run(case: Case, function=ia3_linear, **options) -> dict[str, Tensor]:
    """y and every gradient, by name."""
    return differentiated(function, {name: getattr(case, name) for name in LEAVES}, case.grad_y, **options)


def expected(case: Case) -> dict[str, Tensor]:
    """The same in fp64; also of a 4-bit weight, whose gradient no one wants."""
    weight = case.weight.dequantize() if isinstance(case.weight, NF4Weight) else case.weight
    case = replace(case, weight=weight)
    tensors = {field.name: getattr(case, field.name) for field in fields(case)}
    return run(Case(**{name: None if t is None else t.double() for name, t in tensors.items()}), oracle)
