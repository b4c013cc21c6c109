"""PEFT's `ia3.Linear` and `ia3.bnb.Linear4bit`, fused: the product and the product of the active adapters' vectors.

(IA)³: Liu et al. 2022 (arXiv:2205.05638).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from peft.tuners import ia3
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from ...ops._arguments import FLOAT_DTYPES
from ...ops._linear import few_rows
from ...ops.ia3_linear import ia3_linear
from ...rows import Rows
from ..base_layer import BaseProduct, OnLinear, is_conv1d, why_not_skip
from ..deferred_scales import defer
from ..refusal import Refusal
from ..registry import Trial, check_module, refuse, register
from ..rows import TakesRows, are_entered
from ..transformers.layers import FusedGatedMLP
from ..transformers.lookalike import form_of


class FusedIA3(TakesRows):
    """`y = x Wᵀ + b` with x, or y, times the product of the active adapters' vectors, in x's dtype; within
    `adapter_rows` times the vector of each row's own adapter.

    Merged or disabled adapters take PEFT's own forward, which calls the base layer.
    """

    family = "ia3"

    def prepare(self) -> str:
        return "in a mixed batch torch multiplies with the vectors" if len(self.ia3_l) > 1 else ""

    def why_stock(self) -> str | None:
        if reason := why_not_skip(self.base_layer):
            return f"its base layer has {reason}"
        scale = self._scale()
        return scale.reason if isinstance(scale, Refusal) else None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if (result := self.of_rows(x, args, kwargs)) is not None:
            return result
        rows: Rows | None = kwargs.pop("adapter_names", None)  # which PEFT's forward does not know
        if self._disable_adapters or self.merged_adapters:
            y: Tensor = super().forward(x, *args, **kwargs)
            return y
        if rows is not None:
            return self._mixed(x, rows, *args, **kwargs)
        if self.stock_is_faster(x):
            return self.stock_result(x, *args, **kwargs)
        call = self._call(x, args, kwargs)
        if isinstance(call, Refusal):
            return self.take_stock_path(call.reason, x, *args, **kwargs)
        (weight, bias, compute_dtype, out_dtype), scale = call
        l_in, l_out = (scale, None) if self.is_feedforward else (None, scale)
        if l_out is not None and l_out.requires_grad and defer(self, l_out):
            l_out = None
        return ia3_linear(x, weight, bias, l_in, l_out, compute_dtype=compute_dtype, out_dtype=out_dtype)

    def _mixed(self, x: Tensor, rows: Rows, *args: Any, **kwargs: Any) -> Tensor:
        """Each row of x with the vector of its adapter: one product for all rows, and torch's with the vectors."""
        present = [name for name in rows.names if name in self.ia3_l]
        if not present:
            plain: Tensor = self.base_layer(x, *args, **kwargs)
            return plain
        vectors = [self.ia3_l[name].flatten() for name in present]
        index = (rows.positions(present) + 1).to(x.device)  # the first is that of rows without an adapter
        scale = torch.stack([torch.ones_like(vectors[0]), *vectors])[index]
        scale = scale.view(len(rows), *[1] * (x.dim() - 2), -1)
        if self.is_feedforward:
            return self.base_layer((x * scale).to(x.dtype), *args, **kwargs)  # type: ignore[no-any-return]
        y: Tensor = self.base_layer(x, *args, **kwargs)
        return (y * scale).to(y.dtype)

    def base_product(self, base: nn.Module, x: Tensor) -> BaseProduct | Refusal:
        """What `ia3_linear` is to be called with for the base layer; or why this input has to take the stock path."""
        raise NotImplementedError

    def _call(
        self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[BaseProduct, Tensor | None] | Refusal:
        if args or kwargs:
            return Refusal("further arguments were given")
        base = self._modules["base_layer"]
        if reason := why_not_skip(base):
            return Refusal(f"its base layer has {reason}")
        product = self.base_product(base, x)
        if isinstance(product, Refusal):
            return product
        scale = self._scale()
        return scale if isinstance(scale, Refusal) else (product, scale)

    def _scale(self) -> Tensor | Refusal | None:
        """The product of the active adapters' vectors, None if there is none; or why it can't be fused."""
        scale, vectors, device = None, self._modules["ia3_l"], self.base_layer.weight.device
        for name in self.active_adapters:
            if name not in vectors:
                continue
            vector = vectors[name]
            if vector.dtype not in FLOAT_DTYPES:
                return Refusal(f"adapter {name!r} is {vector.dtype}")
            if vector.device != device:
                return Refusal(f"adapter {name!r} is on {vector.device.type}")
            scale = vector.flatten() if scale is None else scale * vector.flatten()
        return scale


@register
class Linear(OnLinear, FusedIA3, ia3.Linear):
    __doc__ = FusedIA3.__doc__

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if is_conv1d(self._modules["base_layer"]) and few_rows(x) and not are_entered():
            return ia3.Linear.forward(
                self, x, *args, **kwargs
            )  # the product would be torch's, and the call takes longer
        return super().forward(x, *args, **kwargs)


if hasattr(ia3, "Linear4bit"):  # bitsandbytes is installed
    from ..bitsandbytes.linear4bit import WHY_NOT_8BIT, On4bit, scale_rows

    refuse(ia3.Linear8bitLt, WHY_NOT_8BIT)

    @register
    class Linear4bit(On4bit, FusedIA3, ia3.Linear4bit):  # type: ignore[misc]  # PEFT looks it up when asked
        """(IA)³ on a 4-bit weight. The result has x's dtype; PEFT's has fp32, to which it casts any x.

        PEFT can't merge this layer. Where rows don't share blocks, `merge` scales the blocks' statistics instead of
        quantising again, and `unmerge` puts the originals back. A vector on the input is merged into the layer that
        makes the input, which only `merge_ia3` can know.
        """

        own_state = ("_merged_into",)
        _merged_into: nn.Module | None = None

        def trial(self) -> Trial | None:
            return None  # the stock forward's result has another dtype

        def release(self) -> None:
            if self.merged_adapters:  # which the stock layer would apply a second time
                self.unmerge()

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if self.merged_adapters and not self._disable_adapters:
                y: Tensor = self.base_layer(x)  # PEFT's forward knows of no merged adapter
                return y
            if self._disable_adapters and self.merged_adapters:
                self.unmerge()
            return super().forward(x, *args, **kwargs)

        def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
            """Scales the rows of the base layer, exactly but for the rounding of absmax to fp32.

            Raises:
                ValueError: the vector is on the input, blocks straddle rows, or (with `safe_merge`) a scale is not
                    finite.
            """
            if self.is_feedforward:
                raise ValueError(
                    "(IA)³ on a layer's input: got a merge of the layer alone, wanted peft_kernels.merge_ia3(model), "
                    "which finds the layer that makes the input"
                )
            self.merge_into(self.base_layer, safe_merge, adapter_names)

        def merge_into(
            self, target: nn.Module, safe_merge: bool = False, adapter_names: list[str] | None = None
        ) -> None:
            names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.ia3_l]
            if not names:
                return
            scale = math.prod(self.ia3_l[name].detach().flatten().double() for name in names)
            if safe_merge and not scale.isfinite().all():
                raise ValueError(f"adapters {names}: got vectors that are not finite, wanted finite ones")
            scale_rows(target, self, scale)
            self.__dict__["_merged_into"] = target  # not as a submodule
            self.merged_adapters.extend(names)

        def unmerge(self) -> None:
            if self._merged_into is not None:
                scale_rows(self._merged_into, self, None)
            self.__dict__.pop("_merged_into", None)
            self.merged_adapters.clear()


