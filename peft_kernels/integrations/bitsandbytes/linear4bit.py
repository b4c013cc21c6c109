"""bitsandbytes' `Linear4bit`, fused: the 4-bit weight is decoded inside the product.

Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs" (arXiv:2305.14314).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState
from torch import Tensor, nn

from ...cuda import why_not
from ...inference.guards import ONCE, Reading
from ...inference.packed import Adaptable
from ...ops._arguments import FLOAT_DTYPES, autocast_dtype
from ...ops.dora_linear import squares_of_rows
from ...ops.lora_linear import lora_linear_unchecked
from ...ops.nf4 import NF4Weight
from ..base_layer import NO_ADAPTERS, STAND_INS, Adapters, BaseProduct
from ..refusal import Refusal
from ..registry import FusedLayer, Trial, mention, refuse, register, why_not_input
from .params4bit import params4bit

WHY_NOT_8BIT = "its weight has 8 bits, which the kernels do not read"

mention(bnb.nn.modules.Linear4bit)
mention(bnb.nn.modules.Linear8bitLt)
refuse(bnb.nn.modules.Linear8bitLt, WHY_NOT_8BIT)

Correction = tuple[Tensor, Tensor]  # A [r, K] and B [N, r]
_CORRECTION = ("correction_A", "correction_B")


class Fused4bit(Adaptable):
    """`y = x dequant(W)ᵀ + b` in `compute_dtype`, returned in x's dtype, in training and evaluation alike.

    A merge may add a correction, `x Aᵀ Bᵀ` with the frozen parameters `correction_A` [r, K] and `correction_B` [N, r].
    """

    family = "linear4bit"
    derived = ("_view", "_squares", *Adaptable.derived)
    compute_type_is_set: bool
    quant_state: QuantState | None
    _view: tuple[QuantState, NF4Weight] | None = None
    _squares: tuple[NF4Weight, Tensor] | None = None

    # bitsandbytes' own forward, which some inputs still take, repacks the weight in place only if this holds. A
    # property of the class hides the instance's attribute, and leaves it as it was for `restore`.
    support_avx512bf16_for_cpu = property(
        lambda self: False, lambda self, value: vars(self).__setitem__("support_avx512bf16_for_cpu", value)
    )

    def prepare(self) -> str:
        quant_state = getattr(self.weight, "quant_state", None)
        if quant_state is None or not vars(quant_state).get("packing_format_for_cpu", False):
            return ""
        self._undo_repacking(quant_state)
        return "its statistics were already bf16: bitsandbytes had repacked the weight, and it was converted back"

    def why_stock(self) -> str | None:
        if reason := why_not(self.weight.device):
            return reason
        if getattr(self.weight, "quant_state", None) is None and self.quant_state is None:
            return "not quantised yet: bitsandbytes does so when the layer is moved to a device"
        return None

    def trial(self) -> Trial | None:
        if self.why_stock():
            return None
        weight = self.nf4_weight()
        return Trial(self, self.in_features, self.compute_dtype or weight.dtype, weight.codes.device, weight.shape)

    def forward(self, x: Tensor) -> Tensor:
        if self.stock_is_faster(x) and self.correction() is None:
            return self.stock_result(x)
        if (y := self.projected(x)) is not None:
            return y
        found = self._corrected_product(x)  # in a pool, `adapted_product` has the batch's adapters too
        if isinstance(found, Refusal):
            return self.take_stock_path(found.reason, x)
        (weight, bias, compute_dtype, out_dtype), adapters = found
        return lora_linear_unchecked(x, weight, bias, *adapters, compute_dtype, out_dtype)

    def take_stock_path(self, reason: str, *args: Any, **kwargs: Any) -> Tensor:
        y, correction = super().take_stock_path(reason, *args, **kwargs), self.correction()
        if correction is None:
            return y
        a, b = correction
        (x,) = args
        return y + torch.nn.functional.linear(torch.nn.functional.linear(x.to(a.dtype), a), b).to(y.dtype)

    def why_not_restore(self) -> str | None:
        return None if self.correction() is None else "a merge has corrected, wanted it unmerged"

    def correction(self, read: Reading = ONCE) -> Correction | None:
        """What a merge has added to the product."""
        if read.item(self._parameters, "correction_A") is None:
            return None
        return read.parameter(self, "correction_A"), read.parameter(self, "correction_B")

    def set_correction(self, correction: Correction | None) -> None:
        """Puts one in the place of what there is; frozen parameters, so that they are saved and moved."""
        for name, value in zip(_CORRECTION, correction or (None, None), strict=True):
            self._parameters.pop(name, None)
            if value is not None:
                self.register_parameter(name, nn.Parameter(value, requires_grad=False))

    def parameter_of(self, view: NF4Weight, like: Any) -> Any:
        """A 4-bit weight for this layer; see `params4bit`."""
        return params4bit(self, like, view)

    def set_weight(self, weight: Any) -> None:
        self.weight, self.quant_state = weight, weight.quant_state

    def adapted_product(self, x: Tensor, read: Reading = ONCE) -> tuple[BaseProduct, Adapters] | Refusal:
        return self._corrected_product(x, read)

    def _corrected_product(self, x: Tensor, read: Reading = ONCE) -> tuple[BaseProduct, Adapters] | Refusal:
        product, correction = self._own_product(x, read), self.correction(read)
        if isinstance(product, Refusal):
            return product
        if correction is None:
            return product, NO_ADAPTERS
        a, b = correction
        return product, ([a], [b], [1.0], [0.0])

    def base_product(self, x: Tensor, read: Reading = ONCE) -> BaseProduct | Refusal:
        """What `lora_linear` is to be called with, if that is all; or why this input has to take the stock path."""
        if self.correction(read) is not None:
            return Refusal("its base layer has a merge's correction")
        return self._own_product(x, read)

    def _own_product(self, x: Tensor, read: Reading) -> BaseProduct | Refusal:
        if reason := why_not_input(x):
            return Refusal(reason)
        if not x.is_cpu and (reason := why_not(x.device)):
            self._view = None  # the weight has moved: let go of the memory that it had
            return Refusal(reason)
        if not self.compute_type_is_set:
            self.set_compute_type(x)
            self.compute_type_is_set = True
        compute_dtype = read.attribute(self, "compute_dtype")
        own_dtype = compute_dtype or x.dtype
        compute_dtype = autocast_dtype(x) or own_dtype
        if compute_dtype not in FLOAT_DTYPES:
            return Refusal(f"the compute dtype is {compute_dtype}")
        weight = self.nf4_weight(read)
        if x.shape[-1] != weight.shape[-1]:
            return Refusal(f"x has {x.shape[-1]} features, and the weight has shape {list(weight.shape)}")
        bias = read.parameter(self, "bias")
        if bias is not None and bias.dtype != own_dtype:
            if torch.compiler.is_compiling():
                bias = bias.to(own_dtype)
            else:
                bias.data = bias.data.to(own_dtype)  # in place, as bitsandbytes does it
        return weight, bias, compute_dtype, x.dtype

    def nf4_weight(self, read: Reading = ONCE) -> NF4Weight:
        """The view of the weight as it is now.

        It is dear to derive, so the last one is kept for as long as it shows the very tensors that the weight consists
        of. It keeps their memory alive, so no other tensor can come to lie at the same address.

        Raises:
            ValueError: the weight is not quantised, or its quant_state does not fit it.
        """
        weight = read.parameter(self, "weight")
        quant_state = read.attribute(weight, "quant_state", None)
        compiling = torch.compiler.is_compiling() or isinstance(weight, STAND_INS)
        if not compiling and self._view is not None and _shows(*self._view, weight, quant_state, read):
            return self._view[1]
        if compiling and (known := self.quant_state if quant_state is None else quant_state) is not None:
            # The tensor that a non-strict export puts in the weight's place has no quant_state.
            return NF4Weight.from_quant_state(weight, known)
        if quant_state is None and self.quant_state is not None:
            stock: Any = self
            bnb.nn.modules.fix_4bit_weight_quant_state_from_module(stock)
            weight, quant_state = self.weight, self.quant_state
        if quant_state is None:
            return NF4Weight.from_params4bit(weight)
        if vars(quant_state).get("packing_format_for_cpu", False):
            quant_state = self._undo_repacking(quant_state)  # done by a stock layer that shares the weight
        view = NF4Weight.from_params4bit(weight)
        self._view = quant_state, view
        if not _shows(*self._view, weight, quant_state, read):
            read.copies()
        self.quant_state = quant_state  # which it is not yet where the weight has been replaced
        return view

    def squares_of_rows(self) -> Tensor:
        """`‖w‖²` of each row of the weight, [N] in fp32; kept with the view that it was taken of."""
        view = self.nf4_weight()
        if torch.compiler.is_compiling():
            return squares_of_rows(view)
        if self._squares is None or self._squares[0] is not view:
            self._squares = view, squares_of_rows(view)
        return self._squares[1]

    def _undo_repacking(self, quant_state: QuantState) -> QuantState:
        """Converts a weight that bitsandbytes repacked for its CPU inference kernels back to the ordinary format."""
        weight = self.weight
        view = NF4Weight.from_params4bit(weight)
        codes = view.codes.reshape(quant_state.original_qshape)
        weight.data = codes.view(vars(quant_state).get("original_storage_type") or torch.uint8)
        quant_state = QuantState.from_dict(view.as_dict(), device=codes.device)
        weight.quant_state = self.quant_state = quant_state
        return quant_state


class On4bit(FusedLayer):
    """An adapter's fused layer on a `Linear4bit`; goes before the class of its method, as `OnLinear` does."""

    def why_stock(self) -> str | None:
        if not isinstance(self.base_layer, Fused4bit):
            return f"its base layer, a {type(self.base_layer).__name__}, is not fused"
        return self.base_layer.why_stock() or super().why_stock()

    def trial(self) -> Trial | None:
        return None if self.why_stock() else self.base_layer.trial()._replace(layer=self)

    def base_product(self, base: nn.Module, x: Tensor, read: Reading = ONCE) -> BaseProduct | Refusal:
        return base.base_product(x, read) if isinstance(base, Fused4bit) else Refusal("its base layer is not fused")


