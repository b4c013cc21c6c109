"""RMSNorm and the gated feed-forward block of transformers' models, fused.

transformers writes the same lines out in each model's file, under the model's name. So a class is known by what it
does: its methods have to have the code of one of the few classes that are named here. In transformers 5.24 that is so
for 177 classes of norms and 136 of blocks.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers.activations import GELUActivation, GELUTanh, NewGELUActivation, SiLUActivation

from ..cuda import why_not
from ..ops.glu import glu
from ..ops.rms_norm import rms_norm
from .linear import parameter, why_not_skip
from .registry import FLOAT_DTYPES, FusedLayer, register, why_not_input

# What `glu` calls the σ of each class of activations.
_ACTIVATIONS: dict[type[nn.Module], str] = {
    SiLUActivation: "silu", nn.SiLU: "silu", nn.ReLU: "relu", nn.Tanh: "tanh", GELUActivation: "gelu",
    GELUTanh: "gelu_tanh", NewGELUActivation: "gelu_tanh",
}  # fmt: skip


class Lookalike(FusedLayer):
    """A fused layer for every stock class that has the code of one.

    Attributes:
        model: a type of models, whose module of transformers has the class.
        class_name: of the class.
        methods: that have to have the same code.
    """

    model: ClassVar[str]
    class_name: ClassVar[str]
    methods: ClassVar[tuple[str, ...]] = ("forward",)

    @classmethod
    def fits(cls, stock: type) -> bool:
        module = importlib.import_module(f"transformers.models.{cls.model}.modeling_{cls.model}")
        wanted = _code(getattr(module, cls.class_name), cls.methods)
        return wanted is not None and _code(stock, cls.methods) == wanted

    @classmethod
    def made_for(cls, stock: type) -> type:
        """The fused class of a stock class. Its qualified name leads `__getattr__` back to the stock class, when a
        pickled model asks for it."""
        members = {"__doc__": cls.__doc__, "__module__": __name__}
        made = type(stock.__name__, (cls, stock), members)
        made.__qualname__ = f"{stock.__module__.replace('.', '/')}:{stock.__qualname__}"
        globals()[made.__qualname__] = made
        return register(made)


class FusedRMSNorm(Lookalike):
    """The stock layer in one operation. Here the stock layer rounds twice, what is normalised and its product."""

    model, class_name = "llama", "LlamaRMSNorm"
    eps_name: ClassVar[str] = "variance_epsilon"
    offset: ClassVar[float] = 0.0

    def forward(self, hidden_states: Tensor) -> Tensor:
        weight = parameter(self, "weight")
        if reason := why_not_both(hidden_states, weight):
            self.log_stock_path(reason)
            return super().forward(hidden_states)
        eps, out_dtype = getattr(self, self.eps_name), self.out_dtype(hidden_states, weight)
        return rms_norm(hidden_states, weight, eps, offset=self.offset, out_dtype=out_dtype)

    def why_stock(self) -> str | None:
        weight = self.weight
        return why_not(weight.device) if weight.dtype in FLOAT_DTYPES else f"its weight is {weight.dtype}"

    @staticmethod
    def out_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
        """What the stock layer returns."""
        return torch.promote_types(x.dtype, weight.dtype)


class FusedRMSNormRoundedLast(FusedRMSNorm):
    """The stock layer in one operation. It rounds the product alone, to x's dtype."""

    model, class_name = "olmo2", "Olmo2RMSNorm"

    @staticmethod
    def out_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
        return x.dtype


class FusedRMSNormWithOffset(FusedRMSNormRoundedLast):
    """The stock layer in one operation. Its weight is the difference from 1."""

    model, class_name, methods = "gemma", "GemmaRMSNorm", ("forward", "_norm")
    eps_name, offset = "eps", 1.0


class FusedT5LayerNorm(FusedRMSNorm):
    """The stock layer, which has no mean and no bias, in one operation."""

    model, class_name = "t5", "T5LayerNorm"

    @staticmethod
    def out_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
        return weight.dtype


class FusedGatedMLP(Lookalike):
    """The stock block, in which σ and the product with what it gates are one operation."""

    model, class_name = "llama", "LlamaMLP"

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        reason = why_not_both(gate, up) or why_not_activation(self.act_fn)
        if not reason and (gate.dtype is not up.dtype or gate.shape != up.shape):
            reason = "the gate and what it gates differ in dtype or shape"
        if reason:
            self.log_stock_path(reason)
            return self.down_proj(self.act_fn(gate) * up)
        return self.down_proj(glu(gate, up, _ACTIVATIONS[type(self.act_fn)]))

    def why_stock(self) -> str | None:
        weight = next(self.parameters(), None)
        return why_not_activation(self.act_fn) or (None if weight is None else why_not(weight.device))


def why_not_both(x: Tensor, other: Tensor) -> str | None:
    """Why no fused operation can take both."""
    if reason := why_not_input(x):
        return reason
    if other.dtype not in FLOAT_DTYPES or type(other).__name__ == "DTensor":
        return f"an operand is {other.dtype}, a {type(other).__name__}"
    device = x.device
    return why_not(device) if other.device == device else f"operands are on {device.type} and {other.device.type}"


def why_not_activation(activation: nn.Module) -> str | None:
    """Why `glu` can't do what an activation does."""
    if type(activation) not in _ACTIVATIONS:
        return f"its activation is a {type(activation).__name__}"
    reason = why_not_skip(activation)
    return reason and f"{reason} on its activation"


_FORMS: tuple[type[Lookalike], ...] = (
    FusedRMSNorm, FusedRMSNormRoundedLast, FusedRMSNormWithOffset, FusedT5LayerNorm, FusedGatedMLP,
)  # fmt: skip


def register_loaded() -> None:
    """Registers the classes of the models that have been imported by now."""
    for stock in list(_classes()):
        if stock not in _seen:
            _seen.add(stock)
            fused = next((form for form in _FORMS if form.fits(stock)), None)
            if fused is not None:
                fused.made_for(stock)


_seen: set[type] = set()


def _classes() -> Iterator[type]:
    for name, module in list(sys.modules.items()):
        if ".modeling_" in name:
            for value in list(vars(module).values()):
                if isinstance(value, type) and issubclass(value, nn.Module) and value.__module__ == name:
                    yield value  # by its name in the module, under which a pickled one is looked for


def _code(stock: type, methods: tuple[str, ...]) -> list[tuple] | None:
    """What methods of a class do, to be compared; None if one is not what the file of the class says."""
    file = getattr(sys.modules.get(stock.__module__), "__file__", None)
    codes = []
    for method in methods:
        function = getattr(stock, method, None)
        if not inspect.isfunction(function) or function.__closure__ or function.__code__.co_filename != file:
            return None
        code = function.__code__
        constants = tuple(constant for constant in code.co_consts if constant != function.__doc__)
        codes.append((code.co_code, constants, code.co_names, code.co_varnames, code.co_argcount))
    return codes


def __getattr__(name: str) -> type:
    module, _, class_name = name.partition(":")
    if class_name:
        stock = getattr(importlib.import_module(module.replace("/", ".")), class_name)
        register_loaded()
        if name in globals():
            return globals()[name]
        raise AttributeError(f"{stock.__module__}.{class_name} has no fused form")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
