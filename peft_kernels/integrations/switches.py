"""Which of a model's layers `optimize` may fuse: by family, or by the modules' names."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, get_args

from torch import nn

from ..ops._arguments import refuse
from .registry import Family

FAMILIES: tuple[str, ...] = get_args(Family)

# What a name stands for: `lora`, `model.layers.0`, `model.layers.*.mlp`.
Names = str | Collection[str] | None

_logger = logging.getLogger("peft_kernels")


class Switches(NamedTuple):
    """Families, and patterns of modules' names, which stand for what is inside these modules as well.

    Attributes:
        only: what may be fused; None allows everything.
        exclude: what may not, whatever `only` says.
    """

    only: frozenset[str] | None
    exclude: frozenset[str]

    def why_not(self, name: str, family: Family) -> str | None:
        """Why a layer of a family is left alone."""
        if found := _find(self.exclude, name, family):
            return f"{found!r} is excluded"
        if self.only is not None and not _find(self.only, name, family):
            return f"only {_list(self.only)} may be fused"
        return None


def switches_for(model: nn.Module, only: Names, exclude: Names) -> Switches:
    """The switches of a call; where an argument is None, the environment variable of its name has it, with commas.

    Raises:
        TypeError: `only` or `exclude` is not made of strings.
        ValueError: one of the strings names neither a family nor a module.
    """
    return Switches(_read(model, "only", only), _read(model, "exclude", exclude) or frozenset())


def _read(model: nn.Module, argument: str, names: Names) -> frozenset[str] | None:
    variable = f"PEFT_KERNELS_{argument.upper()}"
    is_given = names is not None
    found: frozenset[str]
    if names is not None:
        found = frozenset([names] if isinstance(names, str) else _checked(argument, names))
    elif variable in os.environ:
        found = frozenset(filter(None, map(str.strip, os.environ[variable].split(","))))
    else:
        return None
    modules = [name for name, _ in model.named_modules()]
    for name in sorted(found - {*FAMILIES}):
        if any(fnmatchcase(module, name) for module in modules):
            continue
        wanted = f"a module of the model, or a family: {', '.join(FAMILIES)}"
        if is_given:
            refuse(argument, repr(name), wanted)
        _logger.warning("%s: got %r, wanted %s", variable, name, wanted)
    return found


def _checked(argument: str, names: Any) -> Iterable[str]:
    if not isinstance(names, Iterable) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"{argument}: got {names!r}, wanted names of families or of modules")
    return names


def _find(names: Collection[str], module: str, family: str) -> str | None:
    """The one of the names that stands for a module."""
    if not names:
        return None
    parts = module.split(".")
    outer = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
    return next((name for name in sorted(names) if name == family or any(fnmatchcase(o, name) for o in outer)), None)


def _list(names: Iterable[str]) -> str:
    return ", ".join(map(repr, sorted(names)))
