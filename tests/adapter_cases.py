"""What the adapter tests share: random problems, their oracle, and the same chain in eager PyTorch."""

from dataclasses import dataclass, field, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_kernels.ops import adapter
from peft_kernels.testing.reference.adapter import ACTIVATIONS
from peft_kernels.testing.reference.adapter import adapter as oracle

# (x, weights)
MODES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32),
    (torch.float16, torch.float16),
    (torch.float32, torch.bfloat16),
]


@dataclass
class Case:
    """The arguments of one call, and the gradient of its result."""

    x: Tensor
    down_weight: Tensor
    down_bias: Tensor | None
    up_weight: Tensor
    up_bias: Tensor | None
    residual: Tensor | str | None  # "x" for x itself
    scale: float | Tensor
    gate: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    post_weight: Tensor | None
    post_bias: Tensor | None
    grad_y: Tensor
    options: dict = field(default_factory=dict)  # activation, dropout, seed

    def leaves(self) -> dict[str, Tensor]:
        """Everything with a gradient."""
        named = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "grad_y"}
        return {name: value for name, value in named.items() if isinstance(value, Tensor)}

    def map(self, function) -> "Case":
        """The same with every tensor changed."""
        return replace(self, grad_y=function(self.grad_y), **{n: function(v) for n, v in self.leaves().items()})


def make_case(
    m,
    d,
    r,
    x_dtype=torch.float32,
    weight_dtype=torch.float32,
    *,
    residual="x",
    activation="gelu",
    bias=True,
    scale=0.5,
    gate=False,
    norm=False,
    post_norm=False,
    dropout=0.0,
    out_dtype=None,
):
    """Numbers of the sizes found in a trained model: x, z and what is added to the residual are about one."""

    def vector(size, mean=0.0):
        return (mean + 0.3 * torch.randn(size)).to(weight_dtype)

    options = {"activation": activation}
    if dropout:
        options |= {"dropout": dropout, "seed": torch.randint(-(2**63), 2**63 - 1, (1,))}
    return Case(
        x=(torch.randn(m, d) + 0.2).to(x_dtype),
        down_weight=(torch.randn(r, d) / d**0.5).to(weight_dtype),
        down_bias=vector(r) if bias else None,
        up_weight=(torch.randn(d, r) / r**0.5).to(weight_dtype),
        up_bias=vector(d) if bias else None,
        residual=torch.randn(m, d).to(x_dtype) if residual == "given" else residual,
        scale=torch.tensor([0.7], dtype=weight_dtype) if scale == "learned" else scale,
        gate=torch.rand(m, 1) if gate else None,
        norm_weight=vector(d, 1.0) if norm else None,
        norm_bias=vector(d) if norm else None,
        post_weight=vector(d, 1.0) if post_norm else None,
        post_bias=vector(d) if post_norm else None,
        grad_y=torch.randn(m, d).to(out_dtype or x_dtype),
        options=options | ({"norm": norm} if norm else {}) | ({"post_norm": post_norm} if post_norm else {}),
    )


def call(case: Case, function=adapter, **more) -> Tensor:
    options = {name: value for name, value in case.options.items() if name not in ("norm", "post_norm")} | more
    if "norm" in case.options:
        options["layer_norm"] = case.norm_weight, case.norm_bias, 1e-5
    if "post_norm" in case.options:
        options["post_layer_norm"] = case.post_weight, case.post_bias, 1e-5
    residual = case.x if isinstance(case.residual, str) else case.residual
    weights = case.down_weight, case.down_bias, case.up_weight, case.up_bias
    return function(case.x, *weights, residual=residual, scale=case.scale, gate=case.gate, **options)


def run(case: Case, function=adapter, **more) -> dict[str, Tensor]:
    """y and every gradient, by name."""
    case = case.map(lambda tensor: tensor.detach().clone().requires_grad_())
    y = call(case, function, **more)
    y.backward(case.grad_y.detach().to(y.dtype))
    return {"y": y.detach(), **{name: leaf.grad for name, leaf in case.leaves().items()}}


def expected(case: Case) -> dict[str, Tensor]:
    """The same in fp64."""
    return run(case.map(Tensor.double), oracle)


def eager(x, down_weight, down_bias, up_weight, up_bias, *, residual, scale, gate, activation, layer_norm=None,
          post_layer_norm=None, dropout=0.0, seed=None):  # fmt: skip
    """The chain of PyTorch operations that libraries of adapters run."""
    z = x
    if layer_norm is not None:
        z = F.layer_norm(z, z.shape[-1:], *layer_norm)
    up = F.linear(ACTIVATIONS[activation](F.linear(z, down_weight, down_bias)), up_weight, up_bias)
    up = F.dropout(up * scale, dropout)
    if gate is not None:
        up = up * gate.to(up.dtype)
    y = up if residual is None else residual + up
    if post_layer_norm is None:
        return y
    # PyTorch has no LayerNorm of one dtype with parameters of another, and autocast may have changed y's.
    return F.layer_norm(y.to(post_layer_norm[0].dtype), y.shape[-1:], *post_layer_norm)
