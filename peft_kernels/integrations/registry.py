"""The one table of layers that have a fused form: class → fused class → the reason when a layer can't take it.

A fused class is a subclass of the stock class, under the same name, that adds no state of its own worth saving.
`optimize` assigns it to the instance's `__class__`. So everything but the overridden methods is the stock layer's
own (parameters, names, state_dict, hooks, isinstance, `type(layer).__name__`), a copied or pickled layer stays fused,
and `restore` is the same assignment the other way round.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..choices import Choice
from ..ops._arguments import FLOAT_DTYPES
from .sharding import class_below, rederived

_logger = logging.getLogger("peft_kernels")
_logged: set[tuple[type, str]] = set()


if TYPE_CHECKING:

    class _Mixin(nn.Module):
        """A mixin is a module, with parts and attributes of its own, only by the stock class that it extends."""

        _modules: dict[str, Any]

        def __getattr__(self, name: str) -> Any: ...

else:
    _Mixin = object


# What fused layers are switched by.
Family = Literal[
    "lora", "ia3", "prefix", "linear4bit", "linear", "experts", "attention", "rms_norm", "gated_mlp", "gelu", "dropout",
    "decoder_layer", "output_layer", "cross_entropy",
]  # fmt: skip


# Attributes where an instance may keep a method of its class, and the name of that method.
_KEPT = {
    "forward": "forward",
    "_old_forward": "forward",
    "prepare_inputs_for_generation": "prepare_inputs_for_generation",
}


class Trial(NamedTuple):
    """How a layer is timed.

    Attributes:
        layer: the layer itself, or what it does beside its parts; it is copied before it is called.
        width: K of its inputs [rows, K].
        dtype, device: of these. None stands for any dtype, and for the model's device.
        weight: [N, K] of a weight in 4 bits.
        stock: what it is timed against, if that is not the layer as `restore` leaves it.
        details: what its time depends on besides its class, its parameters and its inputs.
    """

    layer: nn.Module
    width: int
    dtype: torch.dtype | None
    device: torch.device | None
    weight: tuple[int, ...] | None = None
    stock: nn.Module | None = None
    details: str = ""


class Measured(_Mixin):
    """A layer whose stock forward may be the faster one here, for inputs of some sizes."""

    stock: ClassVar[type[nn.Module]]
    _choice: Choice | None = None  # as `optimize` found it; None where the fused forward is taken

    def trial(self) -> Trial | None:
        """How to time it; None where that takes more than an input."""
        return None

    def stock_result(self, *args: Any, **kwargs: Any) -> Tensor:
        """What the stock forward returns."""
        y: Tensor = self.stock.forward(self, *args, **kwargs)
        return y

    def stock_is_faster(self, x: Tensor) -> bool:
        """Whether x takes the stock forward for that reason."""
        choice = self._choice
        return choice is not None and isinstance(x, Tensor) and choice.is_stock(x, self.training)


class FusedLayer(Measured):
    """What a fused class adds to the stock class that it extends; its bases are a mixin of this kind and the stock."""

    family: ClassVar[Family]
    stock_forward: ClassVar[Callable[..., Any] | None]  # what the stock class had for it when this one was made
    # Attributes that exist only on a fused instance, and that `restore` drops.
    own_state: ClassVar[tuple[str, ...]] = ()
    is_layer: ClassVar[bool] = True  # as the report has them, and not what is fused of the model around them
    takes_parametrizations: ClassVar[bool] = False  # torch's, of parameters: whether its forward knows of them
    keeps_logits: ClassVar[bool] = True  # or is only for a model whose outputs may be without them

    @classmethod
    def applies(cls, layer: nn.Module) -> bool:
        """Whether the stock layer does what can be fused at all. One that does not is as one without a fused class."""
        return True

    @classmethod
    def why_not(cls, layer: nn.Module) -> str | None:
        """Why this stock layer can't be fused, whatever its adapters and its input."""
        return None

    def prepare(self) -> str:
        """Runs at every `optimize`, when all layers that can be fused are; a remark for the report."""
        return ""

    def why_not_restore(self) -> str | None:
        """Why the layer can't have its stock forward back now."""
        return None

    def release(self) -> None:
        """Undoes what the layer has done outside of itself; `restore` calls it first."""

    def why_stock(self) -> str | None:
        """Why the next forward would take the stock path, so far as it can be known without the input."""
        return None

    def take_stock_path(self, reason: str, *args: Any, **kwargs: Any) -> Tensor:
        """What the stock layer returns, which a forward falls through to."""
        self.log_stock_path(reason)
        return self.stock_result(*args, **kwargs)

    def log_stock_path(self, reason: str) -> None:
        """Says once for each class and reason that a forward fell through; the report can't know of these."""
        key = (type(self), reason)
        if key not in _logged and not torch.compiler.is_compiling():
            _logged.add(key)
            _logger.warning("a %s takes its stock forward: %s", describe(type(self)), reason)