# Modules whose output, times a vector, can be had from the rows of one of their layers: gate · up feeds down, and
# ReLU commutes with factors that are not negative. They are recognised by their code, or else by their names.
_GATED_MLPS = ("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP")


def _producer(parent: Any, leaf: str, scale: Tensor) -> Any:
    """The layer whose rows take the vector on the input of another; or why there is none."""
    kind = type(parent).__name__
    if leaf == "down_proj" and (form_of(type(parent)) is FusedGatedMLP or kind in _GATED_MLPS):
        return parent.up_proj
    if kind == "OPTDecoderLayer" and leaf == "fc2":
        activation = type(parent.activation_fn).__name__
        if not isinstance(parent.activation_fn, nn.ReLU):
            return Refusal(f"its input comes out of a {activation}, through which no factor passes")
        if (scale < 0).any():
            return Refusal("its input comes out of a ReLU, through which no negative factor passes")
        return parent.fc1
    return Refusal(f"no layer is known whose rows make the input of {leaf!r} in a {kind}")


def _target(model: nn.Module, name: str, layer: ia3.IA3Layer, names: list[str]) -> nn.Module | Refusal:
    """The 4-bit layer whose rows take a layer's vector; or why there is none."""
    if not isinstance(layer, FusedIA3):
        return Refusal("it is not fused: call optimize first")
    from ..bitsandbytes.linear4bit import Fused4bit

    target: nn.Module | Refusal = layer.base_layer
    if layer.is_feedforward:
        parent, _, leaf = name.rpartition(".")
        scale = math.prod(layer.ia3_l[adapter].detach() for adapter in names)
        target = _producer(model.get_submodule(parent), leaf, scale)
        if isinstance(target, Refusal):
            return target
        if isinstance(target, ia3.IA3Layer):
            target = target.base_layer
    if not isinstance(target, Fused4bit):
        return Refusal(f"its vector would go into a {type(target).__name__}, which is no fused 4-bit layer")
    weight = target.nf4_weight()
    if weight.shape[1] % weight.blocksize:
        shape, blocksize = list(weight.shape), weight.blocksize
        return Refusal(f"its vector would go into a weight {shape} whose blocks of {blocksize} straddle rows")
    return target


