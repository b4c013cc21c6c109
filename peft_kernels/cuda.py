"""Which CUDA devices, and which drivers, the kernels run on."""

from __future__ import annotations

import functools

import torch

from . import _extension

_LEAST_CAPABILITY = (8, 0)  # cp.async, and products of bf16 and tf32
_LEAST_DRIVER = {12: 525, 13: 580}  # the oldest driver for a major version of CUDA


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
    reason: str | None = _why_not_driver()
    if reason:
        return reason
    capability = torch.cuda.get_device_capability(index)
    if capability >= _LEAST_CAPABILITY:
        return None
    return f"no fused kernel for sm_{capability[0]}{capability[1]}, which is older than sm_80"


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch's has no types
def _why_not_driver() -> str | None:
    """A driver serves what was built with its own major version of CUDA, and with older ones."""
    versions = torch.ops.peft_kernels.cuda_versions()
    driver, runtime = (version // 1000 for version in versions)
    if driver >= runtime:
        return None
    of_driver, of_runtime = (f"CUDA {version // 1000}.{version % 1000 // 10}" for version in versions)
    remedy = f"install a driver for CUDA {runtime}"
    if runtime in _LEAST_DRIVER:
        remedy += f" ({_LEAST_DRIVER[runtime]} or newer)"
    if driver in _LEAST_DRIVER:
        remedy += f", or build with CUDA {driver} (CUDA_HOME=/usr/local/cuda-{driver} pip install .)"
    return f"the NVIDIA driver is for {of_driver}, peft_kernels was built with {of_runtime}: {remedy}"
