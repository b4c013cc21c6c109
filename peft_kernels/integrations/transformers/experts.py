"""The experts of transformers' mixtures, fused: sort, both products with LoRA, gate, routing weights and sum.

transformers gives classes of experts one forward, which calls one of the functions that `ALL_EXPERTS_FUNCTIONS` has
under the configuration's `experts_implementation`; what these compute, they read off the class. Such a class is known
by this forward. The class's own lines, which are `eager`, are compared with those of models that are known.
"""

from __future__ import annotations

import dis
import functools
import importlib
import itertools
import sys
from collections.abc import Sequence
from types import CodeType, FunctionType
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...ops._arguments import autocast_dtype
from ...ops.experts import Activation, ExpertStack, experts
from ...ops.glu import glu
from ...ops.grouped_linear import grouped_linear
from ..base_layer import why_not_skip
from ..experts import Adapted, FusedExperts
from ..recognition import Reliance, is_compiling, is_filed_closure, same_methods
from ..refusal import Refusal
from ..registry import why_not_input
from .layers import activation_name
from .lookalike import Lookalike, form

_MODULE = "transformers.integrations.moe"
_DISPATCH = "use_experts_implementation.<locals>.wrapper.<locals>.forward"
_INTERFACE = "ALL_EXPERTS_FUNCTIONS"
# The functions of it that compute the same, in other orders, and the gate of classes without one of their own.
_IMPLEMENTATIONS = {name: f"{name}_experts_forward" for name in ("grouped_mm", "batched_mm")}
_GATE = "_default_apply_gate"
# What these may read of the experts. One that reads more has something to compute that is not known here.
_ATTRIBUTES = {
    *("num_experts", "gate_up_proj", "gate_up_proj_bias", "up_proj", "up_proj_bias", "down_proj", "down_proj_bias"),
    *("has_gate", "has_bias", "is_transposed", "has_post_expert_norm", "post_expert_norm", "_is_expert_parallel"),
    *("_apply_gate", "act_fn"),
}

# Compiled code calls them between two graphs: the numbers of rows that the experts have are known to the host alone.
_experts_between_graphs, _linear_between_graphs = map(torch.compiler.disable, (experts, grouped_linear))


class _Lines(NamedTuple):
    """What a model's own lines compute, of which those functions ask the class."""

    class_name: str
    is_transposed: bool = False
    has_bias: bool = False
    calls_gate: bool = False  # `_apply_gate`; otherwise they have the default one written out


# Models whose own lines compute what those functions do.
_EAGER = {
    "mixtral": _Lines("MixtralExperts"),
    "aria": _Lines("AriaExperts", is_transposed=True),
    "deepseek_v4": _Lines("DeepseekV4Experts", calls_gate=True),
    "gpt_oss": _Lines("GptOssExperts", is_transposed=True, has_bias=True, calls_gate=True),
}


class _Experts(FusedExperts, Lookalike):
    """Experts that are called with a number of arguments."""

    num_arguments: ClassVar[int]

    def adapted(self, adapters: Adapted, *args: Any, **kwargs: Any) -> Tensor | Refusal:
        if kwargs or len(args) != self.num_arguments:
            return Refusal("arguments were given by their names" if kwargs else f"{len(args)} arguments were given")
        if is_compiling() and not adapters:
            return Refusal("torch.compile has one graph of the stock layer")
        reason = None if self.reliance.holds() else self.reliance.why_not()
        reason = reason or self.why_not_formula() or why_not_input(args[0])
        return self.computed(adapters, *args) if reason is None else Refusal(reason)

    def computed(self, adapters: Adapted, *args: Any) -> Tensor | Refusal:
        """`adapted`, where the formula is known and x can be taken."""
        raise NotImplementedError

    def why_not_formula(self) -> str | None:
        """Why the stock forward computes something else."""
        return None

    def why_stock(self) -> str | None:
        return self.reliance.why_not() or self.why_not_formula() or super().why_stock()


