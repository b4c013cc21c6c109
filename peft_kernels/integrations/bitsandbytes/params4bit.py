"""A 4-bit weight of this package as bitsandbytes' parameter."""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
from bitsandbytes.functional import QuantState

from ...ops.nf4 import NF4Weight


def set_weight(layer: Any, view: NF4Weight) -> None:
    """Gives a `Linear4bit` another weight, whose memory the parameter shares."""
    storage = layer.weight.quant_storage
    layer.weight = bnb.nn.modules.Params4bit(
        view.codes.view(storage).view(-1, 1),
        requires_grad=False,
        quant_state=QuantState.from_dict(view.as_dict(), device=view.codes.device),
        blocksize=view.blocksize,
        compress_statistics=bool(view.nested),
        quant_type=view.quant_type,
        quant_storage=storage,
        module=layer,
        bnb_quantized=True,
    )
    layer.quant_state = layer.weight.quant_state
