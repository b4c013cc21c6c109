"""A linear layer and the cross-entropy of what it returns, of whose logits only those of a few rows are ever there.

The output layer of a language model with its loss: Liger Kernel (Hsu et al. 2024, arXiv:2410.10989) has it this way,
with the gradient in the forward. For M rows, V classes, K features, and E bytes an element:

                              products    kept for the backward          memory beside it
    logits, then the loss     4 M K V     M V E, M K E                   M V E
    made again in backward    6 M K V     M K E, 8 M                     C V E, for chunks of C rows
    gradient in the forward   4 M K V     M K E                          C V E

(2 M K V more where the weight is trained, whose gradient takes 4 K V bytes.) So the gradient is made in the forward,
where it is wanted. What the loss's own gradient is, is not known there; it scales the result in the backward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ._arguments import FLOAT_DTYPES, bad, check_devices, check_float, is_number, matrix, named, refuse
from ._autograd import Function, anchor, any_wants_gradients, once_differentiable
from ._linear import check_product, owns_product, product_dtypes, without_autocast
from .lora_linear import Call, check_adapters, draw_masks
from .nf4 import NF4Weight

Reduction = Literal["mean", "sum"]

# Rows whose logits are there at once. torch's products in bf16 on the CPU pack the weight each time: for V = 49152 and
# K = 576 on two cores with AMX, a product of 1024 rows took 120 ms in chunks of 512, and 350 ms in chunks of 128.
CHUNK_ROWS = 512


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor | NF4Weight,
    targets: Tensor,
    bias: Tensor | None = None,
    lora_A: Sequence[Tensor] = (),
    lora_B: Sequence[Tensor] = (),
    scaling: Sequence[float] = (),
    dropout: Sequence[float] = (),
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: Reduction = "mean",
    num_items: Tensor | float | None = None,
    compute_dtype: torch.dtype | None = None,
    seeds: Tensor | None = None,
) -> Tensor:
    """`cross_entropy` of the logits that `lora_linear` would return, without these.

    With p = softmax(logits), a row's loss is `(1 - label_smoothing) · -log p[target] + label_smoothing · mean(-log p) +
    z_loss · log(Σ e^logits)²`. The logits are computed in `compute_dtype`, the loss in fp32. Saved for backward: the
    gradients that are wanted, of hidden in its dtype and of parameters in fp32. Rows that are ignored are multiplied
    all the same.

    Args:
        hidden: [..., K], fp32, bf16 or fp16.
        weight: [V, K]; a dense tensor, or an `NF4Weight`, which is frozen.
        targets: int64 [...], each a class of at least 0 and below V, or ignore_index.
        bias: [V].
        lora_A, lora_B, scaling, dropout: of adapters on the layer, as `lora_linear` takes them.
        ignore_index: rows whose target it is have neither a loss nor a gradient.
        label_smoothing: in [0, 1], as of `torch.nn.functional.cross_entropy`.
        z_loss: at least 0.
        softcap: logits become `softcap · tanh(logits / softcap)` before anything else.
        reduction: "mean" divides the sum of the losses by the number of rows that count. Where there are none, it is
            NaN, as torch's is, and the gradients are zero.
        num_items: divides the sum in the place of that number, as where several batches make up one step.
        compute_dtype: of the products; by default autocast's under autocast, else hidden's.
        seeds: int64 [adapters], from which each chunk of rows has the key of its dropout mask; by default drawn from
            torch's generator on hidden's device.

    Returns:
        fp32 [].

    Raises:
        ValueError: a shape, dtype, device or number that does not fit; it names the argument, what it got and what it
            wanted.
        IndexError: a target that is no class. On a GPU, where that would have to wait for the device, the loss is NaN
            instead.
    """
    _check(hidden, weight, targets, bias, ignore_index, label_smoothing, z_loss, softcap, reduction, num_items,
           compute_dtype)  # fmt: skip
    check_adapters(lora_A, lora_B, scaling, dropout, seeds)
    _check_shapes(weight, lora_A, lora_B, scaling, dropout)
    divisors = [num_items] if isinstance(num_items, Tensor) else []
    check_devices(
        hidden, (("targets", targets), *named(num_items=divisors, lora_A=lora_A, lora_B=lora_B)), "hidden"
    )  # fmt: skip
    compute_dtype, _ = product_dtypes(hidden, compute_dtype, None)
    rows, flat = matrix(hidden), targets.reshape(-1)
    dropout, seeds = draw_masks(rows, lora_A, dropout, seeds)
    loss = _Loss(ignore_index, float(label_smoothing), float(z_loss), None if softcap is None else float(softcap))
    call = _Call(weight, compute_dtype, tuple(scaling), tuple(dropout), loss)
    if reduction == "sum":
        divisor = None
    elif num_items is None:
        divisor = (flat != ignore_index).sum()
    else:
        divisor = torch.as_tensor(num_items, device=rows.device).reshape(())
    dense = None if isinstance(weight, NF4Weight) else weight
    if any_wants_gradients(hidden, dense, bias, *lora_A, *lora_B):
        result: Tensor = _LinearCrossEntropy.apply(
            rows, flat, divisor, seeds, dense, bias, call, len(lora_A), *lora_A, *lora_B
        )[0]
        return result
    return call.run(rows, flat, divisor, seeds, dense, bias, lora_A, lora_B, _Wanted())[0]


def _check(hidden: Tensor, weight: Tensor | NF4Weight, targets: Tensor, bias: Tensor | None, ignore_index: int,
           label_smoothing: float, z_loss: float, softcap: float | None, reduction: str,
           num_items: Tensor | float | None, compute_dtype: torch.dtype | None) -> None:  # fmt: skip
    check_product(hidden, weight, bias, compute_dtype, None, "hidden")
    shape = hidden.shape[:-1]
    if not isinstance(targets, Tensor) or targets.dtype is not torch.int64 or targets.shape != shape:
        bad("targets", targets, f"an int64 tensor {list(shape)}, for hidden {list(hidden.shape)}")
    check_float("bias", bias, (weight.shape[0],), optional=True)
    if not isinstance(ignore_index, int):
        bad("ignore_index", ignore_index, "an integer")
    if not (is_number(label_smoothing) and 0 <= label_smoothing <= 1):
        bad("label_smoothing", label_smoothing, "a number in [0, 1]")
    if not (is_number(z_loss) and z_loss >= 0):
        bad("z_loss", z_loss, "a number of at least 0")
    if softcap is not None and not (is_number(softcap) and softcap > 0):
        bad("softcap", softcap, "a number above 0, or None")
    if reduction not in get_args(Reduction):
        refuse("reduction", repr(reduction), "'mean' or 'sum'")
    if isinstance(num_items, Tensor):
        if num_items.numel() != 1 or num_items.dtype not in (*FLOAT_DTYPES, torch.int64):
            bad("num_items", num_items, "a number, or a floating-point or int64 tensor with one element")
    elif num_items is not None and not is_number(num_items):
        bad("num_items", num_items, "a number, or a tensor with one element")
    if num_items is not None and reduction != "mean":
        bad("num_items", num_items, "None, as reduction='sum' divides by nothing")


def _check_shapes(weight: Tensor | NF4Weight, lora_A: Sequence[Tensor], lora_B: Sequence[Tensor],
                  scaling: Sequence[float], dropout: Sequence[float]) -> None:  # fmt: skip
    """Of the adapters: what the ops would check too late, as there may be no chunk."""
    for name, items in (("lora_B", lora_B), ("scaling", scaling), ("dropout", dropout)):
        if len(items) != len(lora_A) and (items or name != "dropout"):
            refuse(name, f"{len(items)} items", f"{len(lora_A)}, as many as lora_A has")
    n, k = weight.shape
    for a, b in zip(lora_A, lora_B, strict=True):
        check_float("lora_A", a, (a.shape[0] if a.dim() else 1, k))
        check_float("lora_B", b, (n, a.shape[0]))


def _check_targets(targets: Tensor, classes: int, ignore_index: int) -> None:
    """By the whole batch, whose rows a chunk does not know the numbers of."""
    if not targets.is_cpu or torch.compiler.is_compiling():
        return
    wrong = ((targets < 0) | (targets >= classes)) & (targets != ignore_index)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise IndexError(
            f"targets: got {int(targets[row])} for row {row}, wanted a class of at least 0 and below {classes}, or "
            f"{ignore_index}, which is ignored"
        )


@dataclass(frozen=True)
class _Loss:
    """The loss of a row by its logits."""

    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float | None

    def run(self, logits: Tensor, targets: Tensor, factor: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The losses of logits [M, V], fp32 [M]; and the gradient of their sum, each times its `factor`, in the dtype
        of the logits, where there are factors, fp32 [M]. What is in the logits is lost."""
        ops = torch.ops.peft_kernels
        cap, smoothing = self.softcap, self.label_smoothing
        losses: Tensor
        if not (cap or smoothing or self.z_loss) and factor is not None and logits.is_cpu:
            losses = ops.cross_entropy_in_place(logits, targets, factor, self.ignore_index)
            return losses, logits
        z = logits
        if cap is not None:
            z = (logits.float() / cap).tanh_().mul_(cap)
        elif smoothing:
            z = logits.float()  # so that a gradient of several terms is rounded once
        losses, statistics = ops.cross_entropy_forward(z, targets, self.ignore_index)
        counted = targets != self.ignore_index
        weights = torch.ones_like(losses)  # of p in the gradient
        if smoothing or self.z_loss:
            maximum, sums = statistics.unbind(1)
            log_sum = maximum + sums.log()
            weights += 2 * self.z_loss * log_sum
            more = (1 - smoothing) * losses + smoothing * (log_sum - z.mean(1)) + self.z_loss * log_sum.square()
            losses = more.where(counted, 0.0)
        if factor is None:
            return losses, None
        grad: Tensor = ops.cross_entropy_backward(factor * weights, z, targets, statistics, self.ignore_index)
        if smoothing or self.z_loss:  # it has (p - onehot) weights, and the target and each class have others
            rest = (factor * (weights - 1 + smoothing)).where(counted, 0.0)
            grad.scatter_add_(1, targets.clamp(0, max(z.shape[1] - 1, 0))[:, None], rest[:, None].to(grad.dtype))
        if smoothing:
            grad -= (factor * smoothing / z.shape[1]).where(counted, 0.0)[:, None]
        if cap is not None:
            grad *= 1 - (z / cap).square()
        return losses, grad.to(logits.dtype)


@dataclass(frozen=True)
class _Wanted:
    """The gradients that are wanted; `a` and `b` are of the adapters' A and B."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False
    a: tuple[bool, ...] = ()
    b: tuple[bool, ...] = ()

    def any(self) -> bool:
        return any((self.hidden, self.weight, self.bias, *self.a, *self.b))


@dataclass(frozen=True)
class _Call:
    """What one call shares between its chunks."""

    weight: Tensor | NF4Weight
    compute_dtype: torch.dtype
    scaling: tuple[float, ...]
    dropout: tuple[float, ...]
    loss: _Loss

    def run(self, hidden: Tensor, targets: Tensor, divisor: Tensor | None, seeds: Tensor | None, dense: Tensor | None,
            bias: Tensor | None, lora_A: Sequence[Tensor], lora_B: Sequence[Tensor],
            wanted: _Wanted) -> tuple[Tensor, Tensor, list[Tensor | None]]:  # fmt: skip
        """The loss; and the gradients of hidden, weight, bias and the adapters, each of which a scale has to be
        multiplied with that is returned before them."""
        dtype = self.compute_dtype
        _check_targets(targets, self.weight.shape[0], self.loss.ignore_index)
        total = hidden.new_zeros((), dtype=torch.float32)
        factor, scale = _split(divisor, total)
        grads: list[Tensor | None] = [
            hidden.new_zeros(hidden.shape) if wanted.hidden else None,
            *(_sum_of(*pair) for pair in ((dense, wanted.weight), (bias, wanted.bias))),
            *(_sum_of(*pair) for pair in zip(lora_A, wanted.a or (False,) * len(lora_A), strict=True)),
            *(_sum_of(*pair) for pair in zip(lora_B, wanted.b or (False,) * len(lora_B), strict=True)),
        ]
        with without_autocast(hidden.device.type):
            weight = self.weight if dense is None else dense.to(dtype)
            layer = Call(weight, dtype, dtype, self.scaling, self.dropout)
            memory: list[Tensor] = []
            for number, part in enumerate(_chunks(hidden.shape[0])):
                x, keys = hidden[part], None if seeds is None else seeds + number
                owns = (False, False) if isinstance(weight, NF4Weight) else owns_product(x, weight, dtype)
                s = None
                if isinstance(weight, NF4Weight) or lora_A or owns[0] or torch.compiler.is_compiling():
                    logits, s = layer.forward(x, bias, keys, None, lora_A, lora_B, any(wanted.b), owns[0])
                else:
                    logits = _product(x.to(dtype), weight, bias, memory)
                factors = factor.expand(x.shape[0]).contiguous() if wanted.any() else None
                losses, grad = self.loss.run(logits, targets[part], factors)
                total += losses.sum()
                if grad is None:
                    continue
                of_x, of_A, of_B = layer.backward(
                    grad, x if any(wanted.a) else None, x.dtype, s, keys, None, lora_A, lora_B, wanted.hidden,
                    list(wanted.a), list(wanted.b), owns[1]
                )  # fmt: skip
                of_bias = grad.sum(0, dtype=torch.float32) if wanted.bias else None
                if grads[0] is not None and of_x is not None:
                    grads[0][part] = of_x
                if grads[1] is not None:
                    _add_product(grads[1], grad, x.to(dtype))
                for into, value in zip(grads[2:], (of_bias, *of_A, *of_B), strict=True):
                    if into is not None and value is not None:
                        into += value
        return total if divisor is None else total / divisor, scale, grads


def _split(divisor: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
    """1 / divisor as a factor in [0.5, 1) and a power of two, in fp32.

    The gradient is made with the factor alone. In fp16, many of its numbers would be too small with both, while the
    scale that is to prevent that comes with the backward; and what it is multiplied with there rounds nothing, mostly.
    """
    if divisor is None:
        return torch.ones_like(like), torch.ones_like(like)
    factor, exponent = (1 / divisor.where(divisor != 0, 1).float()).frexp()
    return factor, torch.ones_like(like).ldexp(exponent)


def _sum_of(tensor: Tensor | None, wanted: bool) -> Tensor | None:
    """Where the chunks' gradients of a parameter are added up."""
    return tensor.new_zeros(tensor.shape, dtype=torch.float32) if wanted and tensor is not None else None


def _chunks(rows: int) -> Iterator[slice]:
    """Of about the same size, in whole tiles."""
    count = -(-rows // CHUNK_ROWS)
    size = -(-rows // max(1, 32 * count)) * 32
    for first in range(0, rows, max(1, size)):
        yield slice(first, min(first + size, rows))


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, memory: list[Tensor]) -> Tensor:
    """x W^T + b in the memory that the last chunk has left, if there is any: new pages take the CPU as long as the
    product."""
    if not memory:
        memory.append(x.new_empty(x.shape[0], weight.shape[0]))
    out = memory[0][: x.shape[0]]
    if bias is None:
        return torch.mm(x, weight.T, out=out)
    return torch.addmm(bias.to(x.dtype), x, weight.T, out=out)


def _add_product(into: Tensor, grad: Tensor, x: Tensor) -> None:
    """into += grad^T x"""
    if grad.dtype is torch.float16:  # with gradients of up to one, the sum over the rows could be too large for it
        grad, x = grad.float(), x.float()
    if grad.dtype is torch.float32:
        into.addmm_(grad.T, x)
    else:
        into += grad.T @ x


class _LinearCrossEntropy(Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, divisor: Tensor | None, seeds: Tensor | None,
                weight: Tensor | None, bias: Tensor | None, call: _Call, num_adapters: int,
                *adapters: Tensor) -> tuple[Tensor, ...]:  # fmt: skip
        lora_A, lora_B = adapters[:num_adapters], adapters[num_adapters:]
        needs = ctx.needs_input_grad
        wanted = _Wanted(needs[0], needs[4], needs[5], needs[8 : 8 + num_adapters], needs[8 + num_adapters :])
        loss, scale, grads = call.run(hidden, targets, divisor, seeds, weight, bias, lora_A, lora_B, wanted)
        anchors = anchor(hidden, True)
        ctx.save_for_backward(scale, *grads, *anchors)
        ctx.dtypes = [None if t is None else t.dtype for t in (hidden, weight, bias, *adapters)]
        return loss, *anchors

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, saved: Sequence[Tensor], grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        scale, *grads = saved[: 1 + len(ctx.dtypes)]
        scale = scale * grad_loss
        scaled = [
            None if grad is None else (grad.float() * scale).to(dtype)
            for grad, dtype in zip(grads, ctx.dtypes, strict=True)
        ]
        return scaled[0], None, None, None, *scaled[1:3], None, None, *scaled[3:]
