"""`torch.nn.Dropout`, fused: torch draws a CPU's masks on one thread, and keeps them for the backward."""

from __future__ import annotations

from torch import Tensor, nn

from ...cuda import why_not
from ...ops.dropout import dropout
from ..registry import FusedLayer, Trial, register, why_not_input

_WIDTH = 1024  # of the inputs that it is timed with; only the number of their elements counts


@register
class Dropout(FusedLayer, nn.Dropout):
    """The stock layer with a mask that is made again in the backward. One in place, or of p = 1, keeps its forward."""

    family = "dropout"

    @classmethod
    def applies(cls, layer: nn.Module) -> bool:
        return isinstance(layer, nn.Dropout) and 0 < layer.p < 1 and not layer.inplace

    def trial(self) -> Trial | None:
        return None if self.why_stock() else Trial(self, _WIDTH, None, None)

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return input  # as torch's function does, past its checks
        if self.stock_is_faster(input):
            return nn.functional.dropout(input, self.p, True, self.inplace)  # as stock, which is a call more
        if self.inplace or not 0 < self.p < 1:
            return super().forward(input)
        if reason := why_not_input(input) or why_not(input.device) or _why_not_layout(input):
            return self.take_stock_path(reason, input)
        return dropout(input, float(self.p))

    def why_stock(self) -> str | None:
        return None if self.applies(self) else f"its p is {self.p}, in place: {self.inplace}"


def _why_not_layout(x: Tensor) -> str | None:
    """The stock layer's result lies in memory as x does, which a later view may count on."""
    return None if x.is_contiguous() else "x is not contiguous"
