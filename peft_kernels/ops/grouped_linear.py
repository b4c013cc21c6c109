"""The linear layers of a mixture's experts, with LoRA.

`y[t] = x[t] Wₑᵀ + biasₑ + Σᵢ scalingᵢ · x[t] Aₑᵢᵀ Bₑᵢᵀ`, where e is the expert of row t.

Mixtures of experts: Shazeer et al. 2017 (arXiv:1701.06538). LoRA: Hu et al. 2021 (arXiv:2106.09685).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .. import cpu
from . import _grouped_on_gpu as on_gpu
from ._arguments import bad, check_devices, check_dtype, check_flag, is_float, named, refuse
from ._autograd import Function, anchor, any_wants_gradients, cut_gradients, once_differentiable
from ._fakes import register_fake
from ._linear import gradient_of_weight, owns_product, product_dtypes, without_autocast
from .lora_linear import Call, check_adapters, make_y
from .nf4 import NF4Weight, dequantize_4bit_rows

Weights: TypeAlias = Tensor | NF4Weight | Sequence[NF4Weight]

# An expert's rows up to which the kernels' product with a dense weight takes no longer than that of torch's library,
# with which the branch is a pass of its own: measured with weights of 1024 x 512 from memory on a Xeon with AMX. In
# fp32, dx reads the weight across its rows, where MKL is faster.
_MOST_ROWS_IN_FP32 = 64  # with AVX-512
_MOST_ROWS_IN_BF16 = 256  # with AMX

_INTEGERS = (torch.int64, torch.int32)


def grouped_linear(
    x: Tensor,
    weight: Weights,
    bias: Tensor | None,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scaling: Sequence[float],
    offsets: Tensor,
    *,
    transposed: bool = False,
    rows: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """A linear layer of each expert on the rows that are its own, and its part of each active LoRA adapter.

    `y[t] = x[t] Wₑᵀ + biasₑ + Σᵢ scalingᵢ · x[t] Aₑᵢᵀ Bₑᵢᵀ`, with the base product in `compute_dtype` and the
    branches in fp32. Neither a product of A and B nor a dense stack of a 4-bit weight is ever made. Saved for backward:
    x (only when an A or a dense weight is trained), s = x Aᵀ in fp32 (only when a B is trained), rows and offsets. An
    expert without rows has gradients of zero.

    Args:
        x: [S, K], fp32, bf16 or fp16: the rows of expert 0, then those of expert 1, and so on; or with `rows` [T, K].
        weight: [E, N, K], a dense tensor or an `NF4Weight` of this shape; or a sequence of E `NF4Weight`s [N, K]. 4-bit
            weights are frozen.
        bias: [E, N].
        lora_A: for each adapter [E · rᵢ, K], the expert slowest: expert e has rows e · rᵢ to (e + 1) · rᵢ - 1. This and
            lora_B's are PEFT's layouts of a stack.
        lora_B: for each adapter [N, rᵢ · E], the expert fastest: expert e has columns e, E + e, 2 E + e, and so on.
        scaling: a number for each adapter.
        offsets: int32 or int64 [E], where the rows of each expert end, as torch's `grouped_mm` has them. Rows from
            offsets[-1] on belong to no expert: y is zero there. On a GPU they are not checked where one launch computes
            with all experts, and then only the gradient of a dense weight waits for them.
        transposed: whether the weight lies as [E, K, N].
        rows: int64 [S]; row i of the product reads x[rows[i]]. x's gradient is summed in fp32, in the order of `rows`.
        compute_dtype: of the base product; by default x's, or autocast's under it.
        out_dtype: of y; the same.

    Returns:
        [S, N] in out_dtype.

    Raises:
        ValueError: a shape, dtype, device or number that does not fit; it names the argument, what it got and what it
            wanted.
    """
    weight = weight if isinstance(weight, (Tensor, NF4Weight)) else _as_tuple(weight)
    num_experts, _, k = check_stack(weight, bias, lora_A, lora_B, scaling, transposed)
    if not is_float(x) or x.dim() != 2 or x.shape[1] != k:
        bad("x", x, f"a float32, bfloat16 or float16 tensor [rows, {k}]")
    _check_integers("offsets", offsets, (num_experts,), _INTEGERS)
    if rows is not None:
        _check_integers("rows", rows, (rows.numel() if isinstance(rows, Tensor) else 0,), (torch.int64,))
    for name, dtype in (("compute_dtype", compute_dtype), ("out_dtype", out_dtype)):
        if dtype is not None:
            check_dtype(name, dtype)
    tensors = named(weight=tensors_of(weight), bias=[bias], lora_A=lora_A, lora_B=lora_B, rows=[rows])
    check_devices(x, tensors if offsets.is_cpu else [*tensors, ("offsets", offsets)])
    call = GroupedCall(weight, transposed, tuple(scaling), *product_dtypes(x, compute_dtype, out_dtype))
    dense = weight if isinstance(weight, Tensor) else None
    if any_wants_gradients(x, bias, dense, *lora_A, *lora_B):
        y: Tensor = _GroupedLinear.apply(x, bias, dense, rows, offsets, call, len(lora_A), *lora_A, *lora_B)[0]
        return y
    return call.forward(gathered(x, rows), bias, lora_A, lora_B, offsets, False)[0]


def _as_tuple(weight: Any) -> tuple[NF4Weight, ...]:
    if not (isinstance(weight, (list, tuple)) and weight and all(isinstance(w, NF4Weight) for w in weight)):
        bad("weight", weight, "a tensor or an NF4Weight [E, N, K], or a sequence of E NF4Weights [N, K]")
    for w in weight:
        if w.shape != weight[0].shape:
            refuse("weight", f"NF4Weights of shapes {list(weight[0].shape)} and {list(w.shape)}", "one shape")
    return tuple(weight)


def tensors_of(weight: Weights) -> list[Tensor]:
    if isinstance(weight, Tensor):
        return [weight]
    return [weight.codes] if isinstance(weight, NF4Weight) else [w.codes for w in weight]


def shape_of_stack(weight: Weights) -> tuple[int, ...]:
    return tuple(weight.shape) if isinstance(weight, (Tensor, NF4Weight)) else (len(weight), *weight[0].shape)


def check_stack(
    weight: Weights, bias: Any, lora_A: Any, lora_B: Any, scaling: Any, transposed: Any
) -> tuple[int, int, int]:
    """Refuses a stack whose parts do not fit each other; its numbers of experts, outputs and inputs."""
    check_flag("transposed", transposed)
    for w in weight if isinstance(weight, tuple) else (weight,):
        if isinstance(w, NF4Weight):
            w.check_types()
    shape = shape_of_stack(weight)
    if (isinstance(weight, Tensor) and not is_float(weight)) or len(shape) != 3 or shape[0] == 0:
        wanted = "[E, K, N]" if transposed else "[E, N, K]"
        bad("weight", weight, f"an NF4Weight or a float32, bfloat16 or float16 tensor, of shape {wanted}")
    num_experts, n, k = (shape[0], shape[2], shape[1]) if transposed else shape
    if bias is not None and not (is_float(bias) and bias.shape == (num_experts, n)):
        bad("bias", bias, f"a float32, bfloat16 or float16 tensor [{num_experts}, {n}]")
    check_adapters(lora_A, lora_B, scaling, (), None)
    for name, items in (("lora_B", lora_B), ("scaling", scaling)):
        if len(items) != len(lora_A):
            refuse(name, f"{len(items)} items", f"{len(lora_A)} items, as lora_A has")
    for a, b in zip(lora_A, lora_B, strict=True):
        if not is_float(a) or a.dim() != 2 or a.shape[1] != k or a.shape[0] % num_experts:
            bad("lora_A", a, f"a float32, bfloat16 or float16 tensor [{num_experts} experts · rank, {k}]")
        if not is_float(b) or b.shape != (n, a.shape[0]):
            bad("lora_B", b, f"a float32, bfloat16 or float16 tensor [{n}, {a.shape[0]}]")
    return num_experts, n, k


def _check_integers(name: str, value: Any, shape: tuple[int, ...], dtypes: Sequence[torch.dtype]) -> None:
    if not (isinstance(value, Tensor) and value.dtype in dtypes and value.shape == shape):
        kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        bad(name, value, f"a tensor {list(shape)} of {kinds}")


@dataclass(frozen=True)
class GroupedCall:
    """What one product shares between its forward and its backward, tensors that need gradients apart."""

    weight: Weights
    transposed: bool
    scaling: tuple[float, ...]
    compute_dtype: torch.dtype
    out_dtype: torch.dtype

    @property
    def sizes(self) -> tuple[int, int, int]:
        """The numbers of experts, outputs and inputs."""
        num_experts, n, k = shape_of_stack(self.weight)
        return (num_experts, k, n) if self.transposed else (num_experts, n, k)

    def experts(self, offsets: Tensor, num_rows: int) -> list[tuple[int, slice]]:
        """Those that have rows, with these."""
        result, begin = [], 0
        for e, end in enumerate(offsets.tolist()):
            if not begin <= end <= num_rows:
                refuse("offsets", f"{end} after {begin}", f"ends of experts' rows that ascend to {num_rows} at most")
            if end > begin:
                result.append((e, slice(begin, end)))
            begin = end
        return result

    def matrix(self, e: int) -> Tensor | NF4Weight:
        """The weight [N, K] of one expert: a view, or one panel where no view of the 4-bit codes is a weight."""
        weight = self.weight
        if isinstance(weight, Tensor):
            return weight[e].T if self.transposed else weight[e]
        one = expert_of_stack(weight, e) if isinstance(weight, NF4Weight) else weight[e]
        if self.transposed:
            one = (one.dequantize() if isinstance(one, NF4Weight) else one).T
        return one

    def stored(self) -> tuple[Sequence[Tensor], Sequence[int]] | None:
        """The ops' `weight` and `format`; None where they cannot read the stack as it lies."""
        weight = self.weight
        if isinstance(weight, Tensor):
            return ((weight,), ()) if weight.stride(2) == 1 else None
        if isinstance(weight, NF4Weight):
            return None if weight.shape[1] * weight.shape[2] % weight.blocksize else weight.arguments
        tensors, formats = zip(*(one.arguments for one in weight), strict=True)
        if any(format != formats[0] for format in formats) or any(len(t) != len(tensors[0]) for t in tensors):
            return None
        return [tensor for parts in tensors for tensor in parts], formats[0]

    def is_at_once(self, x: Tensor) -> bool:
        """Whether the forward with rows like those of x is that of `on_gpu`."""
        return on_gpu.takes(self.weight, x, self.transposed, self.compute_dtype)

    def forward(self, x: Tensor, bias: Tensor | None, lora_A: Sequence[Tensor], lora_B: Sequence[Tensor],
                offsets: Tensor, wants_s: bool,
                parts: Tensor | None = None) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Returns y [S, N], and s [S, Σ rank] if it is wanted; `parts` is what `on_gpu.gate_and_shrink` has made."""
        if on_gpu.takes(self.weight, x, self.transposed, self.compute_dtype):
            return on_gpu.forward(
                x, self.weight, self.transposed, bias, lora_A, lora_B, self.scaling, offsets, self.compute_dtype,
                self.out_dtype, wants_s, parts,
            )  # fmt: skip
        num_experts, n, _ = self.sizes
        y = x.new_empty((x.shape[0], n), dtype=self.out_dtype)
        experts = self.experts(offsets, x.shape[0])
        y[experts[-1][1].stop if experts else 0 :].zero_()
        stored = None if on_gpu.is_on_gpu(x) else self.stored()
        if stored is None:
            return y, self._forward_one_by_one(y, x, bias, lora_A, lora_B, experts, wants_s)
        given = self._given(num_experts, experts, x, 0)
        for e, own in experts:
            if given[e]:
                self._multiply(x[own], self.matrix(e), None if bias is None else bias[e], y[own])
        # The product across a stack's codes has no bias; the op adds one with the branch, where there is one.
        adds_bias = bias is not None and (len(lora_A) > 0 or not self.transposed or isinstance(self.weight, Tensor))
        s: Tensor = torch.ops.peft_kernels.grouped_linear_forward(
            y, x, *stored, self.transposed, offsets.tolist(), given, lora_A, lora_B, self.scaling,
            bias=bias.contiguous() if bias is not None and adds_bias else None, compute_dtype=self.compute_dtype,
        )  # fmt: skip
        if bias is not None and not adds_bias:
            for e, own in experts:
                y[own] += bias[e]
        return y, s

    def backward(self, grad_y: Tensor, x: Tensor | None, x_dtype: torch.dtype, s: Tensor | None,
                 lora_A: Sequence[Tensor], lora_B: Sequence[Tensor], offsets: Tensor, wants_x: bool, wants_weight: bool,
                 wants_A: list[bool], wants_B: list[bool],
                 ) -> tuple[Tensor | None, Tensor | None, list[Tensor | None], list[Tensor | None]]:  # fmt: skip
        """Returns grad_x [S, K], the gradient of a dense weight, and lists of those of A and B; None where not
        wanted."""
        if on_gpu.takes(self.weight, grad_y, not self.transposed, self.compute_dtype):
            grad_x, grad_A, grad_B = on_gpu.backward(
                grad_y, x, x_dtype, s, self.weight, self.transposed, lora_A, lora_B, self.scaling, offsets,
                self.compute_dtype, wants_x, wants_A, wants_B,
            )  # fmt: skip
            return grad_x, self._gradient_of_weight(grad_y, x, offsets) if wants_weight else None, grad_A, grad_B
        num_experts, _, k = self.sizes
        experts = self.experts(offsets, grad_y.shape[0])
        grad_x = grad_y.new_empty((grad_y.shape[0], k), dtype=x_dtype) if wants_x else None
        if grad_x is not None:
            grad_x[experts[-1][1].stop if experts else 0 :].zero_()
        grad_weight = self._gradient_of_weight(grad_y, x, offsets) if wants_weight else None
        stored = None if on_gpu.is_on_gpu(grad_y) else self.stored()
        if stored is None:
            return grad_x, grad_weight, *self._backward_one_by_one(
                grad_x, grad_y, x, s, lora_A, lora_B, experts, wants_A, wants_B
            )  # fmt: skip
        given = [False] * num_experts
        if grad_x is not None:
            given = self._given(num_experts, experts, grad_x, 1)
            for e, own in experts:
                if given[e]:
                    matrix = self.matrix(e)
                    assert isinstance(matrix, Tensor)
                    self._multiply(grad_y[own], matrix.T, None, grad_x[own])
        grad_A, grad_B = torch.ops.peft_kernels.grouped_linear_backward(
            grad_x, grad_y, x, s, *stored, self.transposed, offsets.tolist(), given, lora_A, lora_B, self.scaling,
            wants_A, wants_B, compute_dtype=self.compute_dtype,
        )  # fmt: skip
        of_A, of_B = cut_gradients(grad_A, lora_A, wants_A), cut_gradients(grad_B, lora_B, wants_B)
        return grad_x, grad_weight, of_A, of_B

    def _given(self, num_experts: int, experts: Sequence[tuple[int, slice]], x: Tensor, direction: int) -> list[bool]:
        """Whether torch's library makes an expert's product, of a dense weight, faster than the kernels: y (direction
        0) or dx (1), for rows of x [S, K]."""
        given = [False] * num_experts
        if isinstance(self.weight, Tensor):
            one = self.matrix(0)
            assert isinstance(one, Tensor)
            most = _most_own_rows(one, self.compute_dtype, direction)
            known: dict[int, bool] = {}
            for e, own in experts:
                rows = own.stop - own.start
                if rows not in known:
                    known[rows] = rows > most and not owns_product(x[:rows], one, self.compute_dtype)[direction]
                given[e] = known[rows]
        return given

    def _multiply(self, a: Tensor, matrix: Tensor | NF4Weight, bias: Tensor | None, out: Tensor) -> None:
        """`out = a Wᵀ + bias` with a dense W, in compute_dtype."""
        assert isinstance(matrix, Tensor)
        dtype = self.compute_dtype
        with without_autocast(a.device.type):
            operands = a.to(dtype), matrix.to(dtype).T
            result = out if out.dtype is dtype else torch.empty_like(out, dtype=dtype)
            if bias is None:
                torch.mm(*operands, out=result)
            else:
                torch.addmm(bias.to(dtype), *operands, out=result)
            if result is not out:
                out.copy_(result)

    def _forward_one_by_one(self, y: Tensor, x: Tensor, bias: Tensor | None, lora_A: Sequence[Tensor],
                            lora_B: Sequence[Tensor], experts: Sequence[tuple[int, slice]],
                            wants_s: bool) -> Tensor | None:  # fmt: skip
        """By the ops of lora_linear, where those of all experts cannot read the weight, or on a GPU."""
        num_experts = self.sizes[0]
        A, B = a_of_experts(lora_A, num_experts), b_of_experts(lora_B, num_experts)
        s = x.new_zeros((x.shape[0], sum(a.shape[1] for a in A)), dtype=torch.float32) if wants_s else None
        dtypes = self.compute_dtype, self.out_dtype
        for e, own in experts:
            weight, bias_e = self.matrix(e), None if bias is None else bias[e]
            owns = isinstance(weight, Tensor) and owns_product(x[own], weight, self.compute_dtype)[0]
            pairs = [a[e] for a in A], [b[e] for b in B], self.scaling
            y[own], s_e = make_y(x[own], weight, bias_e, *pairs, (), *dtypes, None, wants_s, owns)
            if s is not None and s_e is not None:
                s[own] = s_e
        return s

    def _backward_one_by_one(self, grad_x: Tensor | None, grad_y: Tensor, x: Tensor | None, s: Tensor | None,
                             lora_A: Sequence[Tensor], lora_B: Sequence[Tensor], experts: Sequence[tuple[int, slice]],
                             wants_A: list[bool], wants_B: list[bool],
                             ) -> tuple[list[Tensor | None], list[Tensor | None]]:  # fmt: skip
        num_experts = self.sizes[0]
        A, B = a_of_experts(lora_A, num_experts), b_of_experts(lora_B, num_experts)
        grad_A = [torch.zeros_like(a) if wants else None for a, wants in zip(lora_A, wants_A, strict=True)]
        grad_B = [torch.zeros_like(b) if wants else None for b, wants in zip(lora_B, wants_B, strict=True)]
        x_dtype = grad_y.dtype if grad_x is None else grad_x.dtype
        for e, own in experts:
            weight, x_e, s_e = self.matrix(e), None if x is None else x[own], None if s is None else s[own]
            one = Call(weight, self.compute_dtype, self.out_dtype, self.scaling, ())
            owns = False
            if grad_x is not None and isinstance(weight, Tensor):
                owns = owns_product(grad_x[own], weight, self.compute_dtype)[1]
            arguments = grad_y[own], x_e, x_dtype, s_e, None, None, [a[e] for a in A], [b[e] for b in B]
            of_x, of_A, of_B = one.backward(*arguments, grad_x is not None, wants_A, wants_B, owns)
            if grad_x is not None and of_x is not None:
                grad_x[own] = of_x
            for grads, views, parts in ((grad_A, a_of_experts, of_A), (grad_B, b_of_experts, of_B)):
                for grad, part in zip(grads, parts, strict=True):
                    if grad is not None and part is not None:
                        views([grad], num_experts)[0][e] = part
        return grad_A, grad_B

    def _gradient_of_weight(self, grad_y: Tensor, x: Tensor | None, offsets: Tensor) -> Tensor:
        assert isinstance(self.weight, Tensor) and x is not None
        grad = torch.zeros_like(self.weight)
        for e, own in self.experts(offsets, grad_y.shape[0]):
            operands = (x[own], grad_y[own]) if self.transposed else (grad_y[own], x[own])
            grad[e] = gradient_of_weight(*operands, self.compute_dtype, grad.dtype)
        return grad

    def gradient_of_bias(self, grad_y: Tensor, bias: Tensor, offsets: Tensor) -> Tensor:
        if on_gpu.takes(self.weight, grad_y, not self.transposed, self.compute_dtype):
            ends = offsets.to(grad_y.device, torch.int64).clamp(0, grad_y.shape[0])
            return sum_of_segments(grad_y, ends.cummax(0).values).to(bias.dtype)  # nobody has checked the offsets
        grad = torch.zeros_like(bias)
        for e, own in self.experts(offsets, grad_y.shape[0]):
            grad[e] = grad_y[own].sum(0, dtype=torch.float32)
        return grad


def _most_own_rows(weight: Tensor, compute_dtype: torch.dtype, direction: int) -> int:
    if compute_dtype is not weight.dtype or weight.stride(1) != 1:
        return 0
    if compute_dtype is torch.bfloat16 and cpu.isa() == "amx":
        return _MOST_ROWS_IN_BF16
    if compute_dtype is torch.float32 and direction == 0 and cpu.has_512_bits():
        return _MOST_ROWS_IN_FP32
    return 0


def expert_of_stack(weight: NF4Weight, e: int) -> NF4Weight | Tensor:
    """Expert e of a 4-bit stack [E, N, K]: a weight [N, K] of the same codes, or dense where a block straddles experts.

    Nested statistics are views, too, where an expert has whole blocks of them; otherwise those of this one expert are
    made plain, with the roundings that the format has.
    """
    num_experts, n, k = weight.shape
    size = n * k
    if size % weight.blocksize:
        if size % 8:
            refuse(
                "weight", f"a 4-bit stack of shape {list(weight.shape)}",
                f"experts of whole blocks of {weight.blocksize} elements, or of a multiple of 8",
            )  # fmt: skip
        panel = torch.empty(n, k, dtype=weight.dtype, device=weight.codes.device)
        return dequantize_4bit_rows(replace(weight, shape=(num_experts * n, k)), e * n, panel)
    blocks = size // weight.blocksize
    first = e * blocks
    codes, absmax = weight.codes[e * size // 2 : (e + 1) * size // 2], weight.absmax[first : first + blocks]
    nested = weight.nested
    if nested:
        code, nested_absmax, offset = nested
        if blocks % weight.nested_blocksize:
            owners = torch.arange(first, first + blocks, device=codes.device) // weight.nested_blocksize
            absmax, nested = code[absmax.long()] * nested_absmax[owners] + offset, ()
        else:
            per_expert = blocks // weight.nested_blocksize
            nested = code, nested_absmax[e * per_expert : (e + 1) * per_expert], offset
    return replace(weight, codes=codes, absmax=absmax, shape=(n, k), nested=nested)


def a_of_experts(lora_A: Sequence[Tensor], num_experts: int) -> list[Tensor]:
    """[E, rank, K] of each [E · rank, K]."""
    return [a.unflatten(0, (num_experts, a.shape[0] // num_experts)) for a in lora_A]


def b_of_experts(lora_B: Sequence[Tensor], num_experts: int) -> list[Tensor]:
    """[E, N, rank] of each [N, rank · E]."""
    return [b.unflatten(1, (b.shape[1] // num_experts, num_experts)).permute(2, 0, 1) for b in lora_B]


def gathered(x: Tensor, rows: Tensor | None) -> Tensor:
    return x if rows is None else x.index_select(0, rows)


def sum_of_rows(values: Tensor, rows: Tensor, num_rows: int, dtype: torch.dtype) -> Tensor:
    """`out[rows[i]] += values[i]` in fp32, in the order of i, and rounded once: [num_rows, K]."""
    ordered, order = rows.sort(stable=True)
    return sum_of_segments(values[order], ends_of_runs(ordered, num_rows)).to(dtype)


def ends_of_runs(ordered: Tensor, count: int) -> Tensor:
    """Where each of the numbers below `count` ends in an ascending tensor, which is not waited for: int64 [count]."""
    return torch.searchsorted(ordered, torch.arange(count, dtype=ordered.dtype, device=ordered.device), right=True)


def sum_of_segments(values: Tensor, ends: Tensor) -> Tensor:
    """The sums of the rows up to each end, from the one before it, in fp32 and in their order: [E, K]."""
    lengths = torch.diff(ends, prepend=ends.new_zeros(1))
    return torch.segment_reduce(values.float(), "sum", lengths=lengths, unsafe=True)


class _GroupedLinear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, weight: Tensor | None, rows: Tensor | None, offsets: Tensor,
                call: GroupedCall, num_adapters: int, *adapters: Tensor) -> tuple[Tensor, ...]:  # fmt: skip
        # `weight` repeats call.weight where it is dense, so that autograd sees it.
        lora_A, lora_B = adapters[:num_adapters], adapters[num_adapters:]
        needs_A, needs_B = ctx.needs_input_grad[7 : 7 + num_adapters], ctx.needs_input_grad[7 + num_adapters :]
        y, s = call.forward(gathered(x, rows), bias, lora_A, lora_B, offsets, any(needs_B))
        keeps_x = any(needs_A) or ctx.needs_input_grad[2]
        keeps_weight = ctx.needs_input_grad[0]  # else it may change before the backward
        anchors = anchor(x, ctx.needs_input_grad[0] and not keeps_x and any(needs_B))
        kept = x if keeps_x else None, s, bias, weight if keeps_weight else None, rows, offsets
        ctx.save_for_backward(*kept, *adapters, *anchors)
        ctx.call, ctx.num_adapters, ctx.x_dtype, ctx.num_rows = call, num_adapters, x.dtype, x.shape[0]
        return y, *anchors

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, saved: Sequence[Tensor], grad_y: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, s, bias, _weight, rows, offsets, *adapters = saved[: 6 + 2 * ctx.num_adapters]
        n = ctx.num_adapters
        wants_x, wants_bias, wants_weight = ctx.needs_input_grad[:3]
        wants_A, wants_B = list(ctx.needs_input_grad[7 : 7 + n]), list(ctx.needs_input_grad[7 + n :])
        call = ctx.call
        if x is not None:
            x = gathered(x, rows)
        grad_x, grad_weight, grad_A, grad_B = call.backward(
            grad_y, x, ctx.x_dtype, s, adapters[:n], adapters[n:], offsets, wants_x, wants_weight, wants_A, wants_B
        )
        if wants_x and rows is not None:
            grad_x = sum_of_rows(grad_x, rows, ctx.num_rows, ctx.x_dtype)
        grad_bias = call.gradient_of_bias(grad_y, bias, offsets) if wants_bias else None
        return grad_x, grad_bias, grad_weight, None, None, None, None, *grad_A, *grad_B


@register_fake("grouped_linear_forward")
def _(y: Tensor, x: Tensor, weight: Sequence[Tensor], format: Sequence[int], transposed: bool, offsets: Sequence[int],
      given: Sequence[bool], lora_A: Sequence[Tensor], *arguments: Any, **options: Any) -> Tensor:  # fmt: skip
    return x.new_empty((x.shape[0], sum(a.shape[0] for a in lora_A) // len(offsets)), dtype=torch.float32)


@register_fake("grouped_linear_backward")
def _(grad_x: Tensor | None, grad_y: Tensor, x: Tensor | None, s: Tensor | None, weight: Sequence[Tensor],
      format: Sequence[int], transposed: bool, offsets: Sequence[int], given: Sequence[bool],
      lora_A: Sequence[Tensor], lora_B: Sequence[Tensor], scaling: Sequence[float], wants_A: Sequence[bool],
      wants_B: Sequence[bool], **options: Any) -> tuple[Tensor, ...]:  # fmt: skip
    sizes = (
        sum(a.numel() for a, want in zip(tensors, wanted, strict=True) if want)
        for tensors, wanted in ((lora_A, wants_A), (lora_B, wants_B))
    )
    return tuple(grad_y.new_empty((size,), dtype=torch.float32) for size in sizes)