class Caching(FusedLayer):
    """One that keeps what it derives from its tensors; a copy of the layer begins without it, and so does a layer that
    is moved, which would hold on to memory otherwise."""

    derived: ClassVar[tuple[str, ...]] = ()  # attributes, which `restore` drops as well

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in self.derived}

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self.forget()
        return super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]  # torch's has no types

    def release(self) -> None:
        self.forget()
        super().release()

    def forget(self) -> None:
        for name in self.derived:
            vars(self).pop(name, None)


class Setting:
    """Something that is set on a module, whose class stays; its methods are given the module."""

    family: ClassVar[Family]
    remark: ClassVar[str]  # what is fused by it, for the report

    @classmethod
    def applies(cls, module: nn.Module) -> bool:
        """Whether it can be set on the module, or is."""
        raise NotImplementedError

    @classmethod
    def why_not(cls, module: nn.Module) -> str | None:
        """Why it can't be set on a module that it is for, or does nothing where it is set."""
        return None

    @classmethod
    def is_set(cls, module: nn.Module) -> bool:
        raise NotImplementedError

    @classmethod
    def set(cls, module: nn.Module) -> None:
        raise NotImplementedError

    @classmethod
    def unset(cls, module: nn.Module) -> None:
        raise NotImplementedError


Fused = TypeVar("Fused", bound=type[FusedLayer])
AnySetting = TypeVar("AnySetting", bound=type[Setting])

_table: dict[type[nn.Module], type[FusedLayer]] = {}
_refused: dict[type[nn.Module], tuple[str, bool]] = {}
_settings: list[type[Setting]] = []
_mentioned: list[type] = []


def register(fused: Fused) -> Fused:
    """Class decorator: enters a fused class into the table under the stock class that it extends."""
    fused.stock = fused.__bases__[-1]
    fused.stock_forward = fused.stock.forward
    _table[fused.stock] = fused
    return fused


def refuse(stock: type[nn.Module], reason: str | None, keeps_logits: bool = True) -> None:
    """Has the report say why a class has no fused form, one that keeps logits or not, for now; None takes it back."""
    if reason is None:
        _refused.pop(stock, None)
    else:
        _refused[stock] = reason, keeps_logits


def register_setting(setting: AnySetting) -> AnySetting:
    """Class decorator: has `optimize` set it where it applies."""
    _settings.append(setting)
    return setting


def settings() -> tuple[type[Setting], ...]:
    return tuple(_settings)


def refusal_of(stock: type[nn.Module], logits: bool) -> str | None:
    """Why a class has no fused form for now, of those that are asked for where logits are wanted or not."""
    reason, keeps_logits = _refused.get(stock, (None, True))
    return reason if keeps_logits or not logits else None


def mention(stock: type) -> None:
    """Has the report mention instances of a class, and of its subclasses, even if none of them can be fused, as it does
    the layers that `kind_of` knows."""
    _mentioned.append(stock)


