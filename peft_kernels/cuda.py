"""Which CUDA devices the kernels run on."""

from __future__ import annotations

import functools

import torch

from . import _extension

_LEAST_CAPABILITY = (8, 0)  # cp.async, and products of bf16 and tf32


def why_not(device: torch.device) -> str | None:
    """Why a tensor on a device can't go to the fused kernels; None if it can. A CPU always can."""
    if device.type == "cpu":
        return None
    if device.type != "cuda" or torch.version.hip is not None:
        return f"no fused kernel for {device.type}"
    if not _extension.build_info["cuda"]:
        return "peft_kernels was built without CUDA (PEFT_KERNELS_CUDA=1 pip install . builds it with)"
    return _why_not_card(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _why_not_card(index: int) -> str | None:
    capability = torch.cuda.get_device_capability(index)
    if capability >= _LEAST_CAPABILITY:
        return None
    return f"no fused kernel for sm_{capability[0]}{capability[1]}, which is older than sm_80"
