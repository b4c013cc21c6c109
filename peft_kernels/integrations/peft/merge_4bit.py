"""How a LoRA layer in 4 bits merges."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ... import merging
from ...inference.guards import ONCE, Reading
from ...ops._sums import Term, requantized
from ...ops.lora_linear import lora_linear
from ...ops.nf4 import NF4Weight
from ..base_layer import Adapters, BaseProduct, why_not_skip
from ..refusal import Refusal
from .merge import Merges, State
from .merge_model import BROKEN
from .merged_weight import MergedWeight, Sum, corrected, in_16_bits


class Linear16bit(nn.Linear):
    """A dense layer in the place of a 4-bit one; it returns x's dtype, as that does."""

    def __init__(self, weight: Tensor, bias: Tensor | None, compute_dtype: torch.dtype) -> None:
        n, k = weight.shape
        super().__init__(k, n, bias=False, device="meta", dtype=weight.dtype)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
        self.compute_dtype = compute_dtype

    def forward(self, x: Tensor) -> Tensor:
        return lora_linear(x, self.weight, self.bias, compute_dtype=self.compute_dtype, out_dtype=x.dtype)


class Merges4bit(Merges):
    """Dequantises, adds all adapters in fp32, and quantises once.

    The merged weight keeps the dtype that the 4-bit weight is dequantised to, where PEFT's takes that of the adapters.
    """

    def adapted_product(self, x: Tensor, read: Reading = ONCE) -> tuple[BaseProduct, Adapters] | Refusal:
        merged = read.length(read.attribute(self, "merged_adapters"))
        if merged and not read.attribute(self, "_disable_adapters"):
            base = read.module(self._modules, "base_layer")
            if hasattr(base, "correction") and not why_not_skip(base):
                found: tuple[BaseProduct, Adapters] | Refusal = base.adapted_product(x, read)
                return found
        own: tuple[BaseProduct, Adapters] | Refusal = super().adapted_product(x, read)  # type: ignore[misc]  # FusedLoRA's
        return own

    def why_not_restore(self) -> str | None:
        is_dense = isinstance(self.get_base_layer(), Linear16bit)
        return "a merge has made dense, wanted it unmerged" if is_dense else super().why_not_restore()

    def _merge(self, names: list[str], safe_merge: bool) -> None:
        before, kept = self._state(), self._kept_for_weight()
        original = before if not self.merged else None if kept is None else kept.state
        everything = [*self.merged_adapters, *names]
        try:
            if original is None or not self._knows(everything) or original.base.why_stock():
                self._merge_by_peft(names, safe_merge, before, original)
            else:
                is_kept = original.weight is not before.weight
                self._merge_at_once(everything, safe_merge, original, is_kept)
        except BaseException:
            self._put_back(before)
            raise

    def _merge_by_peft(self, names: list[str], safe_merge: bool, before: State, original: State | None) -> None:
        """Adapters one after the other: of kinds that are more than LoRA, or beside one merged before it was kept."""
        size = _size(before.weight) if original is not None and original.weight is before.weight else 0
        keeps, can_recompute = (False, True) if original is None else self._keeps(size)
        try:
            self._by_peft("merge", safe_merge=safe_merge, adapter_names=names)
        finally:
            before.weight.bnb_quantized = True  # type: ignore[attr-defined]  # else .to() would quantise the codes
        self._keep(original if keeps else None, can_recompute)
        merged = MergedWeight(
            before.weight, before.correction, math.nan, math.nan, "one adapter after the other, by PEFT"
        )
        self._report("4-bit", merged, 0, size if keeps else 0)

    def _merge_at_once(self, names: list[str], safe_merge: bool, original: State, is_kept: bool) -> None:
        """All adapters in one sum with the original weight."""
        options, base = merging.current.get(), original.base
        device = self.get_base_layer().weight.device
        weight: Any = original.weight if original.weight.device == device else original.weight.to(device)
        view, size = NF4Weight.from_params4bit(weight), _size(weight)
        unchanged = [] if original.correction is None else [Term(*original.correction)]
        terms, norms = self._terms(names, view)
        total = Sum(view, unchanged + terms, unchanged)
        checks = safe_merge or (options is not None and options.correction)
        if checks:
            self._check_finite(names)
        bias = self._merged_bias(names, original.bias)
        more = 0 if is_kept else size
        try:
            merged, keeps, can_recompute = self._stored(base, total, more, is_dora=bool(norms))
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]  # products that overflow
            raise ValueError(BROKEN.format(names[-1])) from error
        if checks and not merged.is_finite:  # the sum of finite factors can overflow
            raise ValueError(BROKEN.format(names[-1]))
        changes = merged.weight is not view
        self.base_layer_is(base)
        if isinstance(merged.weight, NF4Weight):
            form, added = "4-bit", sum(factor.nbytes for factor in merged.correction or ())
            base.set_weight(base.parameter_of(merged.weight, weight) if changes else weight)
            base.set_correction(merged.correction)
            if bias is not None:
                base.bias.data = bias
        else:
            form, added = "16-bit", merged.weight.nbytes - size
            dense = Linear16bit(merged.weight, bias, base.compute_dtype or view.dtype)
            self.base_layer_is(dense.train(base.training))
        self.merged_adapters[:] = names
        for name, norm in norms.items():
            self._cache_store(f"{name}-weight_norm", norm)  # where PEFT's unmerge looks for it
        self._keep(original if keeps else None, can_recompute)
        self._report(form, merged, added, more if keeps and changes else 0)

    def _stored(self, base: Any, total: Sum, size: int, is_dora: bool) -> tuple[MergedWeight, bool, bool]:
        """What the sum becomes by `merging.options`, and what `_keeps` says of the original weight's bytes.

        Raises:
            ValueError: there is no room for the original weight.
            torch.linalg.LinAlgError: products overflow.
        """
        options = merging.current.get()
        if options is None:
            return MergedWeight(requantized(total.weight, total.terms)), *self._keeps(size)
        rank, remark = options.correction, ""
        keeps, can_recompute = self._keeps(size) if rank < total.rank else (True, True)  # as the codes stay
        if is_dora and can_recompute and not keeps:
            rank, remark = 0, "not corrected: PEFT's unmerge of DoRA knows of no correction"
        merged = corrected(total, rank, base.compute_dtype or total.weight.dtype)
        if options.dense_above is not None and merged.lost > options.dense_above:
            remark = self._why_not_dense(base, keeps or not can_recompute)
            if not remark:
                merged = in_16_bits(total, base.compute_dtype)
        return merged._replace(remark=remark), keeps, can_recompute

    def _why_not_dense(self, base: nn.Module, can_return: bool) -> str:
        if self.get_base_layer() is not self.base_layer:
            return "not made dense: it is below another adapter's layer"
        if not can_return:
            return "not made dense: there is no room to keep its codes"
        reason = why_not_skip(base)
        return f"not made dense: the 4-bit layer has {reason}" if reason else ""

    def _merged_bias(self, names: Sequence[str], bias: Tensor | None) -> Tensor | None:
        """PEFT's 4-bit layer forgets `scaling` here, so that it computes something else merged than unmerged."""
        biased = [name for name in names if self.lora_bias.get(name)]
        if not biased:
            return bias
        if bias is None:
            raise RuntimeError("Impossible to merge LoRA with `lora_bias=True` because the base layer has no bias.")
        total = bias.float()
        for name in biased:
            total = total + self.lora_B[name].bias.detach().float() * float(self.scaling[name])
        return total.to(bias.dtype)

    def base_layer_is(self, base: nn.Module) -> None:
        """Puts a base layer in the place of another one, where that one is."""
        now = self.get_base_layer()
        if base is not now:
            self.base_layer = base if base.weight.device == now.weight.device else base.to(now.weight.device)

    def _put_back(self, state: State) -> None:
        device = self.get_base_layer().weight.device
        self.base_layer_is(state.base)
        base, weight = state.base, state.weight
        if not isinstance(base, Linear16bit):
            base.weight = weight if weight.device == device else weight.to(device)
            base.quant_state = base.weight.quant_state
        if state.bias is not None:
            base.bias.data = state.bias.to(device)
        if hasattr(base, "set_correction"):
            base.set_correction(state.correction)
        self._put_back_rest(state)

    def _recompute(self) -> None:
        base = self.get_base_layer()
        correction = base.correction() if hasattr(base, "correction") else None
        if correction is None:
            super()._recompute()
            return
        view = base.nf4_weight()
        terms, _ = self._terms(self.merged_adapters, view)
        terms = [Term(*correction), *(term._replace(scaling=-term.scaling) for term in terms)]
        base.set_weight(base.parameter_of(requantized(view, terms), base.weight))
        base.set_correction(None)
        self.merged_adapters.clear()


def _size(weight: Any) -> int:
    """Bytes of a 4-bit weight, codes and statistics."""
    view = NF4Weight.from_params4bit(weight)
    return sum(tensor.nbytes for tensor in (view.codes, view.absmax, *view.nested))
