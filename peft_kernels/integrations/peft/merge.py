"""PEFT's LoRA layers and models, merged so that unmerging restores every bit; see `peft_kernels.merging`.

A weight is kept as it was, since PEFT's unmerge subtracts the adapters and rounds, or quantises, once more.

What a merge into 4 bits loses was measured on a layer of SmolLM2, with four adapters of rank 16 of decaying spectra,
whose change was 2 to 10 % of the weight. The codes alone lose 79 to 109 % of the change, since its elements are smaller
than the codes' steps. Choosing each block's absmax among up to seven candidates, the old one among them, costs no byte
and gains 6 to 8 %. A correction of rank 16, which takes 3 % of a 4-bit weight of 4096 x 4096, leaves 46 to 48 %, and
one of rank 32 leaves 21 %, if it is taken from the change before the rest is quantised. Taken from what the
quantisation has lost, it leaves 63 to 75 and 48 to 72 %; decomposing what both have lost once more gains 1 to 2 %. So
it is taken from the change, which needs no more than the adapters' factors, and the codes are what bitsandbytes would
choose.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from ... import merging
from ...inference.guards import ONCE, Reading
from ...ops._sums import Term, differences, requantized, rounded, share
from ...ops._svd import low_rank_factors
from ...ops.combine import svd_of_sum
from ...ops.dora_linear import dora_norm
from ...ops.lora_linear import lora_linear
from ...ops.nf4 import NF4Weight
from ..base_layer import Adapters, BaseProduct, is_conv1d, is_plain, why_not_skip
from ..refusal import Refusal
from ..registry import FusedLayer
from .merge_model import BROKEN, is_finite, unloading

if TYPE_CHECKING:
    from ..bitsandbytes.linear4bit import Correction

# The layer that PEFT's own merge or unmerge is running in; for DoRA it calls the layer's methods from within.
_inside: ContextVar[nn.Module | None] = ContextVar("peft_kernels_inside", default=None)


class _State(NamedTuple):
    """All of a layer that a merge changes. The tensors are replaced by it, never written to."""

    base: Any
    weight: nn.Parameter
    bias: Tensor | None
    correction: Correction | None
    adapters: list[str]
    caches: dict[str, Any]
    kept: _Kept | None


class _Kept(NamedTuple):
    """What an unmerge puts back, and the weight that it is put back for.

    Attributes:
        state: None where the limit of `merging.options` left no room for it.
        merged: the parameter that the merge has left.
        checksum: of a dense one, whose memory `load_state_dict` may write to.
        can_recompute: whether PEFT's arithmetic may stand in for the state.
    """

    state: _State | None
    merged: nn.Parameter
    checksum: int | None
    can_recompute: bool


class _Merged(NamedTuple):
    """What a merge has found."""

    weight: NF4Weight | Tensor
    correction: tuple[Tensor, Tensor] | None
    error: float = 0.0
    lost: float = 0.0
    remark: str = ""

    @property
    def is_finite(self) -> bool:
        """A block's absmax is not, where an element is not; nor is then the mean of 8-bit statistics."""
        if not isinstance(self.weight, NF4Weight):
            return bool(self.weight.isfinite().all())
        statistics = self.weight.nested[-1] if self.weight.nested else self.weight.absmax
        return math.isfinite(self.error) and bool(statistics.isfinite().all())


class Linear16bit(nn.Linear):
    """A dense layer in the place of a 4-bit one; it returns x's dtype, as that does."""

    def __init__(self, weight: Tensor, bias: nn.Parameter | None, compute_dtype: torch.dtype) -> None:
        n, k = weight.shape
        super().__init__(k, n, bias=False, device="meta", dtype=weight.dtype)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_parameter("bias", bias)
        self.compute_dtype = compute_dtype

    def forward(self, x: Tensor) -> Tensor:
        return lora_linear(x, self.weight, self.bias, compute_dtype=self.compute_dtype, out_dtype=x.dtype)


