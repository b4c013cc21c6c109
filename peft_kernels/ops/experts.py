"""The experts of a mixture with LoRA: `y[t] = Σⱼ routing[t, j] · downₑ(act(gate_upₑ(x[t])))`, where e is index[t, j].

Mixtures of experts: Shazeer et al. 2017 (arXiv:1701.06538). Gated linear units: Shazeer 2020 (arXiv:2002.05202).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from . import _grouped_on_gpu as on_gpu
from ._arguments import bad, check_devices, check_dtype, is_float, named, refuse
from ._autograd import Function, any_wants_gradients, once_differentiable
from ._fakes import register_fake
from ._linear import product_dtypes
from .adapter import activation_name
from .grouped_linear import GroupedCall, Weights, check_stack, ends_of_runs, gathered, grouped_linear, tensors_of

Activation: TypeAlias = str | Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ExpertStack:
    """The linear layers of all experts, as `grouped_linear` takes them, which describes the fields.

    Attributes:
        weight: [E, N, K], dense or an `NF4Weight`; or a sequence of E `NF4Weight`s [N, K].
        bias: [E, N].
        lora_A, lora_B: for each adapter [E · rᵢ, K] and [N, rᵢ · E].
        scaling: a number for each adapter.
        transposed: whether the weight lies as [E, K, N].
    """

    weight: Weights
    bias: Tensor | None = None
    lora_A: Sequence[Tensor] = ()  # noqa: N815
    lora_B: Sequence[Tensor] = ()  # noqa: N815
    scaling: Sequence[float] = ()
    transposed: bool = False


def experts(
    x: Tensor,
    index: Tensor,
    routing_weights: Tensor,
    gate_up: ExpertStack | tuple[ExpertStack, ExpertStack],
    down: ExpertStack,
    activation: Activation = "silu",
    *,
    compute_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """A mixture's block: for each token the weighted sum of the experts that the router chose for it.

    `y[t] = Σⱼ routing_weights[t, j] · downₑ(act(gate_upₑ(x[t])))` with e = index[t, j]. The sum is in fp32 in the order
    of j, and rounded once. Saved for backward: x once, whatever top_k is; the outputs of gate_up; s = x Aᵀ of each LoRA
    branch in fp32; the sort of the rows by expert. What a callable `activation` saves comes in addition.

    Args:
        x: [..., K], fp32, bf16 or fp16.
        index: int32 or int64 [..., top_k], the experts of each token. An index outside 0 to E - 1, such as that of an
            expert of another process, adds nothing to y.
        routing_weights: [..., top_k], fp32, bf16 or fp16.
        gate_up: K inputs and 2 I outputs for a named activation, the gate's first; or one stack for the gate and one
            for `up`, of I outputs each. With a callable it is one stack, of any number of outputs.
        down: I inputs, or as many as the callable returns, and N outputs.
        activation: "silu", or another one of `ACTIVATIONS`, in `act = σ(gate) ⊙ up`; or a callable [rows, outputs of
            gate_up] -> [rows, inputs of down], differentiable by autograd, such as the `_apply_gate` of a block of
            transformers' experts. It is given the rows in the order of the experts, those of no expert last.
        compute_dtype: of the base products; by default x's, or autocast's under it.
        out_dtype: of y; the same.

    Returns:
        [..., N] in out_dtype.

    Raises:
        ValueError: a shape, dtype, device or number that does not fit; it names the argument, what it got and what it
            wanted.
    """
    named_activation = activation_name(activation) if isinstance(activation, str) else None
    if named_activation is None and not callable(activation):
        bad("activation", activation, "a name of ACTIVATIONS, or a callable")
    gates = gate_up if isinstance(gate_up, tuple) else (gate_up,)
    num_experts = _check(x, index, routing_weights, gates, down, named_activation is not None)
    for name, dtype in (("compute_dtype", compute_dtype), ("out_dtype", out_dtype)):
        if dtype is not None:
            check_dtype(name, dtype)
    compute_dtype, out_dtype = product_dtypes(x, compute_dtype, out_dtype)
    flat = x.reshape(-1, x.shape[-1])
    top_k = index.shape[-1]
    sort = sort_by_expert(index.reshape(-1, top_k), num_experts)
    weights = routing_weights.reshape(-1, top_k)
    if named_activation is None:
        hidden = _linear(flat, gates[0], sort.offsets, compute_dtype, sort.rows)
        rows = _linear(activation(hidden), down, sort.offsets, compute_dtype)  # type: ignore[operator]
        y = _Combine.apply(rows, weights, sort.inverse, sort.order, out_dtype)
    else:
        stacks = *gates, down
        call = _Call(
            tuple(_product(stack, compute_dtype) for stack in stacks), named_activation, out_dtype,
            tuple(len(stack.lora_A) for stack in stacks),
        )  # fmt: skip
        trained = [
            tensor
            for stack in stacks
            for tensor in (stack.bias, _dense(stack.weight), *stack.lora_A, *stack.lora_B)
        ]  # fmt: skip
        if any_wants_gradients(flat, weights, *trained):
            y = _Experts.apply(flat, weights, sort.order, sort.inverse, sort.offsets, call, *trained)
        else:
            y = call.forward(flat, weights, sort, trained, [False] * len(trained))[0]
    result: Tensor = y.reshape(*x.shape[:-1], y.shape[-1])
    return result


def _check(
    x: Any, index: Any, routing_weights: Any, gates: tuple[Any, ...], down: Any, is_gated: bool
) -> int:  # fmt: skip
    """Refuses what does not fit; the number of experts."""
    if not is_float(x) or x.dim() == 0:
        bad("x", x, "a float32, bfloat16 or float16 tensor [..., K]")
    if not (isinstance(index, Tensor) and index.dtype in (torch.int32, torch.int64) and index.dim() == x.dim()
            and index.shape[:-1] == x.shape[:-1] and index.shape[-1] > 0):  # fmt: skip
        bad("index", index, f"an int32 or int64 tensor {[*x.shape[:-1], 'top_k']}")
    if not (is_float(routing_weights) and routing_weights.shape == index.shape):
        bad("routing_weights", routing_weights, f"a float32, bfloat16 or float16 tensor {list(index.shape)}")
    if len(gates) != 1 and not (is_gated and len(gates) == 2):
        refuse("gate_up", f"{len(gates)} stacks", "one stack, or two for a named activation")
    sizes = []
    for name, stack in (*(("gate_up", gate) for gate in gates), ("down", down)):
        if not isinstance(stack, ExpertStack):
            bad(name, stack, "an ExpertStack")
        try:
            sizes.append(check_stack(stack.weight, stack.bias, stack.lora_A, stack.lora_B, stack.scaling,
                                     stack.transposed))  # fmt: skip
        except ValueError as error:
            raise ValueError(f"{name}.{error}") from None
        check_devices(x, [(f"{name}.{part}", tensor) for part, tensor in named(
            weight=tensors_of(stack.weight), bias=[stack.bias], lora_A=stack.lora_A, lora_B=stack.lora_B)])  # fmt: skip
    check_devices(x, (("index", index), ("routing_weights", routing_weights)))
    *of_gates, of_down = sizes
    for num_experts, n, k in of_gates:
        if k != x.shape[-1]:
            bad("x", x, f"[..., {k}], for a gate_up of {k} inputs")
        if num_experts != of_down[0]:
            refuse("down", f"{of_down[0]} experts", f"{num_experts}, as gate_up has")
        if is_gated and n * len(gates) != 2 * of_down[2]:
            refuse("gate_up", f"{n} outputs", f"{2 * of_down[2] // len(gates)}, for a down of {of_down[2]} inputs")
    return int(of_down[0])


def _dense(weight: Weights) -> Tensor | None:
    return weight if isinstance(weight, Tensor) else None


def _product(stack: ExpertStack, dtype: torch.dtype) -> GroupedCall:
    return GroupedCall(stack.weight, stack.transposed, tuple(stack.scaling), dtype, dtype)


def _linear(
    x: Tensor, stack: ExpertStack, offsets: Tensor, dtype: torch.dtype, rows: Tensor | None = None
) -> Tensor:  # fmt: skip
    return grouped_linear(
        x, stack.weight, stack.bias, stack.lora_A, stack.lora_B, stack.scaling, offsets, transposed=stack.transposed,
        rows=rows, compute_dtype=dtype, out_dtype=dtype,
    )  # fmt: skip


@dataclass(frozen=True)
class Sort:
    """The pairs (token, j) of `index` [T, top_k] in the order of their experts; those of no expert come last.

    Attributes:
        order: int64 [S], the pair t · top_k + j of each row; the pairs of an expert ascend.
        inverse: int64 [T, top_k], the row of each pair.
        offsets: int64 [E], where the rows of each expert end.
    """

    order: Tensor
    inverse: Tensor
    offsets: Tensor

    @property
    def rows(self) -> Tensor:
        """int64 [S], the token of each row."""
        return self.order // self.inverse.shape[1]


def sort_by_expert(index: Tensor, num_experts: int) -> Sort:
    if not on_gpu.is_on_gpu(index):
        return Sort(*torch.ops.peft_kernels.experts_sort(index.long(), num_experts))
    flat = index.reshape(-1).long()
    flat = torch.where((flat < 0) | (flat >= num_experts), num_experts, flat)
    ordered, order = flat.sort(stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=order.device)
    return Sort(order, inverse.view(index.shape), ends_of_runs(ordered, num_experts))


def _sum(rows: Tensor, inverse: Tensor, weights: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """`y[t] = Σⱼ weights[t, j] · rows[inverse[t, j]]` in fp32, in the order of j; without weights they are one."""
    if not on_gpu.is_on_gpu(rows):
        result: Tensor = torch.ops.peft_kernels.experts_sum(rows, inverse, weights, out_dtype=out_dtype)
        return result
    y = rows.new_zeros((inverse.shape[0], rows.shape[1]), dtype=torch.float32)
    for j in range(inverse.shape[1]):
        part = rows[inverse[:, j]].float()
        y += part if weights is None else part * weights[:, j : j + 1].float()
    return y.to(out_dtype)


def _activate(hidden: Sequence[Tensor], weights: Tensor, order: Tensor, activation: str) -> Tensor:
    """The gated activation of each row times its routing weight."""
    if not on_gpu.is_on_gpu(hidden[0]):
        y: Tensor = torch.ops.peft_kernels.experts_gate_forward(*_gate_and_up(hidden), weights, order, activation)
        return y
    y = torch.ops.peft_kernels.glu_forward(*_gate_and_up(hidden), activation)
    return (y.float() * weights.reshape(-1)[order, None].float()).to(y.dtype)


def _activate_backward(grad: Tensor, hidden: Sequence[Tensor], weights: Tensor, order: Tensor,
                       activation: str) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Of `grad`, the activation's gradient as if all routing weights were one: the gradients of gate and up side by
    side, and in fp32 those of the routing weights."""
    if not on_gpu.is_on_gpu(grad):
        result: tuple[Tensor, Tensor] = torch.ops.peft_kernels.experts_gate_backward(
            grad, *_gate_and_up(hidden), weights, order, activation
        )
        return result
    y = torch.ops.peft_kernels.glu_forward(*_gate_and_up(hidden), activation)
    grad_weights = torch.empty(weights.numel(), dtype=torch.float32, device=y.device)
    grad_weights[order] = (grad.float() * y.float()).sum(1)
    scaled = (grad.float() * weights.reshape(-1)[order, None].float()).to(grad.dtype)
    grads = torch.ops.peft_kernels.glu_backward(scaled, *_gate_and_up(hidden), activation)
    return torch.cat(grads, -1), grad_weights.view(weights.shape)


