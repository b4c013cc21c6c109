"""How a dense LoRA layer merges."""

from __future__ import annotations

import math

import torch
from torch import nn

from ... import merging
from ...ops._sums import differences, share
from ..base_layer import is_conv1d, is_plain
from .merge import Merges, State
from .merged_weight import MergedWeight


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

    def _report_sum(self, original: State | None, kept: int) -> None:
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
        self._report("dense", MergedWeight(base.weight, None, error, lost, remark), 0, kept)

    def _checksum(self) -> int | None:
        weight = self.get_base_layer().weight.data
        integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}.get(weight.element_size())
        return None if integers is None or not is_plain(weight) else int(weight.view(integers).sum())

    def _put_back(self, state: State) -> None:
        base = self.get_base_layer()
        for value, now in ((state.weight, base.weight), (state.bias, base.bias)):
            if value is not None:
                now.data.copy_(value)
        self._put_back_rest(state)