class Merges(FusedLayer):
    """A LoRA layer whose merge keeps what it replaces, and whose unmerge puts it back; goes before PEFT's class.

    A merge that fails changes nothing.
    """

    own_state = ("_kept",)
    _kept: _Kept | None = None

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merges adapters, all at once, following `merging.options`.

        Raises:
            ValueError: with `safe_merge`, or a correction, a sum is not finite; or there is no room for what `unmerge`
                needs.
        """
        if _inside.get() is self:
            self._by_peft("merge", safe_merge=safe_merge, adapter_names=adapter_names)
            return
        stock: Any = self
        names = [name for name in check_adapters_to_merge(stock, adapter_names) if name in self.lora_A]
        if names:
            self._merge(names, safe_merge)

    def unmerge(self) -> None:
        """
        Raises:
            RuntimeError: what it needs was not kept, as `merging.options` was told.
        """
        kept = None if _inside.get() is self else self._kept_for_weight()
        if kept is not None and kept.state is None and not kept.can_recompute:
            raise RuntimeError(f"unmerge: got {self.merged_adapters} merged, {_NOT_KEPT}")
        if kept is None or kept.state is None:
            self._recompute()
        else:
            self._put_back(kept.state)
        if _inside.get() is not self:
            self._kept = None

    def why_not_unmerge(self) -> str | None:
        kept = self._kept_for_weight()
        return _NOT_KEPT if kept is not None and kept.state is None and not kept.can_recompute else None

    def _merge(self, names: list[str], safe_merge: bool) -> None:
        raise NotImplementedError

    def _put_back(self, state: _State) -> None:
        raise NotImplementedError

    def _recompute(self) -> None:
        """Unmerges by PEFT's arithmetic."""
        self._by_peft("unmerge")

    def _by_peft(self, method: str, **arguments: Any) -> None:
        token = _inside.set(self)
        try:
            getattr(self.stock, method)(self, **arguments)
        finally:
            _inside.reset(token)

    def _kept_for_weight(self) -> _Kept | None:
        """None where the layer is not merged, or its weight was replaced or loaded since."""
        kept, weight = self._kept, self.get_base_layer().weight
        fits = kept is not None and self.merged and kept.merged is weight and kept.checksum == self._checksum()
        return kept if fits else None

    def _checksum(self) -> int | None:
        return None

    def _put_back_rest(self, state: _State) -> None:
        self.merged_adapters[:] = state.adapters
        self._caches.clear()
        self._caches.update(state.caches)
        self._kept = state.kept

    def _keep(self, original: _State | None, can_recompute: bool) -> None:
        self._kept = _Kept(original, self.get_base_layer().weight, self._checksum(), can_recompute)

    def _state(self) -> _State:
        base = self.get_base_layer()
        bias = None if base.bias is None else base.bias.data
        correction = base.correction() if hasattr(base, "correction") else None
        return _State(base, base.weight, bias, correction, [*self.merged_adapters], {**self._caches}, self._kept)

    def _keeps(self, size: int) -> tuple[bool, bool]:
        """Whether so many bytes are to be kept, and whether PEFT's arithmetic may do without them.

        Raises:
            ValueError: there is no room.
        """
        options = merging.current.get()
        if unloading.get():
            return False, False
        if options is None or options.room is None or size <= options.room:
            return True, True
        if options.beyond == "error":
            raise ValueError(
                f"keep_at_most: got {options.keep_at_most} bytes, of which {options.room} are left, wanted {size} more "
                'for the weight that unmerge needs, or another choice of beyond than "error"'
            )
        return False, options.beyond == "recompute"

    def _knows(self, names: Sequence[str]) -> bool:
        """Whether these adapters are nothing but LoRA and DoRA, and all there."""
        return all(
            name in self.lora_A and type(self.lora_variant.get(name)) in (type(None), DoraLinearVariant)
            for name in names
        )

    def _terms(self, names: Sequence[str], weight: Tensor | NF4Weight) -> tuple[list[Term], dict[str, Tensor]]:
        """What the adapters make of the weight [N, K]; and the norms that each DoRA divides by."""
        terms, norms = [], {}
        for name in names:
            a, b = (part[name].weight.detach() for part in (self.lora_A, self.lora_B))
            scaling, factor = float(self.scaling[name]), None
            if name in self.lora_variant:
                norm = dora_norm(weight, a, b, scaling)
                factor = self.lora_magnitude_vector[name].weight.detach().float() / norm
                norms[name] = norm
            terms.append(Term(a, b, scaling, factor))
        return terms, norms

    def _check_finite(self, names: Sequence[str], merged: _Merged | None = None) -> None:
        """Of the adapters themselves, or of what they were merged to, as finite factors can overflow."""
        broken = [name for name in names if not is_finite(self, name)]
        if not broken and merged is not None and not merged.is_finite:
            broken = [names[-1]]
        if broken:
            raise ValueError(BROKEN.format(broken[0]))

    def _report(self, form: str, merged: _Merged, added: int, kept: int) -> None:
        options = merging.current.get()
        if options is None:
            return
        rank = 0 if merged.correction is None else merged.correction[0].shape[0]
        options.report._layers.append(
            merging.MergedLayer(
                options.names.get(self, ""), tuple(self.merged_adapters), form, rank, merged.error, merged.lost, added,
                kept, merged.remark,
            )
        )  # fmt: skip


