"""Loads the compiled module, or says what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch  # its libraries must be loaded before _C

EXPECTED_OPS_VERSION = 27
_REBUILD = (
    "Build it with `pip install --editable .` in the project's folder; what is installed there without --editable, a "
    "Python started in that folder does not see."
)

try:
    from . import _C as _C
except ImportError as error:
    raise ImportError(
        f"peft_kernels: the compiled module peft_kernels._C could not be loaded ({error}). {_REBUILD}"
    ) from error

build_info: dict[str, object] = _C.build_info()
if build_info["ops_version"] != EXPECTED_OPS_VERSION:
    raise ImportError(
        f"peft_kernels: the compiled module {_C.__file__} is stale: it has version {build_info['ops_version']} of the "
        f"ops, this Python code wants {EXPECTED_OPS_VERSION}. {_REBUILD}"
    )


def refusing(op: Callable[..., Any]) -> Callable[..., Any]:
    """An op of this package, whose refusals of an argument are ValueErrors."""

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return op(*args, **kwargs)
        except RuntimeError as error:
            if ": got " in str(error) and ", wanted " in str(error):
                raise ValueError(str(error)) from None
            raise

    return call


def _keep_value_errors() -> None:
    """Kernels throw `std::invalid_argument`, which is a ValueError in Python; torch 2.15 makes it a RuntimeError."""
    nothing = torch.empty(0, device="cpu")
    try:
        torch.ops.peft_kernels.dropout(nothing, nothing, 2.0)
    except ValueError:
        return
    except RuntimeError:
        pass
    prefix = "peft_kernels::"
    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith(prefix):
            packet = getattr(torch.ops.peft_kernels, name.removeprefix(prefix))
            for op in (packet, packet.default):
                op._op = refusing(op._op)


_keep_value_errors()
