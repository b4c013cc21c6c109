"""Layers of transformers' models that are known by what they do.

transformers writes the same lines out in each model's file, under the model's name. So a class has the fused form of
another one if its methods have the same code, and call the same: see `recognition`. In transformers 5.24 that is so for
177 classes of RMSNorms, 160 gated feed-forward blocks, 150 attention layers and 73 decoder layers.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache, wraps
from types import ModuleType
from typing import Any, ClassVar, TypeVar

from torch import nn

from ..recognition import Reliance, filed_key, is_compiling, methods_key, same_methods
from ..registry import FusedLayer, refuse, register


class Lookalike(FusedLayer):
    """A fused layer for every stock class that has the code of one.

    Attributes:
        model_type: of models, whose module of transformers has the class.
        class_name: of the class.
        methods: that have to have the same code.
    """

    model_type: ClassVar[str]
    class_name: ClassVar[str]
    methods: ClassVar[tuple[str, ...]] = ("forward",)
    reliance: ClassVar[Reliance]  # what the methods of the stock class call

    @classmethod
    def fits(cls, stock: type) -> bool:
        """Whether a class does by its file what that of the model does by its own, and is what its file says."""
        return (
            methods_key(stock, cls.methods) == cls.filed_key()
            and cls.does_the_same(stock)
            and cls.relies_on(stock).why_not() is None
        )

    @classmethod
    def filed_key(cls) -> tuple[Any, ...] | None:
        module = _unloaded(cls._stock_name())
        return None if module is None else filed_key(module, cls.class_name, cls.methods)

    @classmethod
    def does_the_same(cls, stock: type) -> bool:
        """Whether what a class of the same code calls is the same."""
        return same_methods(stock, cls._stock_module(), cls.class_name, cls.methods)

    @classmethod
    def relies_on(cls, stock: type) -> Reliance:
        """What has to be what it is now for a class of the same code to do the same."""
        return Reliance.of_methods(stock, cls.methods)

    @classmethod
    def _stock_module(cls) -> ModuleType:
        return importlib.import_module(cls._stock_name())

    @classmethod
    def _stock_name(cls) -> str:
        return f"transformers.models.{cls.model_type}.modeling_{cls.model_type}"

    @classmethod
    def members(cls, stock: type[Any]) -> dict[str, Any]:
        """What the fused class of a stock class has for itself."""
        return {}

    @classmethod
    def made_for(cls, stock: type, reliance: Reliance) -> type:
        """The fused class of a stock class. Its qualified name leads `__getattr__` back to the stock class, when a
        pickled model asks for it."""
        members = {"__doc__": inspect.getdoc(cls), "__module__": __name__, "reliance": reliance, **cls.members(stock)}
        forward = members.get("forward", getattr(cls, "forward", None))
        if forward is not None and reliance.values:
            members["forward"] = _guarded(forward, stock, reliance)
        made = type(stock.__name__, (cls, stock), members)
        made.__qualname__ = f"{stock.__module__.replace('.', '/')}:{stock.__qualname__}"
        globals()[made.__qualname__] = made
        return register(made)

    @classmethod
    def why_not(cls, layer: nn.Module) -> str | None:
        return cls.reliance.why_not()

    def why_stock(self) -> str | None:
        bypasses = type(self).forward is not self.stock.forward  # and not only has other functions called by it
        return self.reliance.why_not() if bypasses else None


def _guarded(forward: Callable[..., Any], stock: type[nn.Module], reliance: Reliance) -> Callable[..., Any]:
    """A fused forward for as long as what the stock one calls is what it was; otherwise the stock one."""
    holds = reliance.holds

    @wraps(forward)
    def guarded(self: Lookalike, *args: Any, **kwargs: Any) -> Any:
        if holds():
            return forward(self, *args, **kwargs)
        if not is_compiling():
            self.log_stock_path(reliance.why_not() or "")
        return stock.forward(self, *args, **kwargs)

    return guarded


@cache
def _unloaded(name: str) -> ModuleType | None:
    """A module whose file can be asked, and is not run for that; None if this version of transformers has none."""
    with suppress(ModuleNotFoundError):
        spec = importlib.util.find_spec(name)
        return None if spec is None else importlib.util.module_from_spec(spec)
    return None


Form = TypeVar("Form", bound=type[Lookalike])

# The modules here that have forms.
_FORMS_IN = (".attention", ".layers", ".experts", ".causal_lm", "...inference.decoder_layer")

_forms: list[type[Lookalike]] = []
_seen: set[type] = set()


def form(fused: Form) -> Form:
    """Class decorator: has classes looked through for this one's lookalikes."""
    _forms.append(fused)
    return fused


def form_of(stock: type) -> type[Lookalike] | None:
    """The form of a class that has one; a fused class has its stock class's."""
    stock = getattr(stock, "stock", stock)
    return next((form for form in _all_forms() if form.fits(stock)), None)


def register_loaded() -> None:
    """Registers the classes of the models that have been imported by now."""
    forms: dict[Any, list[type[Lookalike]]] = {}
    for form in _all_forms():
        forms.setdefault((form.methods, form.filed_key()), []).append(form)
    all_methods = {methods for methods, _ in forms}
    for stock in [stock for stock in _classes() if stock not in _seen]:
        keys = [(methods, methods_key(stock, methods)) for methods in all_methods]
        found = [form for key in keys if key[1] is not None for form in forms.get(key, ()) if form.does_the_same(stock)]
        reliance = found[0].relies_on(stock) if found else None
        reason = None if reliance is None else reliance.why_not()
        refuse(stock, reason, found[0].keeps_logits if found else True)
        if reason:
            continue  # and looked at again by the next call
        _seen.add(stock)
        if reliance is not None:
            found[0].made_for(stock, reliance)


def _all_forms() -> list[type[Lookalike]]:
    for module in _FORMS_IN:
        importlib.import_module(module, __package__)
    return _forms


def _classes() -> Iterator[type]:
    for name, module in list(sys.modules.items()):
        if ".modeling_" in name:
            for value in list(vars(module).values()):
                if isinstance(value, type) and issubclass(value, nn.Module) and value.__module__ == name:
                    yield value  # by its name in the module, under which a pickled one is looked for


def __getattr__(name: str) -> type:
    module, _, class_name = name.partition(":")
    if class_name:
        stock = getattr(importlib.import_module(module.replace("/", ".")), class_name)
        register_loaded()
        if name in globals():
            result: type = globals()[name]
            return result
        raise AttributeError(f"{stock.__module__}.{class_name} has no fused form")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