class _Mixture(_Experts):
    """The stock experts in one operation, which keeps x once and rounds less often. No stack is added to, and none in 4
    bits is made dense."""

    num_arguments = 3
    has_gate: bool
    has_bias: bool
    is_transposed: bool

    def stack_names(self) -> Sequence[str]:
        return "gate_up_proj" if self.has_gate else "up_proj", "down_proj"

    def computed(self, adapters: Adapted, *args: Any) -> Tensor | Refusal:
        x, index, routing_weights = args
        if reason := why_not_input(routing_weights):
            return Refusal(reason)
        if not x.dim() == index.dim() == routing_weights.dim() == 2:
            return Refusal("its inputs are no matrices")
        found = self.stacks(
            adapters, *args, has_bias=self.has_bias, transposed=self.is_transposed, casts=self.casts()
        )  # fmt: skip
        if isinstance(found, Refusal):
            return found
        (up, down), dtype = found
        function = _experts_between_graphs if is_compiling() else experts
        return function(x, index, routing_weights, up, down, self.activation(), compute_dtype=dtype, out_dtype=x.dtype)

    def casts(self) -> bool:
        """Whether the products are in the stacks' dtype, whatever x has, and under autocast too."""
        return False

    def activation(self) -> Activation:
        """What is between the products."""
        gate: Activation = self._apply_gate
        return gate


@form
class FusedMixture(_Mixture):
    __doc__ = _Mixture.__doc__

    methods = ()  # the class is known by the forward that it was given

    @classmethod
    def filed_key(cls) -> tuple[Any, ...]:
        return ()

    @classmethod
    def does_the_same(cls, stock: type) -> bool:
        module, forward = sys.modules.get(_MODULE), getattr(stock, "forward", None)
        if module is None or not isinstance(forward, FunctionType) or not is_filed_closure(forward, module, _DISPATCH):
            return False
        cells = dict(zip(forward.__code__.co_freevars, forward.__closure__ or (), strict=True))
        return cells["experts_interface"].cell_contents is vars(module).get(_INTERFACE)

    @classmethod
    def relies_on(cls, stock: type) -> Reliance:
        return Reliance.of_globals(sys.modules[_MODULE], *_IMPLEMENTATIONS.values(), _GATE)

    def computed(self, adapters: Adapted, *args: Any) -> Tensor | Refusal:
        is_eager = self.config._experts_implementation not in _IMPLEMENTATIONS
        if is_eager and self.has_bias and autocast_dtype(args[0]):
            return Refusal("its class's lines add biases of more bits than autocast's")
        return super().computed(adapters, *args)

    def casts(self) -> bool:
        return bool(self.config._experts_implementation == "grouped_mm")

    def why_not_formula(self) -> str | None:
        if self._is_expert_parallel:
            return "it has a part of the experts"
        if getattr(self, "has_post_expert_norm", False):
            return "a norm follows its experts"
        name = self.config._experts_implementation
        if name in _IMPLEMENTATIONS:
            module = sys.modules[_MODULE]
            found = vars(module)[_INTERFACE].get(name)
            if found is None or found is not vars(module).get(_IMPLEMENTATIONS[name]):
                return f"{name} of {_INTERFACE} was replaced"
            return None if _is_known(name) else f"this version of transformers has another {name}"
        if name not in ("eager", None):
            return f"its experts_implementation is {name}"
        stock: Any = self.stock
        lines = _lines(stock)
        if lines is None:
            return "its experts_implementation is eager, and its class's lines are no model's that is known"
        flags = self.has_gate, self.is_transposed, self.has_bias
        if flags != (True, *lines[1:3]) or not (lines.calls_gate or self._has_default_gate()):
            return "its experts_implementation is eager, and its class's lines are not what it says of them"
        return None

    def activation(self) -> Activation:
        activation: Activation | None = None
        if not self.has_gate:
            activation = self.act_fn
        elif self._has_default_gate():
            activation = _name(self.act_fn)
        return activation or super().activation()

    def _has_default_gate(self) -> bool:
        return "_apply_gate" not in vars(self) and _is_default_gate(self.stock)


class _OfOneModel(_Experts):
    """Experts with but their own lines. Their model is not imported to see whether others have these."""

    @classmethod
    def filed_key(cls) -> tuple[Any, ...] | None:
        is_loaded = f"transformers.models.{cls.model_type}.modeling_{cls.model_type}" in sys.modules
        return super().filed_key() if is_loaded else None


@form
class FusedStep3p7Experts(_OfOneModel, _Mixture):
    __doc__ = _Mixture.__doc__

    model_type, class_name, methods = "step3p7", "Step3p7Experts", ("forward", "_apply_gate")
    has_gate, has_bias, is_transposed = True, False, False


