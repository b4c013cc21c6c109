"""The experts of a mixture below LoRA: what a fused class of experts is called with for the adapters on its stacks.

A stack is a parameter that has the weights of all experts: [E, N, K], or [E, K, N] where a class says so. It is dense,
or in bitsandbytes' 4-bit storage, which a parametrization decodes for the stock layer.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..cuda import why_not
from ..inference.guards import HOOKS, parameter
from ..ops._arguments import FLOAT_DTYPES, autocast_dtype
from ..ops.experts import ExpertStack
from ..ops.nf4 import NF4Weight
from .base_layer import why_not_weight
from .refusal import Refusal
from .registry import FusedLayer


class StackAdapters(NamedTuple):
    """LoRA on one stack.

    Attributes:
        lora_A, lora_B, scaling: for each active adapter, as PEFT has them: A's rows have the expert slowest, and B's
            columns have it fastest. To an expert's part of the stored parameter they add `scaling · B A` where
            `swapped`, and `scaling · Aᵀ Bᵀ` otherwise.
        swapped: which of the two it is.
    """

    lora_A: Sequence[Tensor]  # noqa: N815
    lora_B: Sequence[Tensor]  # noqa: N815
    scaling: Sequence[float]
    swapped: bool


Adapted = Mapping[str, StackAdapters]  # by the names of the parameters


class FusedExperts(FusedLayer):
    """Experts that can be computed with LoRA on their stacks."""

    family = "experts"
    takes_parametrizations = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        y = self.adapted({}, *args, **kwargs)
        return self.take_stock_path(y.reason, *args, **kwargs) if isinstance(y, Refusal) else y

    def adapted(self, adapters: Adapted, *args: Any, **kwargs: Any) -> Tensor | Refusal:
        """What the layer returns for these arguments with these adapters; or why only the stock layer can say."""
        raise NotImplementedError

    def stack_names(self) -> Sequence[str]:
        """The parameters that are stacks, in the order in which x goes through them."""
        raise NotImplementedError

    def why_stock(self) -> str | None:
        for name in self.stack_names():
            weight = _stored(self, name)
            if isinstance(weight, Refusal):
                return weight.reason
            if reason := why_not(_memory(weight).device):
                return reason
        return super().why_stock()

    def stacks(
        self,
        adapters: Adapted,
        x: Tensor,
        *others: Tensor,
        has_bias: bool = False,
        transposed: bool = False,
        casts: bool = False,
    ) -> tuple[list[ExpertStack], torch.dtype] | Refusal:
        """What the fused operations are called with for the stacks, and the dtype of products; or why they can't be.

        Args:
            others: inputs that have to be where x is.
            has_bias: whether each stack has a parameter with the biases [E, N].
            transposed: whether they are stored as [E, K, N].
            casts: whether the dtype is the stacks', whatever x has, and under autocast too.
        """
        found, dtypes, tensors = [], [], list(others)
        for name in self.stack_names():
            weight = _stored(self, name)
            bias = _stored(self, f"{name}_bias", 2) if has_bias else None
            if isinstance(weight, Refusal):
                return weight
            if isinstance(bias, Refusal):
                return bias
            if isinstance(bias, NF4Weight):
                return Refusal(f"its {name}_bias is in 4 bits")
            lora_A, lora_B, scaling, swapped = adapters.get(name, _NO_ADAPTERS)
            if swapped is transposed:  # they were made for the stack as if it were stored the other way
                pairs = [_exchanged(a, b, weight.shape[0]) for a, b in zip(lora_A, lora_B, strict=True)]
                lora_A, lora_B = [a for a, _ in pairs], [b for _, b in pairs]
            found.append(ExpertStack(weight, bias, lora_A, lora_B, scaling, transposed))
            dtypes.append(weight.dtype)
            tensors += [_memory(weight), *lora_A, *lora_B, *(() if bias is None else (bias,))]
        if any(tensor.device != x.device for tensor in tensors):
            return Refusal(f"x is on {x.device.type}, and not all that it goes through")
        if reason := why_not(x.device):
            return Refusal(reason)
        if any(dtype is not dtypes[0] for dtype in dtypes):
            return Refusal(f"its stacks are {' and '.join(map(str, dtypes))}")
        autocast = None if casts else autocast_dtype(x)
        if not casts and autocast is None and x.dtype is not dtypes[0]:
            return Refusal("x and its stacks differ in dtype")  # which is an error
        return found, autocast or dtypes[0]


_NO_ADAPTERS = StackAdapters((), (), (), swapped=True)


def _stored(module: nn.Module, name: str, dim: int = 3) -> Tensor | NF4Weight | Refusal:
    """A stack as it lies in memory; or why it can't be used so."""
    parametrizations = module._modules.get("parametrizations")
    if parametrizations is not None and name in parametrizations._modules:
        found: Any = parametrizations._modules[name]
        module_4bit = sys.modules.get("bitsandbytes.nn.parametrize")
        if module_4bit is None or len(found) != 1 or type(found[0]) is not module_4bit.Bnb4bitParametrization:
            return Refusal(f"its {name} has a parametrization")
        quant_state = found[0].quant_state
        if quant_state.dtype not in FLOAT_DTYPES or len(quant_state.shape) != dim:
            return Refusal(f"its {name} is {quant_state.dtype} {list(quant_state.shape)}")
        try:
            return NF4Weight.from_quant_state(found.original, quant_state)
        except ValueError as error:  # as of statistics that stay where they are when a model is moved
            return Refusal(f"its {name}: {error}")
    weight = parameter(module, name) if name in module._parameters else getattr(module, name, None)
    if not isinstance(weight, Tensor):
        return Refusal(f"it has no {name}")
    if weight.dim() != dim:  # as while ZeRO has its parts elsewhere
        return Refusal(f"its {name} has {weight.dim()} dimensions")
    reason = why_not_weight(weight)
    return weight if reason is None else Refusal(reason)


def _memory(weight: Tensor | NF4Weight) -> Tensor:
    return weight.codes if isinstance(weight, NF4Weight) else weight


def _exchanged(a: Tensor, b: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Factors A and B, of the same layouts, with the product `(B A)ᵀ` for each expert."""
    new_A = b.unflatten(1, (-1, num_experts)).permute(2, 1, 0).flatten(0, 1)
    new_B = a.unflatten(0, (num_experts, -1)).permute(2, 1, 0).flatten(1, 2)
    return new_A, new_B


def why_not_skip_experts(module: nn.Module) -> str | None:
    """What is attached to experts that would be left out by not calling them: `why_not_skip`, but for the hooks that
    have bitsandbytes decode a stack once in a forward."""
    module_4bit, state = sys.modules.get("bitsandbytes.nn.parametrize"), vars(module)
    own: tuple[Any, ...] = ()
    if module_4bit is not None:
        own = module_4bit._enable_parametrization_cache, module_4bit._disable_parametrization_cache
    if any(hook not in own for hooks in HOOKS for hook in state[hooks].values()):
        return "hooks"
    return "a forward that was replaced on the instance" if "forward" in state else None
