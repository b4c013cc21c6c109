"""PEFT's `ia3.Linear` and `ia3.bnb.Linear4bit`, fused: the product and the product of the active adapters' vectors.

(IA)³: Liu et al. 2022 (arXiv:2205.05638).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from peft.tuners import ia3
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from ..ops.ia3_linear import ia3_linear
from ..ops.nf4 import NF4Weight
from .linear import BaseProduct, dense_product, why_not_linear, why_not_skip, why_not_weight
from .registry import FLOAT_DTYPES, FusedLayer, register


class FusedIA3(FusedLayer):
    """`y = x Wᵀ + b` with x, or y, times the product of the active adapters' vectors, in x's dtype.

    Merged or disabled adapters take PEFT's own forward, which calls the base layer.
    """

    def why_stock(self) -> str | None:
        if reason := why_not_skip(self.base_layer):
            return f"its base layer has {reason}"
        scale = self._scale()
        return scale if isinstance(scale, str) else None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self._disable_adapters or self.merged_adapters:
            return super().forward(x, *args, **kwargs)
        call = self._call(x, args, kwargs)
        if isinstance(call, str):
            self.log_stock_path(call)
            return super().forward(x, *args, **kwargs)
        (weight, bias, compute_dtype, out_dtype), scale = call
        l_in, l_out = (scale, None) if self.is_feedforward else (None, scale)
        return ia3_linear(x, weight, bias, l_in, l_out, compute_dtype=compute_dtype, out_dtype=out_dtype)

    def base_product(self, base: nn.Module, x: Tensor) -> BaseProduct | str:
        """What `ia3_linear` is to be called with for the base layer; or why this input has to take the stock path."""
        raise NotImplementedError

    def _call(self, x: Tensor, args: tuple, kwargs: dict[str, Any]) -> tuple[BaseProduct, Tensor | None] | str:
        if args or kwargs:
            return "further arguments were given"
        base = self._modules["base_layer"]
        if reason := why_not_skip(base):
            return f"its base layer has {reason}"
        product = self.base_product(base, x)
        if isinstance(product, str):
            return product
        scale = self._scale()
        return scale if isinstance(scale, str) else (product, scale)

    def _scale(self) -> Tensor | str | None:
        """The product of the active adapters' vectors, None if there is none; or why it can't be fused."""
        scale, vectors = None, self._modules["ia3_l"]
        for name in self.active_adapters:
            if name not in vectors:
                continue
            vector = vectors[name]
            if vector.dtype not in FLOAT_DTYPES:
                return f"adapter {name!r} is {vector.dtype}"
            scale = vector.flatten() if scale is None else scale * vector.flatten()
        return scale


@register
class Linear(FusedIA3, ia3.Linear):
    __doc__ = FusedIA3.__doc__

    @classmethod
    def why_not(cls, layer: nn.Module) -> str | None:
        if reason := why_not_linear(layer.base_layer):
            return reason
        return "its base weight is stored transposed (fan_in_fan_out)" if layer.fan_in_fan_out else None

    def why_stock(self) -> str | None:
        base = self.base_layer
        return why_not_linear(base) or why_not_weight(base.weight) or super().why_stock()

    def base_product(self, base: nn.Module, x: Tensor) -> BaseProduct | str:
        return dense_product(base, x)


if hasattr(ia3, "Linear4bit"):  # bitsandbytes is installed
    import bitsandbytes as bnb
    from bitsandbytes.functional import QuantState

    from .bitsandbytes import Fused4bit

    @dataclass
    class _Unscaled:
        """The weight and the bias of a 4-bit layer before (IA)³ vectors were merged into it; and these, by their
        owner."""

        weight: nn.Parameter
        bias: Tensor | None
        scales: dict[nn.Module, Tensor]

    @register
    class Linear4bit(FusedIA3, ia3.Linear4bit):
        """(IA)³ on a 4-bit weight. The result has x's dtype; PEFT's has fp32, to which it casts any x.

        PEFT can't merge this layer. Where rows don't share blocks, `merge` scales the blocks' statistics instead of
        quantising again, and `unmerge` puts the originals back. A vector on the input is merged into the layer that
        makes the input, which only `merge_ia3` can know.
        """

        own_state = ("_merged_into",)
        _merged_into: nn.Module | None = None

        def release(self) -> None:
            if self.merged_adapters:  # which the stock layer would apply a second time
                self.unmerge()

        def why_stock(self) -> str | None:
            if not isinstance(self.base_layer, Fused4bit):
                return f"its base layer, a {type(self.base_layer).__name__}, is not fused"
            return self.base_layer.why_stock() or super().why_stock()

        def base_product(self, base: nn.Module, x: Tensor) -> BaseProduct | str:
            return base.base_product(x) if isinstance(base, Fused4bit) else "its base layer is not fused"

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if self.merged_adapters and not self._disable_adapters:
                return self.base_layer(x)  # PEFT's forward knows of no merged adapter
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
            _scale_rows(target, self, scale)
            self._merged_into = target
            self.merged_adapters.extend(names)

        def unmerge(self) -> None:
            if self._merged_into is not None:
                _scale_rows(self._merged_into, self, None)
            self._merged_into = None
            self.merged_adapters.clear()

    def _scale_rows(layer: nn.Module, owner: nn.Module, scale: Tensor | None) -> None:
        """Scales the rows of a 4-bit layer, weight and bias, once more; None undoes all that the owner has done."""
        unscaled = vars(layer).get("_unscaled") or _Unscaled(layer.weight, layer.bias, {})
        scales = {key: value for key, value in unscaled.scales.items() if key is not owner}
        if scale is not None:
            scales[owner] = unscaled.scales.get(owner, 1) * scale
        device = layer.weight.device
        weight, bias = unscaled.weight.to(device), unscaled.bias
        if scales:
            product = math.prod(value.to(device) for value in scales.values())
            view = NF4Weight.from_params4bit(weight).scale_rows(product)
            weight = bnb.nn.Params4bit(
                weight.data,  # the codes, shared
                requires_grad=False,
                quant_state=QuantState.from_dict(view.as_dict(), device=device),
                blocksize=view.blocksize,
                compress_statistics=False,
                quant_type=view.quant_type,
                quant_storage=weight.quant_storage,
                module=layer,
                bnb_quantized=True,
            )
            if bias is not None:
                bias = nn.Parameter((bias.double() * product).to(bias.dtype), requires_grad=False)
            unscaled.scales = scales
            vars(layer)["_unscaled"] = unscaled
        else:
            vars(layer).pop("_unscaled", None)
        layer.weight, layer.bias = weight, bias
        layer.quant_state = layer.weight.quant_state
