"""A 4-bit weight of this package as bitsandbytes' parameter."""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
from bitsandbytes.functional import QuantState

from ...ops.nf4 import NF4Weight


def params4bit(layer: Any, like: Any, view: NF4Weight) -> Any:
    """A 4-bit weight for a layer, in the storage of one that it has: the view's tensors, shared."""
    return bnb.nn.modules.Params4bit(
        view.codes.view(like.data.dtype).view(like.data.shape),
        requires_grad=False,
        quant_state=QuantState.from_dict(view.as_dict(), device=view.codes.device),
        blocksize=view.blocksize,
        compress_statistics=bool(view.nested),
        quant_type=view.quant_type,
        quant_storage=like.quant_storage,
        module=layer,
        bnb_quantized=True,
    )


def set_weight(layer: Any, view: NF4Weight) -> None:
    """Gives a `Linear4bit` another weight, whose memory the parameter shares."""
    layer.weight = params4bit(layer, layer.weight, view)
    layer.quant_state = layer.weight.quant_state