class MergesDense(Merges):
    """Sums by PEFT; the original is a copy, because PEFT adds to the weight where it lies."""

    def _merge(self, names: list[str], safe_merge: bool) -> None:
        state, kept = self._state(), self._kept_for_weight()
        weight, bias = state.weight.data.clone(), None if state.bias is None else state.bias.clone()
        before = state._replace(weight=nn.Parameter(weight, requires_grad=False), bias=bias)
        size = weight.nbytes + (0 if bias is None else bias.nbytes)
        if kept is not None:
            original, can_recompute = kept.state, kept.can_recompute
        else:
            keeps, can_recompute = (False, True) if self.merged else self._keeps(size)
            original = before._replace(kept=None) if keeps else None
        try:
            self._by_peft("merge", safe_merge=safe_merge, adapter_names=names)
        except BaseException:
            self._put_back(before)
            raise
        self._keep(original, can_recompute)
        more = 0 if original is None or kept is not None else size
        self._report_sum(original if before.adapters else before, more)

    def _report_sum(self, original: _State | None, kept: int) -> None:
        options, base = merging.current.get(), self.get_base_layer()
        if options is None:
            return
        error = lost = math.nan
        if original is not None and is_plain(base.weight) and self._knows(self.merged_adapters):
            weights = [weight.detach() for weight in (original.weight, base.weight)]
            before, after = (weight.T for weight in weights) if is_conv1d(base) else weights
            found = differences(before, self._terms(self.merged_adapters, before)[0], after)
            error, lost = share(found.lost, found.whole), share(found.lost, found.change)
        asked = options.correction or options.dense_above is not None
        remark = "it is not quantised, so there is nothing to correct" if asked else ""
        self._report("dense", _Merged(base.weight, None, error, lost, remark), 0, kept)

    def _checksum(self) -> int | None:
        weight = self.get_base_layer().weight.data
        integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}.get(weight.element_size())
        return None if integers is None or not is_plain(weight) else int(weight.view(integers).sum())

    def _put_back(self, state: _State) -> None:
        base = self.get_base_layer()
        for value, now in ((state.weight, base.weight), (state.bias, base.bias)):
            if value is not None:
                now.data.copy_(value)
        self._put_back_rest(state)


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

    def _merge_by_peft(self, names: list[str], safe_merge: bool, before: _State, original: _State | None) -> None:
        """Adapters one after the other: of kinds that are more than LoRA, or beside one merged before it was kept."""
        size = _size(before.weight) if original is not None and original.weight is before.weight else 0
        keeps, can_recompute = (False, True) if original is None else self._keeps(size)
        try:
            self._by_peft("merge", safe_merge=safe_merge, adapter_names=names)
        finally:
            before.weight.bnb_quantized = True  # type: ignore[attr-defined]  # else .to() would quantise the codes
        self._keep(original if keeps else None, can_recompute)
        merged = _Merged(before.weight, before.correction, math.nan, math.nan, "one adapter after the other, by PEFT")
        self._report("4-bit", merged, 0, size if keeps else 0)

    def _merge_at_once(self, names: list[str], safe_merge: bool, original: _State, is_kept: bool) -> None:
        options, base = merging.current.get(), original.base
        device = self.get_base_layer().weight.device
        weight: Any = original.weight if original.weight.device == device else original.weight.to(device)
        view = NF4Weight.from_params4bit(weight)
        unchanged = [] if original.correction is None else [Term(*original.correction)]
        terms, norms = self._terms(names, view)
        terms = unchanged + terms
        checks = safe_merge or (options is not None and options.correction)
        if checks:
            self._check_finite(names)
        bias = self._merged_bias(names, original.bias)
        keeps, can_recompute, size, more = True, True, _size(weight), 0 if is_kept else _size(weight)
        if options is None:
            merged = _Merged(requantized(view, terms), None)
            keeps, can_recompute = self._keeps(more)
        else:
            rank, remark = options.correction, ""
            if rank < _rank(terms):  # else the codes stay
                keeps, can_recompute = self._keeps(more)
            if norms and can_recompute and not keeps:
                rank, remark = 0, "not corrected: PEFT's unmerge of DoRA knows of no correction"
            try:
                merged = _corrected(base, view, terms, unchanged, rank)._replace(remark=remark)
            except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]  # products that overflow
                raise ValueError(BROKEN.format(names[-1])) from error
            if options.dense_above is not None and merged.lost > options.dense_above:
                reason = self._why_not_dense(base, keeps or not can_recompute)
                merged = merged._replace(remark=reason) if reason else _dense(base, view, terms, unchanged)
        if checks:
            self._check_finite(names, merged)
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
            parameter = None if bias is None else nn.Parameter(bias, requires_grad=False)
            dense = Linear16bit(merged.weight, parameter, base.compute_dtype or view.dtype)
            self.base_layer_is(dense.train(base.training))
        self.merged_adapters[:] = names
        for name, norm in norms.items():
            self._cache_store(f"{name}-weight_norm", norm)  # where PEFT's unmerge looks for it
        self._keep(original if keeps else None, can_recompute)
        self._report(form, merged, added, more if keeps and changes else 0)

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

    def _put_back(self, state: _State) -> None:
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


