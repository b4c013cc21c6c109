"""The one table of layers that have a fused form: class → fused class → the reason when a layer can't take it.

A fused class is a subclass of the stock class, under the same name, that adds no state of its own worth saving.
`accelerate` assigns it to the instance's `__class__`. So everything but the overridden methods is the stock layer's
own (parameters, names, state_dict, hooks, isinstance, `type(layer).__name__`), a copied or pickled layer stays fused,
and `restore` is the same assignment the other way round.
"""

from __future__ import annotations

import importlib
import logging
import re
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.autograd import forward_ad

from .. import cpu
from ..ops._arguments import FLOAT_DTYPES
from ..printing import PrintedReport, indented, starred
from .kinds import kind_of, why_no_form
from .sharding import class_below, gathering, rederived

# Packages whose layers can be fused, with the modules in the folder of that name that fuse them. None of them is
# imported before a model that is made of its layers has imported it.
_PACKAGES = {
    "torch": ("linear", "dropout"),
    "bitsandbytes": ("linear4bit",),
    "transformers": ("lookalike", "activations", "causal_lm_loss", "conv1d", "output_layer"),
    "peft": ("lora", "ia3", "prefix"),
}

# Parts that an adapter's layer computes itself when it is fused.
_INNER = re.compile(r"(.*)\.(base_layer|lora_(A|B|dropout)\.[^.]+)")

_OWN = f"{__package__.partition('.')[0]}.nn."  # layers that compute what their parts are for

_logger = logging.getLogger("peft_kernels")
_logged: set[tuple[type, str]] = set()


if TYPE_CHECKING:

    class _Mixin(nn.Module):
        """A mixin is a module, with parts and attributes of its own, only by the stock class that it extends."""

        _modules: dict[str, Any]

        def __getattr__(self, name: str) -> Any: ...

else:
    _Mixin = object


class FusedLayer(_Mixin):
    """What a fused class adds to the stock class that it extends; its bases are a mixin of this kind and the stock."""

    stock: ClassVar[type[nn.Module]]
    stock_forward: ClassVar[Callable[..., Any] | None]  # what the stock class had for it when this one was made
    # Attributes that exist only on a fused instance, and that `restore` drops.
    own_state: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def applies(cls, layer: nn.Module) -> bool:
        """Whether the stock layer does what can be fused at all. One that does not is as one without a fused class."""
        return True

    @classmethod
    def why_not(cls, layer: nn.Module) -> str | None:
        """Why this stock layer can't be fused, whatever its adapters and its input."""
        return None

    def prepare(self) -> str:
        """Runs at every `accelerate`, when all layers that can be fused are; a remark for the report."""
        return ""

    def release(self) -> None:
        """Undoes what the layer has done outside of itself; `restore` calls it first."""

    def why_stock(self) -> str | None:
        """Why the next forward would take the stock path, so far as it can be known without the input."""
        return None

    def take_stock_path(self, reason: str, *args: Any, **kwargs: Any) -> Tensor:
        """What the stock layer returns, which a forward falls through to."""
        self.log_stock_path(reason)
        y: Tensor = self.stock.forward(self, *args, **kwargs)
        return y

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
_refused: dict[type[nn.Module], str] = {}
_settings: list[type[Setting]] = []
_mentioned: list[type] = []


def register(fused: Fused) -> Fused:
    """Class decorator: enters a fused class into the table under the stock class that it extends."""
    fused.stock = fused.__bases__[-1]
    fused.stock_forward = fused.stock.forward
    _table[fused.stock] = fused
    return fused


def refuse(stock: type[nn.Module], reason: str | None) -> None:
    """Has the report say why a class has no fused form for now; None takes it back."""
    if reason is None:
        _refused.pop(stock, None)
    else:
        _refused[stock] = reason


def register_setting(setting: AnySetting) -> AnySetting:
    """Class decorator: has `accelerate` set it where it applies."""
    _settings.append(setting)
    return setting


def mention(stock: type) -> None:
    """Has the report mention instances of a class, and of its subclasses, even if none of them can be fused, as it does
    the layers that `kind_of` knows."""
    _mentioned.append(stock)


def fused_form(stock: type[nn.Module]) -> type[FusedLayer] | None:
    """The fused class of a stock class, if it has one."""
    return _table.get(stock)