def _shows(
    seen: QuantState, view: NF4Weight, weight: Tensor, quant_state: QuantState | None, read: Reading = ONCE
) -> bool:
    """Whether the view consists of the weight's and the quant_state's own tensors; not so if any was converted."""
    if seen is not quant_state:
        return False
    if view.absmax is not read.tensor(quant_state, "absmax"):
        return False
    with torch._C.DisableTorchFunctionSubclass():  # Params4bit's __torch_function__ is slow
        if view.codes.data_ptr() != weight.data_ptr():
            return False
    state2 = read.attribute(quant_state, "state2")
    if state2 is None:
        return True
    code, absmax, offset = view.nested
    is_state2 = code is read.tensor(state2, "code") and absmax is read.tensor(state2, "absmax")
    return is_state2 and offset is read.tensor(quant_state, "offset")


@register
class Linear4bit(Fused4bit, bnb.nn.modules.Linear4bit):
    __doc__ = Fused4bit.__doc__


@register
class LinearFP4(Fused4bit, bnb.nn.modules.LinearFP4):
    __doc__ = Fused4bit.__doc__


@register
class LinearNF4(Fused4bit, bnb.nn.modules.LinearNF4):
    __doc__ = Fused4bit.__doc__


@dataclass
class _Unscaled:
    """The weight and the bias of a 4-bit layer before (IA)³ vectors were merged into it; and these, by their
    owner."""

    weight: nn.Parameter
    bias: Tensor | None
    scales: dict[nn.Module, Tensor]