def is_mentioned(module: nn.Module) -> bool:
    return isinstance(module, tuple(_mentioned))


def fused_form(stock: type[nn.Module]) -> type[FusedLayer] | None:
    """The fused class of a stock class, if it has one."""
    return _table.get(stock)


def describe(cls: type) -> str:
    """`peft.Linear4bit`: the package and the name of a stock class, also when given its fused one."""
    stock = getattr(cls, "stock", class_below(cls))
    return f"{stock.__module__.split('.')[0]}.{stock.__name__}"


def restore(model: nn.Module) -> None:
    """Gives every layer that `optimize` fused its stock forward back.

    The result is as if the layers had never been fused, with two exceptions, neither of which loses precision: a
    4-bit weight that was repacked when it was fused stays in its ordinary format, and adapters that are merged at the
    time will be unmerged by PEFT's arithmetic.

    Raises:
        TypeError: `model` is not a module.
        RuntimeError: an `AdapterPool` serves it; nothing is changed then.
    """
    check_module(model)
    for module in model.modules():
        if isinstance(module, FusedLayer) and (reason := module.why_not_restore()):
            raise RuntimeError(f"model: got one that {reason}")
    _restore(model, frozenset())


def _restore(model: nn.Module, but: Collection[tuple[Any, nn.Module]]) -> None:
    for module in model.modules():
        for setting in _settings:
            if setting.is_set(module) and (setting, module) not in but:
                setting.unset(module)
        if isinstance(module, FusedLayer) and (FusedLayer, module) not in but:
            restore_layer(module)


def restore_layer(layer: FusedLayer) -> None:
    """Gives one layer its stock forward back."""
    layer.release()
    for name in ("_choice", *layer.own_state):
        vars(layer).pop(name, None)
    change_class(layer, _table[layer.stock], layer.stock)


@contextmanager
def undone_on_error(model: nn.Module) -> Iterator[None]:
    """Restores what has been fused within it, if it is left by an exception: a refused call leaves no trace."""
    before: set[tuple[Any, nn.Module]] = {
        (FusedLayer, module) for module in model.modules() if isinstance(module, FusedLayer)
    }
    before |= {(setting, module) for module in model.modules() for setting in _settings if setting.is_set(module)}
    try:
        yield
    except BaseException:
        _restore(model, before)
        raise


def why_not_input(x: Any) -> str | None:
    """Why no fused operation can take x here and now, whatever the layer. It runs at every forward."""
    if not isinstance(x, Tensor):
        return f"x is a {type(x).__name__}"
    if x.dtype not in FLOAT_DTYPES or x.layout is not torch.strided:
        return f"x is {x.layout if x.dtype in FLOAT_DTYPES else x.dtype}"
    # These go by rules for each operation, which only torch's own have.
    if type(x).__name__ == "DTensor":
        return "x is a DTensor"
    if torch._C._are_functorch_transforms_active():
        return "a transform of torch.func is under way"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is under way"
    return "torch.jit.trace is under way" if torch._C._get_tracing_state() is not None else None


def check_module(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, wanted a torch.nn.Module")


def change_class(module: nn.Module, old: type, new: type) -> None:
    """Has a layer be of another class, also where `fully_shard` or a parametrization has put one of its own on top."""
    cls: Any = type(module)
    cls = rederived(cls, old, new)
    # Hooks of the accelerate library keep the forward that they wrap as a bound method in the instance, and PEFT's
    # disable_adapter leaves methods there, where they would outlive the change.
    for attribute, name in _KEPT.items():
        if attribute in vars(module) and is_own_method(module, attribute, name):
            vars(module)[attribute] = MethodType(getattr(cls, name), module)
    module.__class__ = cls


def is_own_method(module: nn.Module, attribute: str, name: str) -> bool:
    """Whether what an instance keeps as an attribute is the method of that name of its class, and not a replacement."""
    method = getattr(vars(module)[attribute], "__func__", None)
    return method is not None and method is getattr(type(module), name, None)