def describe(cls: type) -> str:
    """`peft.Linear4bit`: the package and the name of a stock class, also when given its fused one."""
    stock = getattr(cls, "stock", class_below(cls))
    return f"{stock.__module__.split('.')[0]}.{stock.__name__}"


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer.

    Attributes:
        name: in the model, as `named_modules` has it.
        kind: package and class, such as `peft.Linear4bit`.
        fused: whether its forward takes the fused path.
        reason: why not; or a remark, if it does.
    """

    name: str
    kind: str
    fused: bool
    reason: str = ""


@dataclass(frozen=True, repr=False)
class Report(PrintedReport):
    """What `accelerate` did, layer by layer. Printed, it is a table in which numbered layers share a row, without the
    base layers and dropouts that run inside a fused layer.

    Attributes:
        layers: in the model's order.
        isa: the instruction set of the CPU kernels.
    """

    layers: tuple[LayerReport, ...]
    isa: str

    @property
    def fused(self) -> tuple[LayerReport, ...]:
        return tuple(layer for layer in self.layers if layer.fused)

    @property
    def left_alone(self) -> tuple[LayerReport, ...]:
        return tuple(layer for layer in self.layers if not layer.fused)

    def __iter__(self) -> Iterator[LayerReport]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __rich__(self) -> Table:
        rows = Counter((starred(layer.name), layer.kind, layer.fused, layer.reason) for layer in self._outer_layers())
        table = Table(title=self._summary(), caption=f"CPU kernels: {self.isa}", title_justify="left")
        for heading in ("layer", "class", "forward"):
            table.add_column(heading, overflow="fold")
        table.add_column("layers", justify="right")
        names = indented(name for name, *_ in rows)
        for name, ((_, kind, fused, reason), count) in zip(names, rows.items(), strict=True):
            verdict = "fused" if fused else "left alone"
            table.add_row(name, kind, f"{verdict}: {reason}" if reason else verdict, str(count))
        return table

    def __repr__(self) -> str:
        return f"Report({self._summary()}; CPU kernels: {self.isa})"

    def _outer_layers(self) -> list[LayerReport]:
        fused = {layer.name for layer in self.fused}

        def is_inner(layer: LayerReport) -> bool:
            inner = _INNER.fullmatch(layer.name)
            return layer.fused and not layer.reason and inner is not None and inner[1] in fused

        return [layer for layer in self.layers if not is_inner(layer)]

    def _summary(self) -> str:
        counts = Counter(layer.fused for layer in self._outer_layers())
        return f"layers: {counts[True]} fused, {counts[False]} left alone"


def accelerate(model: nn.Module) -> Report:
    """Gives every layer of a model that has a fused form its fused forward, in place. `restore` undoes it.

    Fused are, on the CPU and, but for attention, on CUDA devices that the package was built for: PEFT's `lora.Linear`
    on an `nn.Linear` or a `Conv1D` and `lora.bnb.Linear4bit` (Hu et al. 2021, arXiv:2106.09685; Dettmers et al. 2023,
    arXiv:2305.14314), also with DoRA (Liu et al. 2024, arXiv:2402.09353) or `adapter_names`, `ia3.Linear` and
    `ia3.bnb.Linear4bit` (Liu et al. 2022, arXiv:2205.05638), PEFT's models with prefix tuning (Li and Liang 2021,
    arXiv:2101.00190), the attention of transformers' Llama, Mistral, Qwen, GPT-2, OPT, BERT and what has their code,
    the rotary embedding in it, RMSNorm, GELUs that are several operations and the gated feed-forward blocks of
    transformers' models, the loss of its causal language models, their output layers (on the CPU), decoder layers like
    Llama's in inference (on the CPU), `torch.nn.Dropout`, `torch.nn.Linear` and `Conv1D` in fp32 (on CPUs with AVX-512
    that are not Intel's), and bitsandbytes' `Linear4bit`. Parameters, their names, state_dict, saving, merging and
    switching adapters go on as before, and results have the dtype that the stock layers return. Whatever can't be fused
    keeps its stock forward, and the report says why; what only an input can tell (its device or dtype, gradients of a
    batch with `adapter_names`) is decided at each forward, and logged once.

    Differences that are meant: dropout draws other masks; LoRA branches are computed in fp32; norms, GELUs, gated
    blocks and rotary embeddings are rounded once, and so are residual sums without gradients; a label that is no class
    makes a loss on a GPU NaN; a 4-bit weight is never repacked for bitsandbytes' own CPU kernels (one that already was
    is converted back, once); a 4-bit unmerge puts the original weight back, which is kept while merged;
    `ia3.bnb.Linear4bit` returns x's dtype, not fp32, and can be merged; a prefix is in no cache, whose length counts
    tokens alone; models on the CPU, and those with a prefix, whose attention is `sdpa` are set to this package's; a
    gradient can't be differentiated once more.

    Args:
        model: any module; calling again covers layers that were added since, and reports on all.

    Returns:
        A `Report`: iterate over it, or print it.

    Raises:
        TypeError: `model` is not a module.
    """
    check_module(model)
    _load_packages()
    with undone_on_error(model), gathering(model):
        reasons = _fuse(model)
        remarks: dict[nn.Module, str] = {
            module: module.prepare() for module in model.modules() if isinstance(module, FusedLayer)
        }
        return Report(tuple(_reports(model, reasons, remarks)), cpu.isa())


def _fuse(model: nn.Module) -> dict[nn.Module, str | None]:
    """Changes the classes; of the layers that a fused class was found for, why they were left as they are."""
    reasons: dict[nn.Module, str | None] = {}
    for module in model.modules():
        for setting in _settings:
            if setting.applies(module):
                setting.set(module)
        stock = class_below(type(module))
        fused = fused_form(stock)
        if stock in _refused:
            reasons[module] = _refused[stock]
        if fused is None or not fused.applies(module):
            continue
        reasons[module] = reason = _why_not(fused, module)
        if reason is None:
            change_class(module, fused.stock, fused)
    return reasons


def _reports(
    model: nn.Module, reasons: dict[nn.Module, str | None], remarks: dict[nn.Module, str]
) -> Iterator[LayerReport]:
    """What became of each layer, in the model's order; another walk, as that can depend on the layers inside it."""
    named: set[str] = set()
    own: tuple[str, ...] = ()  # layers of this package
    mentioned = tuple(_mentioned)
    for name, module in model.named_modules():
        if class_below(type(module)).__module__.startswith(_OWN):
            own += (f"{name}." if name else "",)
            continue
        kind, settings = describe(type(module)), [setting for setting in _settings if setting.is_set(module)]
        for setting in _settings:
            if (reason := setting.why_not(module)) or setting in settings:
                yield LayerReport(name, kind, reason is None, reason or setting.remark)
        if isinstance(module, FusedLayer):
            reason = module.why_stock()
        elif module in reasons:
            reason = reasons[module]
        elif isinstance(module, mentioned) or (kind_of(module) and not settings):
            reason = why_no_form(module)
        else:
            continue
        # Parts of an adapter's layer go without saying, fused or not.
        inner = _INNER.fullmatch(name)
        is_part = (inner and inner[1] in named) or name.startswith(own)
        if reason and is_part and not isinstance(module, mentioned):
            continue
        named.add(name)
        yield LayerReport(name, kind, reason is None, reason or remarks.get(module, ""))


