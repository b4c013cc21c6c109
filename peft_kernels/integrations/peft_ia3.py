"""PEFT's `ia3.Linear` and `ia3.bnb.Linear4bit`, fused: the product and the product of the active adapters' vectors.

(IA)³: Liu et al. 2022 (arXiv:2205.05638).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from peft.tuners import ia3
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from ..ops._linear import few_rows
from ..ops.ia3_linear import ia3_linear
from ..ops.nf4 import NF4Weight
from .linear import BaseProduct, OnLinear, is_conv1d, why_not_skip
from .lookalike import form_of
from .registry import FLOAT_DTYPES, FusedLayer, check_module, register
from .transformers_layers import FusedGatedMLP


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
            y: Tensor = super().forward(x, *args, **kwargs)
            return y
        call = self._call(x, args, kwargs)
        if isinstance(call, str):
            self.log_stock_path(call)
            y = super().forward(x, *args, **kwargs)
            return y
        (weight, bias, compute_dtype, out_dtype), scale = call
        l_in, l_out = (scale, None) if self.is_feedforward else (None, scale)
        return ia3_linear(x, weight, bias, l_in, l_out, compute_dtype=compute_dtype, out_dtype=out_dtype)

    def base_product(self, base: nn.Module, x: Tensor) -> BaseProduct | str:
        """What `ia3_linear` is to be called with for the base layer; or why this input has to take the stock path."""
        raise NotImplementedError

    def _call(
        self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[BaseProduct, Tensor | None] | str:
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
        scale, vectors, device = None, self._modules["ia3_l"], self.base_layer.weight.device
        for name in self.active_adapters:
            if name not in vectors:
                continue
            vector = vectors[name]
            if vector.dtype not in FLOAT_DTYPES:
                return f"adapter {name!r} is {vector.dtype}"
            if vector.device != device:
                return f"adapter {name!r} is on {vector.device.type}"
            scale = vector.flatten() if scale is None else scale * vector.flatten()
        return scale


@register
class Linear(OnLinear, FusedIA3, ia3.Linear):
    __doc__ = FusedIA3.__doc__

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if is_conv1d(self._modules["base_layer"]) and few_rows(x):
            return ia3.Linear.forward(
                self, x, *args, **kwargs
            )  # the product would be torch's, and the call takes longer
        return super().forward(x, *args, **kwargs)


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
    class Linear4bit(FusedIA3, ia3.Linear4bit):  # type: ignore[misc]  # PEFT looks it up when asked
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
            _scale_rows(target, self, scale)
            self.__dict__["_merged_into"] = target  # not as a submodule
            self.merged_adapters.extend(names)

        def unmerge(self) -> None:
            if self._merged_into is not None:
                _scale_rows(self._merged_into, self, None)
            self.__dict__.pop("_merged_into", None)
            self.merged_adapters.clear()

    def _scale_rows(layer: Any, owner: nn.Module, scale: Tensor | None) -> None:
        """Scales the rows of a 4-bit layer, weight and bias, once more; None undoes all that the owner has done."""
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
            weight = bnb.nn.modules.Params4bit(
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

    # Modules whose output, times a vector, can be had from the rows of one of their layers: gate · up feeds down, and
    # ReLU commutes with factors that are not negative. They are recognised by their code, or else by their names.
    _GATED_MLPS = ("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP")

    def _producer(parent: Any, leaf: str, scale: Tensor) -> Any:
        """The layer whose rows take the vector on the input of another; or why there is none."""
        kind = type(parent).__name__
        if leaf == "down_proj" and (form_of(type(parent)) is FusedGatedMLP or kind in _GATED_MLPS):
            return parent.up_proj
        if kind == "OPTDecoderLayer" and leaf == "fc2":
            if not isinstance(parent.activation_fn, nn.ReLU):
                return f"its input comes out of a {type(parent.activation_fn).__name__}, through which no factor passes"
            if (scale < 0).any():
                return "its input comes out of a ReLU, through which no negative factor passes"
            return parent.fc1
        return f"no layer is known whose rows make the input of {leaf!r} in a {kind}"

    def _target(model: nn.Module, name: str, layer: ia3.IA3Layer, names: list[str]) -> nn.Module | str:
        """The 4-bit layer whose rows take a layer's vector; or why there is none."""
        if not isinstance(layer, Linear4bit):
            return "it is not fused: call accelerate first"
        target: nn.Module | str = layer.base_layer
        if layer.is_feedforward:
            parent, _, leaf = name.rpartition(".")
            scale = math.prod(layer.ia3_l[adapter].detach() for adapter in names)
            target = _producer(model.get_submodule(parent), leaf, scale)
            if isinstance(target, str):
                return target
            if isinstance(target, ia3.IA3Layer):
                target = target.base_layer
        if not isinstance(target, Fused4bit):
            return f"its vector would go into a {type(target).__name__}, which is no fused 4-bit layer"
        weight = target.nf4_weight()
        if weight.shape[1] % weight.blocksize:
            shape, blocksize = list(weight.shape), weight.blocksize
            return f"its vector would go into a weight {shape} whose blocks of {blocksize} straddle rows"
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
            if isinstance(target, str):
                problems.append(f"{name}: {target}")
            else:
                assert isinstance(layer, Linear4bit)  # else there is no target
                merges.append((layer.merge_into, (target, False, names)))
        if problems:
            raise ValueError("model: got (IA)³ that can't be merged without loss\n" + "\n".join(problems))
        for merge, arguments in merges:
            merge(*arguments)
