"""What the ia3_attention tests share: random problems, their oracle, and torch's attention on the same numbers."""

import sys
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_kernels.ops import ia3_attention
from peft_kernels.testing.reference.attention import ia3_attention as oracle
from peft_kernels.testing.reference.attention import scaled, visible


@dataclass
class Case:
    """The arguments of one call, and the gradient of its result.

    Attributes:
        tensors: those with gradients, by the names that they have as arguments.
        options: the other arguments.
    """

    tensors: dict[str, Tensor]
    grad_out: Tensor
    options: dict[str, object] = field(default_factory=dict)


def make_case(
    batch=2,
    heads=4,
    kv_heads=2,
    num_queries=37,
    num_keys=37,
    head_dim=64,
    dtype=torch.float32,
    scales=("l_q", "l_k", "l_v"),
    prefix=0,
    scale_dtype=torch.float32,
    **options,
) -> Case:
    """Numbers of the sizes found in a trained model: scores of about one, and scales around one."""
    tensors = {
        "q": torch.randn(batch, num_queries, heads, head_dim).to(dtype).transpose(1, 2),
        "k": torch.randn(batch, num_keys, kv_heads, head_dim).to(dtype).transpose(1, 2),
        "v": torch.randn(batch, num_keys, kv_heads, head_dim).to(dtype).transpose(1, 2),
    }
    for name in scales:
        count = (heads if name == "l_q" else kv_heads) * head_dim
        tensors[name] = (1 + 0.3 * torch.randn(count)).to(scale_dtype)
    if prefix:
        tensors["prefix_k"] = torch.randn(kv_heads, prefix, head_dim).to(scale_dtype)
        tensors["prefix_v"] = torch.randn(kv_heads, prefix, head_dim).to(scale_dtype)
    grad_out = torch.randn(batch, heads, num_queries, head_dim).to(dtype)
    options = {
        name: value.to(grad_out.device) if isinstance(value, Tensor) else value for name, value in options.items()
    }
    return Case(tensors, grad_out, options)


def angles(num_keys: int, channels: int, batch: int | None = None) -> tuple[Tensor, Tensor]:
    """cos and sin of rotary embeddings, of positions that begin at 5."""
    frequencies = 100.0 ** -(torch.arange(channels // 2) / max(channels // 2, 1))
    phase = torch.outer(torch.arange(num_keys) + 5.0, frequencies).repeat(1, 2)
    if batch is not None:
        phase = phase + torch.arange(batch)[:, None, None]
    return phase.cos(), phase.sin()


def run(case: Case, function=ia3_attention, **options) -> dict[str, Tensor]:
    """The result, "out", and every gradient, by name."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in case.tensors.items()}
    out = function(**leaves, **case.options, **options)
    out.backward(case.grad_out.to(out.dtype))
    return {"out": out.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}


def expected(case: Case) -> dict[str, Tensor]:
    """The same in fp64."""
    tensors = {name: tensor.double() for name, tensor in case.tensors.items()}
    return run(Case(tensors, case.grad_out, case.options), oracle)


def expected_forward(case: Case) -> Tensor:
    """The result alone, in fp64."""
    return oracle(**{name: tensor.double() for name, tensor in case.tensors.items()}, **case.options)


def on_gpu_plan(monkeypatch) -> None:
    """Has calls on the emulator's tensors, which are on the CPU, ask for a GPU's plan."""
    monkeypatch.setattr(sys.modules["peft_kernels.ops.attention"], "_has_gpu_plan", lambda device: True)


def stock(q, k, v, l_q=None, l_k=None, l_v=None, prefix_k=None, prefix_v=None, causal=False, key_padding_mask=None):
    """Scalings, concatenation, expansion of heads and torch's attention, in the dtype of q."""
    q, k, v = scaled(q, l_q), scaled(k, l_k), scaled(v, l_v)
    mask = visible(q.shape[2], k.shape[2], causal, None)[None, None]
    if key_padding_mask is not None:
        mask = mask & key_padding_mask[:, None, None]
    if prefix_k is not None:
        k = torch.cat([prefix_k.to(q.dtype).expand(q.shape[0], -1, -1, -1), k], dim=2)
        v = torch.cat([prefix_v.to(q.dtype).expand(q.shape[0], -1, -1, -1), v], dim=2)
        mask = F.pad(mask, (prefix_k.shape[1], 0), value=True)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