def restore(model: nn.Module) -> None:
    """Gives every layer that `accelerate` fused its stock forward back.

    The result is as if the layers had never been fused, with two exceptions, neither of which loses precision: a
    4-bit weight that was repacked when it was fused stays in its ordinary format, and adapters that are merged at the
    time will be unmerged by PEFT's arithmetic.

    Raises:
        TypeError: `model` is not a module.
    """
    check_module(model)
    _restore(model, frozenset())


def _restore(model: nn.Module, but: Collection[tuple[Any, nn.Module]]) -> None:
    for module in model.modules():
        for setting in _settings:
            if setting.is_set(module) and (setting, module) not in but:
                setting.unset(module)
        if isinstance(module, FusedLayer) and (FusedLayer, module) not in but:
            module.release()
            for name in module.own_state:
                vars(module).pop(name, None)
            change_class(module, _table[module.stock], module.stock)


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


def _load_packages() -> None:
    for package, modules in _PACKAGES.items():
        for module in modules if package in sys.modules else ():
            loaded = importlib.import_module(f"{__package__}.{package}.{module}")
            if hasattr(loaded, "register_loaded"):  # a package whose layers' modules come one by one
                loaded.register_loaded()


def _why_not(fused: type[FusedLayer], module: nn.Module) -> str | None:
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    if fused.stock.forward is not fused.stock_forward:
        return "its class's forward was replaced"
    return fused.why_not(module)


def change_class(module: nn.Module, old: type, new: type) -> None:
    """Has a layer be of another class, also where `fully_shard` or a parametrization has put one of its own on top."""
    cls: Any = type(module)
    cls = rederived(cls, old, new)
    # Hooks of the accelerate library keep the forward that they wrap as a bound method in the instance, where it
    # would outlive the change.
    for name in ("forward", "_old_forward"):
        method = vars(module).get(name)
        if getattr(method, "__func__", None) is type(module).forward:
            vars(module)[name] = MethodType(cls.forward, module)
    module.__class__ = cls