def merge_ia3(model: nn.Module, adapter_names: list[str] | None = None) -> None:
    """Merges a model's (IA)³ vectors into its weights, all or none, without quantising a 4-bit weight again.

    A vector on a layer's output scales the rows of its weight: in 4 bits, the statistics of the rows' blocks, which
    become plain fp32 if they were nested (0.37 bits more a weight). One on a layer's input goes into the rows of
    the layer that makes the input: the up-projection of a gated MLP, or the layer before a ReLU. Dense layers are
    merged by PEFT. `model.unmerge_adapter()` puts the 4-bit originals back.

    Args:
        model: PEFT's, accelerated.
        adapter_names: by default the active ones.

    Raises:
        TypeError: `model` is not a module.
        ValueError: `adapter_names` has a name that no adapter has; or layers that this can't be done for, each with
            the reason. Nothing has been merged then.
    """
    check_module(model)
    known = {name for layer in model.modules() if isinstance(layer, ia3.IA3Layer) for name in layer.ia3_l}
    if not (adapter_names is None or (isinstance(adapter_names, (list, tuple)) and known >= set(adapter_names))):
        raise ValueError(f"adapter_names: got {adapter_names!r}, wanted a list of some of {sorted(known)}")
    merges: list[tuple[Callable[..., None], tuple[Any, ...]]] = []
    problems: list[str] = []
    for name, layer in model.named_modules():
        if not isinstance(layer, ia3.IA3Layer):
            continue
        names = [adapter for adapter in check_adapters_to_merge(layer, adapter_names) if adapter in layer.ia3_l]
        if not names:
            continue
        if isinstance(layer, ia3.Linear):
            merges.append((layer.merge, (False, names)))
            continue
        target = _target(model, name, layer, names)
        if isinstance(target, Refusal):
            problems.append(f"{name}: {target.reason}")
        else:
            merge_into = layer.merge_into  # type: ignore[attr-defined]  # only a Linear4bit has a target
            merges.append((merge_into, (target, False, names)))
    if problems:
        raise ValueError("model: got (IA)³ that can't be merged without loss\n" + "\n".join(problems))
    for merge, arguments in merges:
        merge(*arguments)
