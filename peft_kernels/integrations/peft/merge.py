"""PEFT's LoRA layers, merged so that unmerging restores every bit; see `peft_kernels.merging`.

A weight is kept as it was, since PEFT's unmerge subtracts the adapters and rounds, or quantises, once more.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple

from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from ... import merging
from ...ops._sums import Term
from ...ops.dora_linear import dora_norm
from ...ops.nf4 import NF4Weight
from ..registry import FusedLayer
from .merge_model import BROKEN, is_finite, unloading
from .merged_weight import MergedWeight

if TYPE_CHECKING:
    from ..bitsandbytes.linear4bit import Correction

_NOT_KEPT = 'wanted a merge that kept the weights: beyond="keep_none" left them out'

# The layer that PEFT's own merge or unmerge is running in; for DoRA it calls the layer's methods from within.
_inside: ContextVar[nn.Module | None] = ContextVar("peft_kernels_inside", default=None)


class State(NamedTuple):
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

    state: State | None
    merged: nn.Parameter
    checksum: int | None
    can_recompute: bool


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

    def _put_back(self, state: State) -> None:
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

    def _put_back_rest(self, state: State) -> None:
        self.merged_adapters[:] = state.adapters
        self._caches.clear()
        self._caches.update(state.caches)
        self._kept = state.kept

    def _keep(self, original: State | None, can_recompute: bool) -> None:
        self._kept = _Kept(original, self.get_base_layer().weight, self._checksum(), can_recompute)

    def _state(self) -> State:
        base = self.get_base_layer()
        bias = None if base.bias is None else base.bias.data
        correction = base.correction() if hasattr(base, "correction") else None
        return State(base, base.weight, bias, correction, [*self.merged_adapters], {**self._caches}, self._kept)

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

    def _check_finite(self, names: Sequence[str]) -> None:
        for name in names:
            if not is_finite(self, name):
                raise ValueError(BROKEN.format(name))

    def _report(self, form: str, merged: MergedWeight, added: int, kept: int) -> None:
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