class _Combine(Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weights: Tensor, inverse: Tensor, order: Tensor, out_dtype: torch.dtype
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(rows if ctx.needs_input_grad[1] else None, weights, inverse, order)
        ctx.dtype = rows.dtype
        return _sum(rows, inverse, weights, out_dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, saved: Sequence[Tensor], grad_y: Tensor) -> tuple[Tensor | None, ...]:
        rows, weights, inverse, order = saved
        grad_rows = grad_weights = None
        grads = gathered(grad_y, order // weights.shape[1])
        if ctx.needs_input_grad[0]:
            grad_rows = (grads.float() * weights.reshape(-1)[order, None].float()).to(ctx.dtype)
        if ctx.needs_input_grad[1]:
            products = (grads.float() * rows.float()).sum(1)
            grad_weights = products[inverse].to(weights.dtype)
        return grad_rows, grad_weights, None, None, None


@dataclass(frozen=True)
class _Call:
    """What a block of a named activation shares between its forward and its backward."""

    products: tuple[GroupedCall, ...]  # of the gate and `up`, in one or two, then of down
    activation: str
    out_dtype: torch.dtype
    num_adapters: tuple[int, ...]

    def parts(self, trained: Sequence[Any]) -> list[tuple[Any, Any, Any, Any]]:
        """(bias, dense weight, lora_A, lora_B) of each product, or what else there is in the place of each."""
        result, first = [], 0
        for count in self.num_adapters:
            bias, weight, *adapters = trained[first : first + 2 + 2 * count]
            result.append((bias, weight, adapters[:count], adapters[count:]))
            first += 2 + 2 * count
        return result

    def forward(self, x: Tensor, weights: Tensor, sort: Sort, trained: Sequence[Tensor | None],
                needs: Sequence[bool]) -> tuple[Tensor, list[Tensor], list[Tensor | None]]:  # fmt: skip
        """Returns y, and for backward the outputs of the gates and s of each product."""
        hidden: list[Tensor] = []
        all_s = []
        rows = gathered(x, sort.rows)
        for i, ((bias, _, A, B), (_, _, _, needs_B)) in enumerate(
            zip(self.parts(trained), self.parts(needs), strict=True)
        ):
            parts = None
            if i == len(self.products) - 1:
                gate, up = _gate_and_up(hidden)
                if A and self.products[i].is_at_once(gate):
                    rows, parts = on_gpu.gate_and_shrink(gate, up, self.activation, A, sort.offsets)
                else:
                    rows = torch.ops.peft_kernels.glu_forward(gate, up, self.activation)
            y, s = self.products[i].forward(rows, bias, A, B, sort.offsets, any(needs_B), parts)
            hidden.append(y)
            all_s.append(s)
        down = hidden.pop()
        return _sum(down, sort.inverse, weights, self.out_dtype), hidden, all_s


def _gate_and_up(hidden: Sequence[Tensor]) -> Sequence[Tensor]:
    return hidden if len(hidden) == 2 else hidden[0].chunk(2, -1)


class _Experts(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, order: Tensor, inverse: Tensor, offsets: Tensor, call: _Call,
                *trained: Tensor | None) -> Tensor:  # fmt: skip
        sort = Sort(order, inverse, offsets)
        y, hidden, all_s = call.forward(x, weights, sort, trained, ctx.needs_input_grad[6:])
        ctx.save_for_backward(x, weights, order, inverse, offsets, *hidden, *all_s, *trained)
        ctx.call = call
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, saved: Sequence[Tensor], grad_y: Tensor) -> tuple[Tensor | None, ...]:
        call, products = ctx.call, ctx.call.products
        x, weights, order, inverse, offsets, *rest = saved
        rows = Sort(order, inverse, offsets).rows
        hidden, rest = rest[: len(products) - 1], rest[len(products) - 1 :]
        all_s, parts = rest[: len(products)], call.parts(rest[len(products) :])
        needs = call.parts(ctx.needs_input_grad[6:])
        needs_x, needs_weights = ctx.needs_input_grad[:2]

        def back(i: int, grad: Tensor, inputs: Tensor | None, s: Tensor | None,
                 needs_inputs: bool) -> tuple[Tensor | None, list[Tensor | None]]:  # fmt: skip
            """The gradients of a product's inputs; and of its weight, its A and its B."""
            needs_weight, needs_A, needs_B = needs[i][1:]
            grad_inputs, grad_weight, grad_A, grad_B = products[i].backward(
                grad, inputs, grad.dtype, s, *parts[i][2:], offsets, needs_inputs, needs_weight, list(needs_A),
                list(needs_B),
            )  # fmt: skip
            return grad_inputs, [grad_weight, *grad_A, *grad_B]

        def reads_inputs(i: int) -> bool:
            return needs[i][1] or any(needs[i][2])

        # The product with W of down is linear in the gradient: it is made of grad_y as it is, so that what it makes
        # also is what the routing weights' gradients are made of, and the output of down need not be kept. Then the
        # routing weights go to the other factors of the gradients of W, A and B.
        last = len(products) - 1
        grads = gathered(grad_y.to(hidden[0].dtype), rows)
        act = _activate(hidden, weights, order, call.activation) if reads_inputs(last) else None
        s = all_s[last]
        if s is not None or needs[last][0]:
            of_rows = weights.reshape(-1)[order, None].float()
        grad_act, of_down = back(last, grads, act, None if s is None else s * of_rows, True)
        del act
        assert grad_act is not None
        bias, grad_bias, of_bias = parts[last][0], None, None
        if bias is not None and needs_weights:
            of_bias = _dots_with_bias(grads, bias, offsets)[inverse]
        if needs[last][0]:
            grad_bias = products[last].gradient_of_bias(grads * of_rows, bias, offsets)
        of_down = [grad_bias, *of_down]
        del grads
        of_hidden, grad_weights = _activate_backward(grad_act, hidden, weights, order, call.activation)
        del grad_act
        if of_bias is not None:
            grad_weights += of_bias
        inputs = gathered(x, rows) if any(reads_inputs(i) for i in range(last)) else None
        grad_x: Tensor | None = None
        of_gates: list[Tensor | None] = []
        for i, grad in enumerate(of_hidden.chunk(last, -1)):
            part, of_gate = back(i, grad, inputs, all_s[i], needs_x)
            grad_x = part if grad_x is None or part is None else grad_x.add_(part)
            bias = parts[i][0]
            of_gates += [products[i].gradient_of_bias(grad, bias, offsets) if needs[i][0] else None, *of_gate]
        if grad_x is not None:
            grad_x = _sum(grad_x, inverse, None, x.dtype)
        of_weights = grad_weights.to(weights.dtype) if needs_weights else None
        return grad_x, of_weights, None, None, None, None, *of_gates, *of_down


def _dots_with_bias(grads: Tensor, bias: Tensor, offsets: Tensor) -> Tensor:
    """Of each row, the product of its gradient and its expert's bias; zero for rows of no expert."""
    owners = torch.bucketize(torch.arange(grads.shape[0], device=grads.device), offsets, right=True)
    dots = (grads.float() * bias.float()[owners.clamp(max=bias.shape[0] - 1)]).sum(1)
    return torch.where(owners < bias.shape[0], dots, 0)


@register_fake("experts_sort")
def _(index: Tensor, num_experts: int) -> tuple[Tensor, ...]:
    return index.new_empty(index.numel()), index.new_empty(index.shape), index.new_empty(num_experts)


@register_fake("experts_sum")
def _(rows: Tensor, inverse: Tensor, weights: Tensor | None, out_dtype: torch.dtype | None = None) -> Tensor:
    return rows.new_empty((inverse.shape[0], rows.shape[1]), dtype=out_dtype)


@register_fake("experts_gate_forward")
def _(gate: Tensor, up: Tensor, weights: Tensor, order: Tensor, activation: str) -> Tensor:
    return gate.new_empty(gate.shape)


@register_fake("experts_gate_backward")
def _(grad: Tensor, gate: Tensor, up: Tensor, weights: Tensor, order: Tensor,
      activation: str) -> tuple[Tensor, Tensor]:  # fmt: skip
    grads = gate.new_empty((gate.shape[0], 2 * gate.shape[1]))
    return grads, weights.new_empty(weights.shape, dtype=torch.float32)
