"""How much memory a step of training takes: its forward and backward run on torch's fake tensors, and are watched.

Each operation then makes tensors that have a shape, a dtype and a storage, but no memory, and torch's autograd keeps
and drops them as it does with real ones: so what is counted is what the layers do, fused or not, and no formula. What
is not seen are buffers that a kernel has for itself while it runs, and an optimiser's.

A model whose layers are all alike is run with two depths, between which the counts grow by the same for each layer.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .model import Recipe, build, in_a_line, layers_of, with_layers, with_stand_ins

_BY_NUMBERS = DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException
_DEPTHS = 2, 3  # that a model of more layers is run with


@dataclass(frozen=True)
class Step:
    """Bytes above those of the weights.

    Attributes:
        kept: at the end of the forward, for the backward.
        peak: the most at any time of the step, gradients of the parameters among it.
        fused, left: how many layers `optimize` fused, and left alone.
    """

    kept: int
    peak: int
    fused: int = 0
    left: int = 0


@dataclass(frozen=True)
class _Run:
    """What was seen of one depth: `peaks` before the first layer's backward began, and after that."""

    kept: int
    peaks: tuple[int, int]
    fused: int
    left: int


def depths_of(config: Any, model: nn.Module) -> tuple[int, ...]:
    """With how many layers a model is to be run: twice where all layers are alike, and else with all that it has."""
    depth: int = getattr(config, "num_hidden_layers", 0)
    kinds = getattr(config, "layer_types", None) or ()
    layers = {tuple((n, p.shape) for n, p in layer.named_parameters()) for layer in layers_of(model)}
    are_alike = len({*kinds}) <= 1 and len(layers) == 1 and not getattr(config, "is_encoder_decoder", False)
    return _DEPTHS if are_alike and depth > max(_DEPTHS) else (depth,)


def measure(config: Any, recipe: Recipe, depths: tuple[int, ...], fuses: bool) -> Step:
    """What a step takes, without or with the fused kernels.

    Args:
        depths: as `depths_of` tells.

    Raises:
        ValueError: the model can't be run so.
    """
    if len(depths) == 1:
        run = _run(config, recipe, fuses)
        return Step(run.kept, max(run.peaks), run.fused, run.left)
    few, more = depths
    first, second = (_run(with_layers(config, count), recipe, fuses) for count in depths)

    further: int = config.num_hidden_layers - more

    def extended(a: int, b: int) -> int:
        return b + (b - a) * further // (more - few)

    peaks = [extended(*pair) for pair in zip(first.peaks, second.peaks, strict=True)]
    return Step(
        extended(first.kept, second.kept), max(peaks), extended(first.fused, second.fused),
        extended(first.left, second.left),
    )  # fmt: skip


def _run(config: Any, recipe: Recipe, fuses: bool) -> _Run:
    model = build(config, recipe)
    fused = left = 0
    with FakeTensorMode():
        weights = with_stand_ins(model)
        if fuses:
            from .. import optimize

            report = optimize(model, tune=False)
            fused, left = len(report.fused), len(report.left_alone)
        inputs = _inputs(model, recipe)
        live = _Live([*weights, *inputs.values()], recipe.rows * recipe.tokens * _experts_per_token(config))
        layers = layers_of(model)
        if len(layers) > 1:
            layers[1].register_forward_pre_hook(live.mark_backward, with_kwargs=True)
        try:
            with live, _as_if_not_traced():
                loss = model(**inputs).loss
                kept = live.now
                loss.backward()
        except _BY_NUMBERS as error:
            raise ValueError(f"model: its forward depends on the numbers, not only on shapes: {error}") from error
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:  # of a model that was configured so
            raise ValueError(f"model: a step fails with {recipe.method}: {in_a_line(error)}") from error
    return _Run(kept, (live.peaks[0], live.peaks[-1]), fused, left)


@contextmanager
def _as_if_not_traced() -> Iterator[None]:
    """Has transformers leave out masks that hide nothing, as it does with real tensors: it takes stand-ins for those of
    a trace, which has to serve for every mask."""
    import transformers.masking_utils

    masking_utils: Any = transformers.masking_utils
    before = getattr(masking_utils, "is_tracing", None)
    if before is None:
        yield
        return
    masking_utils.is_tracing = lambda tensor=None: False
    try:
        yield
    finally:
        masking_utils.is_tracing = before


def _experts_per_token(config: Any) -> int:
    """0 where the model is no mixture of experts."""
    count: int = getattr(config, "num_experts_per_tok", None) or 0
    return count


def _inputs(model: Any, recipe: Recipe) -> dict[str, Tensor]:
    ids = torch.zeros(recipe.rows, recipe.tokens, dtype=torch.int64)
    labels = ids[:, 0].clone() if recipe.head == "SEQ_CLS" else ids.clone()
    return {"input_ids": ids, "labels": labels}


def _grouped_product(a: Tensor, b: Tensor, offs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """torch's product of groups of rows, which in other dtypes than bf16 it has for real tensors alone."""
    if a.dim() == b.dim() == 2:  # of columns with rows, for each group
        return a.new_empty(len(offs), a.shape[0], b.shape[1])
    return a.new_empty(a.shape[-2], b.shape[-1])


class _Live(TorchDispatchMode):
    """Counts the bytes of the storages that there are, but for those of the given tensors.

    Attributes:
        now: how many.
        peaks: the most so far; from `mark_backward`'s time on another one.
    """

    def __init__(self, outside: list[Tensor], expert_rows: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's has no types
        self._expert_rows = expert_rows
        self.now, self.peaks = 0, [0]
        self._known = {tensor.untyped_storage()._cdata for tensor in outside}
        self._outside = outside

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            if args[0].dtype is torch.bool:
                return True  # whether rows are whole, and none is packed
            if self._expert_rows:
                return self._end_of_expert(args[0])
        if func is torch.ops.aten._grouped_mm.default and args[0].dtype is not torch.bfloat16:
            result = _grouped_product(*args, **(kwargs or {}))
        else:
            result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        return result

    def mark_backward(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A hook before a layer's forward: a new peak begins when the gradient of its input is there."""
        for x in (*args, *kwargs.values()):
            if isinstance(x, Tensor) and x.requires_grad:
                x.register_hook(lambda gradient: self.peaks.append(self.now))
                return

    def _end_of_expert(self, offset: Tensor) -> int:
        """What an entry of the ends of experts' rows is taken for: each expert has as many as the others."""
        count = offset.untyped_storage().nbytes() // offset.element_size()
        return (int(offset.storage_offset()) + 1) * self._expert_rows // count

    def _see(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.now += size
            self.peaks[-1] = max(self.peaks[-1], self.now)
            weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size