_NOT_KEPT = 'wanted a merge that kept the weights: beyond="keep_none" left them out'


def _rank(terms: Sequence[Term]) -> float:
    """That the change surely has no more than."""
    changing = _changing(terms)
    return math.inf if any(term.factor is not None for term in changing) else sum(len(term.a) for term in changing)


def _changing(terms: Sequence[Term]) -> list[Term]:
    return [term for term in terms if term.factor is not None or bool(term.a.any() and term.b.any())]


def _corrected(base: Any, view: NF4Weight, terms: list[Term], unchanged: list[Term], rank: int) -> _Merged:
    """Codes and a correction, and what both lose."""
    changing, most = _changing(terms), _rank(terms)
    correction: tuple[Tensor, Tensor] | None = None
    if rank and changing:
        if most <= rank:
            a = torch.cat([term.a.float() for term in changing])
            b = torch.cat([term.b.float() * term.scaling for term in changing], dim=1)
        elif most < math.inf:
            lora_A, lora_B = [term.a for term in changing], [term.b for term in changing]
            u, s, vh = svd_of_sum(lora_A, lora_B, [term.scaling for term in changing], [1.0] * len(changing))
            a, b = vh * s.sqrt()[:, None], u * s.sqrt()
        else:
            a, b = low_rank_factors(rounded(view, terms, torch.float32) - view.dequantize(torch.float32), rank)
        dtype = base.compute_dtype or view.dtype
        correction = a[:rank].to(dtype), b[:, :rank].to(dtype).contiguous()
    stored = [] if correction is None else [Term(*correction)]
    codes = view
    if most > rank:
        codes = requantized(view, terms + [term._replace(scaling=-1.0) for term in stored])
    return _compared(view, terms, unchanged, codes, correction)


def _dense(base: Any, view: NF4Weight, terms: list[Term], unchanged: list[Term]) -> _Merged:
    """The sum in 16 bits, and what it loses."""
    halves = [dtype for dtype in (base.compute_dtype, view.dtype) if dtype in (torch.bfloat16, torch.float16)]
    return _compared(view, terms, unchanged, rounded(view, terms, [*halves, torch.bfloat16][0]), None)


def _compared(
    view: NF4Weight,
    terms: list[Term],
    unchanged: list[Term],
    stored: NF4Weight | Tensor,
    correction: tuple[Tensor, Tensor] | None,
) -> _Merged:
    found = differences(view, terms, stored, [] if correction is None else [Term(*correction)], unchanged)
    return _Merged(stored, correction, share(found.lost, found.whole), share(found.lost, found.change))


def _size(weight: Any) -> int:
    """Bytes of a 4-bit weight, codes and statistics."""
    view = NF4Weight.from_params4bit(weight)
    return sum(tensor.nbytes for tensor in (view.codes, view.absmax, *view.nested))
