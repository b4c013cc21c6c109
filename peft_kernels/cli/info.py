"""What is installed and built, what runs on this machine, and what was measured on it: in one paste."""

from __future__ import annotations

import argparse
import os
import pkgutil
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from .. import __version__, choices, cpu, cuda, ops
from .._extension import build_info
from .output import Bytes

_PACKAGES = (
    "torch",
    "peft",
    "transformers",
    "bitsandbytes",
    "adapters",
    "accelerate",
    "safetensors",
    "numpy",
    "triton",
)
_VARIABLES = ("ATEN_CPU_CAPABILITY", "CUDA_VISIBLE_DEVICES", "MKL_NUM_THREADS", "OMP_NUM_THREADS",
              "ONEDNN_MAX_CPU_ISA", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # fmt: skip
_PREFIX = "peft_kernels::"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None of its own."""


def run(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "build": {
            "peft_kernels": __version__,
            "ops_version": str(build_info["ops_version"]),
            "compiler": build_info["compiler"],
            "cuda_kernels_for": [_architecture(name) for name in str(build_info.get("cuda_architectures", "")).split()],
        },
        "machine": {
            "system": f"{platform.system()} {platform.release()}, {' '.join(platform.libc_ver())}",
            "processor": choices.processor(),
            "threads_of_torch": torch.get_num_threads(),
            "memory": Bytes(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")),
        },
        "packages": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "environment": {
            name: value for name, value in sorted(os.environ.items())
            if name.startswith("PEFT_KERNELS_") or name in _VARIABLES
        },
        "devices": list(_devices()),
        "kernels": list(_kernels()),
        "tuning": _tuning(),
    }  # fmt: skip


def _architecture(name: str) -> str:
    """As CMake has it: without -real there is PTX too, which later cards run."""
    return f"sm_{name.removesuffix('-real')}" + ("" if name.endswith("-real") else " and later")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _devices() -> Iterator[dict[str, Any]]:
    """Each device, and whether its tensors take the fused kernels."""
    isas = ", ".join(cpu.isas())
    yield {"device": "cpu", "fused": True, "what": f"kernels for {cpu.isa()}; this processor can run {isas}"}
    for index in range(torch.cuda.device_count()):
        device, properties = torch.device("cuda", index), torch.cuda.get_device_properties(index)
        what = [f"{properties.name}, sm_{properties.major}{properties.minor}, {Bytes(properties.total_memory)}"]
        if build_info["cuda"]:
            what.append("driver for CUDA {}, built with {}".format(*map(_cuda_version, _cuda_versions())))
        reason = cuda.why_not(device)
        yield {
            "device": str(device),
            "fused": reason is None,
            "what": "; ".join([*what, *([reason] if reason else [])]),
        }


def _cuda_versions() -> list[int]:
    versions: list[int] = torch.ops.peft_kernels.cuda_versions()
    return versions


def _cuda_version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}" if number else "(none)"


def _kernels() -> Iterator[dict[str, Any]]:
    """The families, and for which devices this build has kernels of theirs; elsewhere torch's operations stand in."""
    families = sorted((name for _, name, _ in pkgutil.iter_modules(ops.__path__) if name[0] != "_"), key=len)
    found: dict[str, set[str]] = {}
    for op in torch._C._dispatch_get_all_op_names():
        owner = [name for name in families if op.removeprefix(_PREFIX).startswith(name)][-1:]
        for family in owner if op.startswith(_PREFIX) else ():
            found.setdefault(family, set()).update(
                key for key in ("CPU", "CUDA") if torch._C._dispatch_has_kernel_for_dispatch_key(op, key)
            )
    for family, keys in sorted(found.items()):
        yield {"family": family, "cpu": "CPU" in keys, "cuda": "CUDA" in keys}


def _tuning() -> dict[str, Any]:
    """The file of measurements, and how many operations it has of each device here."""
    table = choices.load()
    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()) if build_info["cuda"])]
    machines = {device: choices.machine_of(torch.device(device)) for device in devices}
    return {
        "file": str(choices.path()),
        "exists": choices.path().exists(),
        **{f"operations_on_{device}": len(table.get(machine, {})) for device, machine in machines.items()},
        "other_machines": len(table.keys() - machines.values()),
    }