@form
class FusedLlama4Experts(_OfOneModel):
    """The stock experts, each of which has all tokens, in three operations."""

    model_type, class_name, num_arguments = "llama4", "Llama4TextExperts", 1

    def stack_names(self) -> Sequence[str]:
        return "gate_up_proj", "down_proj"

    def computed(self, adapters: Adapted, *args: Any) -> Tensor | Refusal:
        (x,) = args
        found = self.stacks(adapters, x, transposed=True)
        if isinstance(found, Refusal):
            return found
        (up, down), dtype = found
        num_experts = self.num_experts
        rows = x.reshape(-1, self.hidden_size)
        each, rest = divmod(rows.shape[0], num_experts)
        if rest:
            return Refusal("x has no equal parts for the experts")  # which is an error
        offsets = torch.arange(1, num_experts + 1, device=x.device) * each
        gate, up_rows = _product(rows, up, offsets, dtype).chunk(2, -1)
        name = _name(self.act_fn)
        hidden = glu(gate, up_rows, name) if name else up_rows * self.act_fn(gate)
        return _product(hidden, down, offsets, dtype)


@form
class FusedParallelExperts(_OfOneModel):
    """The stock experts' product in one operation."""

    model_type, class_name, num_arguments = "jetmoe", "JetMoeParallelExperts", 2

    def stack_names(self) -> Sequence[str]:
        return ("weight",)

    def computed(self, adapters: Adapted, *args: Any) -> Tensor | Refusal:
        x, sizes = args
        found = self.stacks(adapters, x)
        if isinstance(found, Refusal):
            return found
        (stack,), dtype = found
        if not isinstance(sizes, list) or len(sizes) != self.num_experts or x.dim() != 2:
            return Refusal("its inputs are not a matrix and the number of rows of each expert")
        offsets = torch.tensor(sizes, device=x.device).cumsum(0)
        return _product(x, stack, offsets, dtype)


def _product(x: Tensor, stack: ExpertStack, offsets: Tensor, dtype: torch.dtype) -> Tensor:
    """The experts' linear layers on the rows that are their own, as PEFT adapts them."""
    function = _linear_between_graphs if is_compiling() else grouped_linear
    return function(
        x, stack.weight, stack.bias, stack.lora_A, stack.lora_B, stack.scaling, offsets,
        transposed=stack.transposed, compute_dtype=dtype, out_dtype=dtype,
    )  # fmt: skip


def _name(activation: Any) -> str | None:
    """What `experts` calls an activation; None if it has none of it, or something is attached to it."""
    if activation is F.silu:
        return "silu"
    is_module = isinstance(activation, nn.Module)
    return activation_name(activation) if is_module and why_not_skip(activation) is None else None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch's has no types
def _is_default_gate(stock: Any) -> bool:
    return stock._apply_gate is vars(sys.modules[_MODULE])[_GATE]


@functools.cache
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _is_known(implementation: str) -> bool:
    """Whether one of `_IMPLEMENTATIONS` asks the experts for nothing new."""
    attributes = _attributes(vars(sys.modules[_MODULE])[_IMPLEMENTATIONS[implementation]].__code__)
    return attributes is not None and attributes <= _ATTRIBUTES


@functools.cache
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _lines(stock: type) -> _Lines | None:
    """What the lines of a class compute, if they are those of a model that is known, and still in use."""
    for model, lines in _EAGER.items():
        try:
            module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
        except ImportError:  # it is newer than this version of transformers
            continue
        if same_methods(stock, module, lines.class_name, ("forward",)):
            return lines if Reliance.of_methods(stock, ("forward",)).why_not() is None else None
    return None


def _attributes(code: CodeType) -> frozenset[str] | None:
    """What code reads of its first argument; None if it does anything else with it."""
    name, found = code.co_varnames[0], set()
    steps = [step for step in dis.get_instructions(code) if step.opname not in ("CACHE", "EXTENDED_ARG")]
    for step, following in itertools.pairwise(steps):
        names = step.argval if isinstance(step.argval, tuple) else (step.argval,)
        if name not in names or "FAST" not in step.opname:
            continue
        is_last = step.opname.startswith("LOAD_FAST") and names[-1] == name and names.count(name) == 1
        if not is_last or following.opname not in ("LOAD_ATTR", "LOAD_METHOD"):
            return None
        found.add(following.argval)
    return frozenset(found)