def scale_rows(layer: Any, owner: nn.Module, scale: Tensor | None) -> None:
    """Scales the rows of a 4-bit layer, weight and bias, once more; None undoes all that the owner has done.

    Raises:
        ValueError: a merge has corrected the layer.
    """
    if scale is not None and isinstance(layer, Fused4bit) and layer.correction() is not None:
        raise ValueError("base_layer: got one that a merge has corrected, wanted a 4-bit layer of codes alone")
    unscaled = vars(layer).get("_unscaled") or _Unscaled(layer.weight, layer.bias, {})
    scales = {key: value for key, value in unscaled.scales.items() if key is not owner}
    if scale is not None:
        scales[owner] = unscaled.scales.get(owner, 1) * scale
    device = layer.weight.device
    weight: Any = unscaled.weight
    bias = unscaled.bias
    if weight.device != device:  # the model has moved since
        weight, bias = weight.to(device), None if bias is None else bias.to(device)
    if scales:
        product: Any = math.prod(value.to(device) for value in scales.values())
        view = NF4Weight.from_params4bit(weight).scale_rows(product)
        weight = params4bit(layer, weight, view)
        if bias is not None:
            bias = nn.Parameter((bias.double() * product).to(bias.dtype), requires_grad=False)
        unscaled.scales = scales
        vars(layer)["_unscaled"] = unscaled
    else:
        vars(layer).pop("_unscaled", None)
    layer.weight, layer.bias = weight, bias
    layer.quant_state = layer.weight.quant_state
