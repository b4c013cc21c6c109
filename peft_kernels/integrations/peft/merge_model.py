"""PEFT's model of LoRA layers, whose layers are merged all or none; see `peft_kernels.merging`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ... import merging
from ...ops._arguments import refuse
from ..registry import FusedLayer

BROKEN = "NaNs detected in the merged weights. The adapter {} seems to be broken"  # PEFT's words

unloading: ContextVar[bool] = ContextVar("peft_kernels_unloading", default=False)  # so that nothing need be kept


class MergesModel(FusedLayer):
    """PEFT's model of LoRA layers: all of these are merged and unmerged, or none. It goes before PEFT's class."""

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """
        Raises:
            ValueError: there is no adapter of a name, or a layer refuses; nothing is changed then.
        """
        self._check(adapter_names, safe_merge)
        before = {layer: [*layer.merged_adapters] for layer in _layers(self)}
        try:
            with _named(self):
                super().merge_adapter(  # type: ignore[misc]  # PEFT's
                    adapter_names=adapter_names, safe_merge=safe_merge
                )
        except BaseException:
            for layer, names in before.items():
                if layer.merged_adapters != names:
                    layer.unmerge()
                    if names:
                        layer.merge(adapter_names=names)
            raise

    def unmerge_adapter(self) -> None:
        """
        Raises:
            RuntimeError: what a layer needs was not kept; nothing is changed then.
        """
        for layer in _layers(self):
            if hasattr(layer, "why_not_unmerge") and (reason := layer.why_not_unmerge()):
                raise RuntimeError(f"unmerge_adapter: got {layer.merged_adapters} merged, {reason}")
        super().unmerge_adapter()  # type: ignore[misc]  # PEFT's

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """
        Raises:
            ValueError: there is no adapter of a name, or one has numbers that are not finite; nothing is changed then.
        """
        self._check(adapter_names, safe_merge or bool(getattr(merging.current.get(), "correction", 0)))
        token = unloading.set(True)
        try:
            with _named(self):
                unloaded: nn.Module = super().merge_and_unload(  # type: ignore[misc]  # PEFT's
                    progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names
                )
                return unloaded
        finally:
            unloading.reset(token)

    def _check(self, adapter_names: Any, finite: bool) -> None:
        known = self.peft_config
        for name in adapter_names if isinstance(adapter_names, (list, tuple)) else ():  # else PEFT says what it wants
            if name not in known:
                refuse("adapter_names", repr(name), f"one of {', '.join(map(repr, known))}")
        for layer in _layers(self) if finite else ():
            for name in layer.active_adapters if adapter_names is None else adapter_names:
                if not is_finite(layer, name):
                    raise ValueError(BROKEN.format(name))


def _layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


@contextmanager
def _named(model: Any) -> Iterator[None]:
    """Has the report name the model's layers."""
    options = merging.current.get()
    if options is not None:
        options.names.update((module, name) for name, module in model.model.named_modules())
    try:
        yield
    finally:
        if options is not None:
            options.names.clear()


def is_finite(layer: Any, name: str) -> bool:
    """Whether all numbers are that a layer has for an adapter."""
    for part in layer.adapter_layer_names:
        held = getattr(layer, part, {})
        if name in held:
            parameters = [held[name]] if isinstance(held[name], nn.Parameter) else held[name].parameters()
            if not all(parameter.isfinite().all() for parameter in parameters):
                return False
    return True
